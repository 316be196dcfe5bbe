//! The `shunt` command.
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use shunt::cli::explain::Explain;

/// Takes iptables out of the service mesh.
#[derive(Parser)]
#[command(version)]
struct Shunt {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Explain(Box<Explain>),
}

fn main() -> ExitCode {
    match Shunt::parse().command {
        Command::Explain(explain) => explain.run(),
    }
}
