//! The command line: what it refuses, with which words, and that nothing has
//! changed then.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::Command,
};

use shunt_tests::{
    Agent, Owner,
    agent::{EverybodysBinary, Ran, binary, run},
    leftovers::temp_dir,
    mesh::ISTIO_DEFAULTS,
};

use crate::lab::Lab;

/// A refusal is one sentence about `what`, and an exit status that says so.
#[track_caller]
fn assert_refused(ran: &Ran, what: &str) {
    assert!(!ran.status.success(), "{what:?} was not refused: {ran:?}");
    assert!(ran.status.code().is_some(), "it crashed: {ran:?}");
    let sentence = ran.stderr.trim_end();
    assert!(
        !sentence.is_empty() && sentence.lines().count() == 1,
        "not one sentence: {ran:?}"
    );
    assert!(sentence.contains(what), "not about {what:?}: {sentence}");
    assert!(!sentence.contains("panicked"), "{sentence}");
    assert_eq!(ran.stdout, "");
}

/// What the agent says of its pods, without what is counted.
fn settings_of(agent: &Agent) -> Vec<serde_json::Value> {
    let status = agent.status();
    let pods = status["pods"].as_array().expect("a list of pods");
    pods.iter().map(|pod| pod["settings"].clone()).collect()
}

#[test]
fn settings_that_mean_nothing_change_nothing() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let _proxy = lab.proxy();
    let before = settings_of(&agent);
    let cases: [(&[&str], &str); 12] = [
        (&["-i", "10.0.0.0/33"], "10.0.0.0/33"),
        (&["-i", "10.0.0.0/8,somewhere"], "somewhere"),
        (&["-x", "300.1.1.1/8"], "300.1.1.1/8"),
        (&["-x", "*"], "*"),
        (&["-b", "65536"], "65536"),
        (&["-b", "80,http"], "http"),
        (&["-d", "80;90"], "80;90"),
        (&["-q", "90-80"], "90-80"),
        (&["-o", "0"], "0"),
        (&["-p", "70000"], "70000"),
        (&["-u", "somebody"], "somebody"),
        (&["-m", "SIDEWAYS"], "SIDEWAYS"),
    ];
    for (flags, what) in cases {
        let ran = run(&mut agent.enroll_command(&lab.pod.netns().path(), flags));
        assert_refused(&ran, what);
        assert_eq!(settings_of(&agent), before, "after {flags:?}");
    }
    lab.assert_redirected();
}

#[test]
fn what_is_no_network_namespace_is_not_enrolled() {
    let lab = Lab::new();
    let agent = lab.agent();
    for path in [
        "/run/netns/there-is-none",
        "/etc/passwd",
        "/proc/self/ns/uts",
        "/",
        "/dev/null",
    ] {
        let ran = run(&mut agent.enroll_command(Path::new(path), &ISTIO_DEFAULTS));
        // A path below /proc/self is shown as the agent sees it.
        let what = path.strip_prefix("/proc/self").unwrap_or(path);
        assert_refused(&ran, what);
    }
    assert_eq!(settings_of(&agent).len(), 0);
}

#[test]
fn what_is_not_enrolled_cannot_be_unenrolled() {
    let lab = Lab::new();
    let agent = lab.agent();
    let path = lab.pod.netns().path();
    let ran = run(agent.cli().arg("unenroll").arg("--netns").arg(&path));
    assert_refused(&ran, lab.pod.netns().name());
}

#[test]
fn a_second_agent_on_the_same_socket_does_not_start() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let _proxy = lab.proxy();
    let socket = agent.place().socket();
    let attached = shunt_tests::bpf::attached_to_cgroup(lab.node.cgroup().path());

    let ran = run(&mut agent.place().run_command());

    assert_refused(&ran, &socket.display().to_string());
    assert_eq!(
        shunt_tests::bpf::attached_to_cgroup(lab.node.cgroup().path()),
        attached
    );
    assert_eq!(settings_of(&agent).len(), 1);
    lab.assert_redirected();
}

#[test]
fn a_second_agent_on_the_same_pins_does_not_start() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let _proxy = lab.proxy();
    let other = temp_dir("other");

    let ran = run(Command::new(binary())
        .arg("run")
        .arg("--socket")
        .arg(other.path().join("shunt.sock"))
        .arg("--cgroup")
        .arg(lab.node.cgroup().path())
        .arg("--bpffs")
        .arg(agent.place().bpffs()));

    assert_refused(&ran, "--bpffs");
    assert!(agent.place().bpffs().join("PODS").exists());
    lab.assert_redirected();
}

#[test]
fn a_file_in_the_place_of_the_socket_is_left_alone() {
    let lab = Lab::new();
    let place = shunt_tests::agent::Place::new(lab.node.cgroup());
    fs::write(place.socket(), "precious").expect("our own directory");

    let ran = run(&mut place.run_command());

    assert_refused(&ran, "is no socket");
    let kept = fs::read_to_string(place.socket()).expect("it is still there");
    assert_eq!(kept, "precious");
}

#[test]
fn an_agent_ends_while_a_client_is_connected() {
    let lab = Lab::new();
    let agent = lab.agent();
    let _idle = UnixStream::connect(agent.place().socket()).expect("it serves");
    // Waits for its end, and fails when there is none.
    agent.stop();
}

#[test]
fn the_namespace_of_the_node_is_not_enrolled() {
    let lab = Lab::new();
    let agent = lab.agent();
    // The agent runs where the tests do.
    let own = format!("/proc/{}/ns/net", std::process::id());
    let ran = run(&mut agent.enroll_command(Path::new(&own), &ISTIO_DEFAULTS));
    assert_refused(&ran, "of the node itself");
    assert_eq!(settings_of(&agent).len(), 0);
}

#[test]
fn without_an_agent_it_says_how_to_start_one() {
    shunt_tests::require_root();
    let nowhere = temp_dir("nowhere");
    let socket = nowhere.path().join("shunt.sock");
    let ran = run(Command::new(binary())
        .arg("--socket")
        .arg(&socket)
        .arg("status"));
    assert_refused(&ran, "shunt run");
}

#[test]
fn an_agent_needs_a_cgroup_of_the_second_version() {
    let lab = Lab::new();
    let agent = lab.agent();
    let other = temp_dir("other");
    for cgroup in ["/there-is-none", "/tmp"] {
        let ran = run(Command::new(binary())
            .args(["run", "--cgroup", cgroup, "--socket"])
            .arg(other.path().join("shunt.sock"))
            .arg("--bpffs")
            .arg(agent.place().bpffs().with_file_name("another")));
        assert_refused(&ran, cgroup);
        assert_refused(&ran, "--cgroup");
        assert!(!other.path().join("shunt.sock").exists());
    }
}

/// Somebody without any rights.
const NOBODY: Owner = Owner {
    uid: 65_534,
    gid: 65_534,
};

#[test]
fn an_agent_needs_root() {
    let everybodys = EverybodysBinary::new();
    let other = temp_dir("other");
    let ran = run(everybodys
        .command(NOBODY)
        .args(["run", "--socket"])
        .arg(other.path().join("shunt.sock")));
    assert_refused(&ran, "root");
}

#[test]
fn only_root_may_talk_to_the_agent() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let before = settings_of(&agent);
    let everybodys = EverybodysBinary::new();
    // The directory would keep others out as well; here the socket has to.
    let everybody = fs::Permissions::from_mode(0o755);
    let socket = agent.place().socket();
    let directory = socket.parent().expect("a socket is in a directory");
    fs::set_permissions(directory, everybody).expect("our own directory");
    let netns = lab.pod.netns().path();
    for subcommand in ["enroll", "unenroll"] {
        let ran = run(everybodys
            .command(NOBODY)
            .arg("--socket")
            .arg(&socket)
            .arg(subcommand)
            .arg("--netns")
            .arg(&netns));
        assert_refused(&ran, "root");
    }
    // Nor when somebody has opened the socket to everybody.
    let open = fs::Permissions::from_mode(0o666);
    fs::set_permissions(&socket, open).expect("our own socket");
    let mut status = everybodys.command(NOBODY);
    let ran = run(status.arg("--socket").arg(&socket).arg("status"));
    assert_refused(&ran, "uid 65534 may not control the agent");
    assert_eq!(settings_of(&agent), before);
}

/// What the agent answers to bytes that are no frame, or no message.
fn answer_to(agent: &Agent, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(agent.place().socket()).expect("it serves");
    // It may have closed its end before all is sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn what_is_no_message_is_refused_with_a_reason() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let before = settings_of(&agent);
    let seventeen_mib: u32 = 17 << 20;
    let mut too_long = seventeen_mib.to_be_bytes().to_vec();
    too_long.resize(too_long.len() + (1 << 20), b' ');
    let whole = br#"{"unenrol":"here"}"#;
    let length = u32::try_from(whole.len())
        .expect("it is short")
        .to_be_bytes();
    let framed = [&length[..], whole].concat();
    let (cut, _) = framed.split_at(framed.len() - 1);
    for (bytes, says) in [
        (too_long.as_slice(), "16777216 bytes"),
        (cut, "is cut"),
        (&framed, "unenrol"),
        (b"\x00\x00\x00\x02{]", "same version"),
    ] {
        let answer = answer_to(&agent, bytes);
        assert!(answer.contains("failed"), "{says}: {answer}");
        assert!(answer.contains(says), "{says}: {answer}");
    }
    assert_eq!(settings_of(&agent), before);
    assert!(!agent.log().contains("panicked"), "{}", agent.log());
}

#[test]
fn variables_that_are_empty_count_as_unset() {
    let lab = Lab::new();
    let agent = lab.agent();
    let netns = lab.pod.netns().path();
    let mut enroll = agent.enroll_command(&netns, &ISTIO_DEFAULTS);
    for name in [
        "SHUNT_SOCKET",
        "SHUNT_NETNS",
        "SHUNT_RESOLV_CONF",
        "SHUNT_LOG",
    ] {
        enroll.env(name, "");
    }
    let ran = run(&mut enroll);
    assert!(ran.status.success(), "{ran:?}");
    assert_eq!(ran.stderr, "");
    let ran = run(agent.cli().arg("status").env("SHUNT_OUTPUT", ""));
    assert!(ran.status.success(), "{ran:?}");
    assert!(ran.stdout.contains("settings --mesh istio\n"), "{ran:?}");
}

#[test]
fn a_log_that_cannot_be_set_up_as_asked_says_so() {
    let lab = Lab::new();
    let agent = lab.agent();
    let ran = run(agent.cli().arg("status").env("SHUNT_LOG", "a=b=c"));
    assert!(ran.status.success(), "{ran:?}");
    assert!(
        ran.stderr.contains("SHUNT_LOG cannot be understood"),
        "{ran:?}"
    );
    assert!(ran.stderr.contains("asked=\"a=b=c\""), "{ran:?}");
}

#[test]
fn a_resolv_conf_that_is_not_there_is_bad_input() {
    let lab = Lab::new();
    let agent = lab.agent();
    let mut enroll = agent.enroll_command(&lab.pod.netns().path(), &["--redirect-dns"]);
    let ran = run(enroll.args(["--resolv-conf", "/there-is-none"]));
    assert_refused(&ran, "--resolv-conf");
    assert_eq!(ran.status.code(), Some(2));
    assert_eq!(settings_of(&agent).len(), 0);
}

#[test]
fn help_and_explain_need_neither_root_nor_an_agent() {
    let everybodys = EverybodysBinary::new();
    for subcommand in ["run", "enroll", "unenroll", "status", "explain", "check"] {
        let ran = run(everybodys.command(NOBODY).args([subcommand, "--help"]));
        assert!(ran.status.success(), "{ran:?}");
        assert!(ran.stdout.contains("Usage"), "{ran:?}");
    }
    let mut explain = everybodys.command(NOBODY);
    explain
        .arg("explain")
        .args(ISTIO_DEFAULTS)
        .args(["--direction", "outbound", "--uid", "1000", "--gid", "1000"])
        .args(["--src", "10.42.0.2", "--dst", "198.51.100.7"])
        .args(["--port", "80", "--output", "json"]);
    let ran = run(&mut explain);
    assert!(ran.status.success(), "{ran:?}");
    let answer: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(answer["verdict"], "outbound");
    assert_eq!(answer["port"], 15001);
}
