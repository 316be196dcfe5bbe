//! The project's tasks: `cargo xtask --help`.
//!
//! One module per subcommand. Every other program is run through
//! [`exec::Step`], so that a failure says what was being done, with which
//! command, and what to do about it.

mod apt;
mod arch;
mod bench;
mod build;
mod chart;
mod demo;
mod env;
mod exec;
mod image;
mod kubernetes;
mod lint;
mod paths;
mod run;
mod setup;
mod staging;
mod tally;
mod target;
mod test;
mod vm;

use std::{fmt::Display, process::ExitCode};

use clap::{Parser, Subcommand};

/// Set up this machine for shunt, build it, test it, show it.
///
/// Downloads are kept in $SHUNT_CACHE; else, for root, in /var/cache/shunt (the
/// proxy's user has to reach Envoy there, which it cannot below /root); else in
/// $XDG_CACHE_HOME/shunt or ~/.cache/shunt.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what is missing: Debian packages, a toolchain for the BPF crate, bpf-linker, Envoy,
    /// Helm's library
    ///
    /// Says for each thing what it is for, and does nothing the second time.
    /// The BPF crate is built with the toolchain that SHUNT_BPF_TOOLCHAIN names,
    /// else with one of rustup's named `shunt-bpf`, else with rustup's nightly if
    /// it has the component rust-src; else Debian's rustc-web is installed and
    /// linked as `shunt-bpf`. SHUNT_ENVOY names an Envoy to use instead of
    /// downloading one.
    Setup,
    /// Build the agent: target/release/shunt, the BPF programs inside
    Build(build::Arguments),
    /// Run every test, unit and integration; needs root
    Test(test::Arguments),
    /// Build the agent and run it on this machine, until Ctrl-C; needs root
    Run(run::Arguments),
    /// The integration tests in virtual machines with other kernels; needs root
    VmTest(vm::Arguments),
    /// What the BPF programs cost the verifier, here and on other kernels; needs root
    ///
    /// Loads every program as the agent does, for each mode of splicing, with decisions logged
    /// and not, and prints for each the most that it took: instructions that the verifier
    /// looked at (the limit is 1,000,000), states, and bytes of stack, of one function and of
    /// functions that call each other (512), in the steps of 32 in which Linux before 6.8
    /// counts. Fails when a program has more than half of a limit.
    Verifier(vm::verifier::Arguments),
    /// A virtual machine with a shell, the agent, and two pods with Envoy; needs root
    Vm(vm::dev::Arguments),
    /// Two pods with a real Envoy each, requests between them, and the evidence; needs root
    Demo(demo::Arguments),
    /// What redirection costs, beside iptables and without; writes docs/benchmarks.md; needs root
    Bench(bench::Arguments),
    /// The container image, as an OCI archive, without a container engine
    Image(image::Arguments),
    /// Write the plain manifests from the Helm chart: deploy/manifests
    Manifests,
    /// Formatting, clippy (host and BPF crates), rustdoc, licences and sources of dependencies,
    /// the Helm chart
    Lint,
    /// Print where things are, as NAME=value: what the tests get in their environment
    Env,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Setup => setup::command().map(|()| ExitCode::SUCCESS),
        Task::Build(arguments) => build::command(&arguments).map(|()| ExitCode::SUCCESS),
        Task::Test(arguments) => test::command(&arguments),
        Task::Run(arguments) => run::command(&arguments).map(|never| match never {}),
        Task::VmTest(arguments) => vm::test(&arguments),
        Task::Verifier(arguments) => vm::verifier::command(&arguments),
        Task::Vm(arguments) => vm::dev::command(&arguments),
        Task::Demo(arguments) => demo::command(&arguments).map(|never| match never {}),
        Task::Bench(arguments) => bench::command(&arguments).map(|never| match never {}),
        Task::Image(arguments) => image::command(&arguments).map(|()| ExitCode::SUCCESS),
        Task::Manifests => chart::command().map(|()| ExitCode::SUCCESS),
        Task::Lint => lint::command(),
        Task::Env => env::command().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        complain(format!("error: {error:#}"));
        ExitCode::FAILURE
    })
}

/// One message to the user.
#[expect(clippy::print_stdout, reason = "xtask talks to a terminal")]
fn say(text: impl Display) {
    println!("{text}");
}

/// One message about something that went wrong.
#[expect(clippy::print_stderr, reason = "xtask talks to a terminal")]
fn complain(text: impl Display) {
    eprintln!("{text}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
