//! The `shunt` command.
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use shunt::{
    cli::{
        check::Check,
        enroll::{Enroll, Unenroll},
        explain::Explain,
        make_maps::MakeMaps,
        run::Run,
        status::StatusCommand,
        uninstall::Uninstall,
    },
    control::DEFAULT_SOCKET,
    datapath::maps::MAKE_MAPS,
    observe::LogFormat,
};

/// Takes iptables out of the service mesh: redirects the TCP connections of
/// network namespaces to the sidecar proxy in them, with eBPF.
///
/// Exit codes: 0 when it is done, 1 when it could not be done, 2 when the
/// command line or a setting makes no sense. In all but the first case nothing
/// has changed.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Examples:
  Start the agent, then redirect a pod as Istio's init container does:
    shunt run &
    shunt enroll --netns /run/netns/pod -p 15001 -z 15006 -u 1337 -g 1337 \\
      -m REDIRECT -i '*' -x '' -b '*' -d 15090,15021,15020
  See what is redirected, and stop it:
    shunt status
    shunt unenroll --netns /run/netns/pod"
)]
struct Shunt {
    /// The agent's control socket
    #[arg(
        long,
        global = true,
        env = "SHUNT_SOCKET",
        value_name = "PATH",
        default_value = DEFAULT_SOCKET
    )]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(Box<Run>),
    Enroll(Box<Enroll>),
    Unenroll(Unenroll),
    Status(StatusCommand),
    Explain(Box<Explain>),
    Check(Check),
    Uninstall(Uninstall),
    #[command(name = MAKE_MAPS, hide = true)]
    MakeMaps(MakeMaps),
}

impl Command {
    /// How its log is written.
    fn log_format(&self) -> LogFormat {
        match self {
            Self::Run(run) => run.log_format(),
            Self::Enroll(_)
            | Self::Unenroll(_)
            | Self::Status(_)
            | Self::Explain(_)
            | Self::Check(_)
            | Self::Uninstall(_)
            | Self::MakeMaps(_) => LogFormat::Text,
        }
    }
}

fn main() -> ExitCode {
    let mut command = shunt::cli::without_empty_variables(Shunt::command());
    let given = command.get_matches_mut();
    let shunt =
        Shunt::from_arg_matches(&given).unwrap_or_else(|error| error.format(&mut command).exit());
    shunt::observe::logs::start(shunt.command.log_format());
    let socket = &shunt.socket;
    let done = match shunt.command {
        Command::Run(run) => run.run(socket),
        Command::Enroll(enroll) => enroll.run(socket),
        Command::Unenroll(unenroll) => unenroll.run(socket),
        Command::Status(status) => status.run(socket),
        Command::Uninstall(uninstall) => uninstall.run(socket),
        Command::MakeMaps(maps) => maps.run(),
        Command::Explain(explain) => return explain.run(),
        Command::Check(check) => return check.run().unwrap_or_else(|e| shunt::cli::fail(&e)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => shunt::cli::fail(&error),
    }
}
