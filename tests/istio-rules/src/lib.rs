//! Istio's iptables rules, written and read.
//!
//! [`Rules`] is the configuration of `istio-iptables` as plain data; from it
//! come the rules of the `nat` table that a real sidecar would carry, as text
//! for `iptables-restore` and `ip6tables-restore`. [`Table`] reads such text and
//! says what the kernel would do with a [`Packet`]. Tests compare the decision
//! of shunt with the interpreter here and with the kernel, which is given the
//! same text.
#![forbid(unsafe_code)]

mod family;
mod generator;
mod interpreter;
mod packet;
mod rules;

pub use family::Family;
pub use interpreter::{ParseError, Table};
pub use packet::{Hook, Outcome, Owner, Packet, Protocol};
pub use rules::{Capture, Dns, Groups, Rules};
