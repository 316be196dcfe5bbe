//! Connections that bypass the loopback stack: nothing of it is to be noticed but
//! the speed.

mod closing;
mod order;
mod pair;
mod setting;
mod slow_reader;
mod small_messages;
mod upheaval;

/// The agent splices what the application sends to its proxy, also where the
/// kernel has something that speaks against it.
const INTO_PROXY: &[&str] = &["--splice", "proxy"];

/// The agent splices what one proxy sends to another, and nothing else: what it does
/// without being told.
const BETWEEN: &[&str] = &["--splice", "between"];
