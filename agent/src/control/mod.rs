//! The control socket: how the command line, and later the CNI plugin, talk to
//! the agent.

mod client;
mod protocol;
mod server;

pub use client::Client;
pub use protocol::{MAX_FRAME, Reply, Request};
pub use server::Server;

/// Where the agent serves unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/shunt/shunt.sock";
