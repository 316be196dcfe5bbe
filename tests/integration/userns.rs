//! Pods with a user namespace of their own, in which users have other numbers
//! than on the node.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::Command,
};

use nix::sched::{CloneFlags, setns};
use shunt_tests::{
    Node, Owner, Probe, Process, Responder, agent::run, command::output_of, connect_all_here,
    deadline::wait_until, netns::node_command,
};

use crate::lab::{Lab, PORT};

/// The node's number of the pod's uid 0.
const UIDS: u32 = 100_000;
/// The node's number of the pod's gid 0.
const GIDS: u32 = 200_000;

/// A process with a user namespace and, owned by that, a network namespace.
struct Sandbox {
    _holder: Process,
    proc: PathBuf,
}

impl Sandbox {
    /// One on the node's bridge.
    fn new(node: &Node) -> Self {
        let mut command = node_command("unshare");
        // It says who it is once it is in its namespaces.
        command.args([
            "--user",
            "--net",
            "sh",
            "-c",
            "echo pid $$; exec sleep 1000",
        ]);
        let holder = Process::spawn("sandbox", &mut command);
        let line = wait_until("the sandbox", || {
            let output = holder.output();
            let line = output.lines().find_map(|line| line.split_once("pid "));
            line.map(|(_, pid)| pid.trim().to_owned()).ok_or(output)
        });
        let proc = PathBuf::from("/proc").join(&line);
        let ids = |file: &str, first: u32| {
            fs::write(proc.join(file), format!("0 {first} 65536\n")).expect("a map of ids");
        };
        ids("uid_map", UIDS);
        ids("gid_map", GIDS);
        node.netns().ip(&format!(
            "link add sandbox type veth peer name eth0 netns {line}\n\
             link set sandbox master br0 up\n"
        ));
        let ip = "ip link set lo up && ip addr add 10.42.0.200/24 dev eth0 && \
                  ip link set eth0 up && ip route add default via 10.42.0.1";
        output_of(Command::new("nsenter").args(["--target", &line, "--net", "sh", "-c", ip]));
        Self {
            _holder: holder,
            proc,
        }
    }

    fn netns(&self) -> PathBuf {
        self.proc.join("ns/net")
    }

    /// Who answers when a user of the node's number calls the host outside.
    fn outbound(&self, lab: &Lab, owner: Owner) -> String {
        let netns = File::open(self.netns()).expect("the sandbox is there");
        // First to the node, for its cgroup.
        lab.node.netns().run(|| {
            setns(&netns, CloneFlags::CLONE_NEWNET).expect("this is root");
            let _proxy = Responder::start_here("sandbox", Owner::ROOT, &[15001]);
            let call = Probe::new(owner, (Node::OUTSIDE, PORT));
            let (answer, _) = connect_all_here(&[call]).remove(0);
            answer.outcome.to_string()
        })
    }
}

#[test]
fn the_ids_of_the_settings_are_the_pods_own() {
    let lab = Lab::new();
    let sandbox = Sandbox::new(&lab.node);
    let agent = lab.agent();
    let enrol = |flags: &[&str]| {
        let ran = run(&mut agent.enroll_command(&sandbox.netns(), flags));
        assert!(ran.status.success(), "{}", ran.stderr);
    };
    let of_pod = |uid: u32, gid: u32| Owner::new(UIDS + uid, GIDS + gid);

    enrol(&["-u", "1337", "-g", "1337", "-i", "*"]);
    assert_eq!(sandbox.outbound(&lab, of_pod(1000, 1000)), "sandbox:15001");
    assert_eq!(sandbox.outbound(&lab, of_pod(1337, 1000)), "node:80");
    assert_eq!(sandbox.outbound(&lab, of_pod(1000, 1337)), "node:80");
    // The node's own 1337 is nobody in the pod.
    assert_eq!(sandbox.outbound(&lab, Owner::PROXY), "sandbox:15001");

    // Nor has an id that the pod cannot have any owner.
    enrol(&["-u", "70000", "-g", "70000", "-i", "*"]);
    for owner in [of_pod(1337, 1337), of_pod(70_000, 70_000), Owner::ROOT] {
        assert_eq!(sandbox.outbound(&lab, owner), "sandbox:15001", "{owner}");
    }

    enrol(&[
        "-u",
        "1",
        "-g",
        "1",
        "-i",
        "*",
        "--outbound-owner-groups",
        "5",
    ]);
    assert_eq!(sandbox.outbound(&lab, of_pod(1000, 5)), "sandbox:15001");
    assert_eq!(sandbox.outbound(&lab, of_pod(1000, 6)), "node:80");
}

#[test]
fn a_sandbox_that_ends_is_forgotten() {
    let lab = Lab::new();
    let agent = lab.agent();
    let sandbox = Sandbox::new(&lab.node);
    let ran = run(&mut agent.enroll_command(&sandbox.netns(), &["-i", "*"]));
    assert!(ran.status.success(), "{}", ran.stderr);
    drop(sandbox);
    wait_until("the agent to notice", || {
        let status = agent.status();
        match status["pods"].as_array().map(Vec::len) {
            Some(0) => Ok(()),
            _ => Err(status.to_string()),
        }
    });
}
