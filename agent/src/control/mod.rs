//! The control socket: how the command line and the CNI plugin talk to the agent.

mod client;
mod protocol;
mod server;

pub use client::Client;
pub(crate) use client::ask_once;
pub use protocol::{MAX_FRAME, Reply, Request};
pub use server::Server;

/// Where the agent serves unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/shunt/shunt.sock";
