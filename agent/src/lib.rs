//! The shunt agent.

pub mod cli;
pub mod settings;
