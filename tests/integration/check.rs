//! `shunt check`: what it finds, what it says about it, and that it changes
//! nothing.

use std::{fs, path::Path, process::Command};

use serde_json::Value;
use shunt_tests::{
    Cgroup, Node, Owner,
    agent::{Agent, EverybodysBinary, Ran, binary, run},
    command::output_of,
    leftovers::temp_dir,
    mesh::ISTIO_DEFAULTS,
    require_root,
};

/// A check for the sockets of one cgroup.
fn check(cgroup: &Path, bpffs: &Path) -> Command {
    let mut command = Command::new(binary());
    command
        .args(["check", "--output", "json", "--cgroup"])
        .arg(cgroup)
        .arg("--bpffs")
        .arg(bpffs);
    command
}

fn findings(ran: &Ran) -> Vec<Value> {
    let answer: Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(answer["can_run"], Value::Bool(ran.status.success()));
    let findings = answer["findings"].as_array().expect("a list").clone();
    for finding in &findings {
        let nothing_to_do = finding["remedy"].as_str().unwrap_or_default().is_empty();
        assert_eq!(finding["level"] == "ok", nothing_to_do, "{finding}");
        assert!(!finding.to_string().contains("  "), "{finding}");
    }
    findings
}

/// The level and the text of what was found about `subject`.
fn about(findings: &[Value], subject: &str) -> (String, String) {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let finding = findings
        .iter()
        .find(|finding| finding["subject"] == subject)
        .unwrap_or_else(|| panic!("nothing about {subject}: {findings:?}"));
    (text(&finding["level"]), text(&finding["found"]))
}

fn level(findings: &[Value], subject: &str) -> String {
    about(findings, subject).0
}

#[test]
fn this_machine_can_run_the_agent() {
    require_root();
    let cgroup = Cgroup::new();
    let dir = temp_dir("check");
    let bpffs = dir.path().join("bpffs");

    let ran = run(&mut check(cgroup.path(), &bpffs));

    assert!(ran.status.success(), "{ran:?}");
    let found = findings(&ran);
    for subject in [
        "user",
        "capabilities",
        "processes",
        "kernel",
        "lockdown",
        "BTF",
        "memlock",
        "bpffs",
        "cgroup v2",
        "features",
        "splicing",
    ] {
        assert_eq!(level(&found, subject), "ok", "{subject}: {found:?}");
    }
    assert!(!bpffs.exists(), "a check makes nothing");
}

/// As in a container without `hostPID`.
#[test]
fn a_pid_namespace_of_its_own_is_warned_of() {
    require_root();
    let cgroup = Cgroup::new();
    let dir = temp_dir("check");
    let plain = check(cgroup.path(), &dir.path().join("bpffs"));
    let mut alone = Command::new("unshare");
    alone
        .args(["--pid", "--fork"])
        .arg(plain.get_program())
        .args(plain.get_args());

    let ran = run(&mut alone);

    assert!(ran.status.success(), "{ran:?}");
    assert_eq!(level(&findings(&ran), "processes"), "warning");
}

#[test]
fn the_programs_of_others_are_named() {
    let node = Node::new();
    let agent = Agent::start(node.cgroup());
    let pod = node.pod("app");
    agent.enroll(pod.netns(), &ISTIO_DEFAULTS);
    let cgroup = node.cgroup().path();

    let beside = findings(&run(&mut check(cgroup, &agent.place().bpffs())));

    let (level_of_place, place) = about(&beside, "bpffs");
    assert_eq!(level_of_place, "warning");
    assert!(place.contains("an agent keeps its maps"), "{place}");
    let (level_of_hooks, hooks) = about(&beside, "neighbours");
    assert_eq!(level_of_hooks, "warning");
    // The kernel cuts longer names.
    for hook in ["connect4", "connect6", "recvmsg6", "sock_ops"] {
        let program = format!("shunt_{hook} on {hook} (id ");
        assert!(hooks.contains(&program), "{program} in {hooks}");
    }
    assert!(hooks.contains("another shunt agent"), "{hooks}");
    // From above: the agents of other tests are there as well.
    let above = cgroup.parent().expect("it is in one of this process");
    let from_above = findings(&run(&mut check(above, &agent.place().bpffs())));
    let (_, below) = about(&from_above, "neighbours");
    let program = "shunt_connect4 on connect4 of shunt-test-";
    assert!(below.contains(program), "{program} in {below}");
    // These are of the whole machine.
    for (subject, program) in [
        ("other lookups", "shunt_lookup on sk_lookup (id "),
        ("other splicers", "shunt_message on sk_msg (id "),
    ] {
        let (level, found) = about(&beside, subject);
        assert_eq!(level, "warning", "{subject}");
        assert!(found.contains(program), "{program} in {found}");
    }
    // Nor does the agent notice.
    assert_eq!(agent.status()["pods"].as_array().map(Vec::len), Some(1));
}

#[test]
fn what_is_missing_is_a_failure() {
    require_root();
    let dir = temp_dir("check");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("a file");

    let no_cgroup = run(&mut check(dir.path(), &dir.path().join("bpffs")));
    assert_eq!(no_cgroup.status.code(), Some(1));
    assert_eq!(level(&findings(&no_cgroup), "cgroup v2"), "failure");

    let cgroup = Cgroup::new();
    let no_directory = run(&mut check(cgroup.path(), &file));
    assert_eq!(no_directory.status.code(), Some(1));
    assert_eq!(level(&findings(&no_directory), "bpffs"), "failure");
}

#[test]
fn without_root_it_says_so() {
    require_root();
    let cgroup = Cgroup::new();
    let everybodys = EverybodysBinary::new();

    let ran = run(everybodys
        .command(Owner::APP)
        .args(["check", "--output", "json", "--cgroup"])
        .arg(cgroup.path()));

    assert_eq!(ran.status.code(), Some(1));
    let found = findings(&ran);
    assert_eq!(level(&found, "user"), "failure");
    let (capabilities, lacking) = about(&found, "capabilities");
    assert_eq!(capabilities, "failure");
    assert!(lacking.contains("CAP_BPF (to load"), "{lacking}");
}

/// For people there is one line for each finding.
#[test]
fn it_is_written_for_people_too() {
    require_root();
    let cgroup = Cgroup::new();
    let text = output_of(
        Command::new(binary())
            .arg("check")
            .arg("--cgroup")
            .arg(cgroup.path()),
    );
    assert!(
        text.lines().any(|line| line.starts_with("ok    kernel")),
        "{text}"
    );
    assert_eq!(text.lines().last(), Some("shunt can run here"));
}
