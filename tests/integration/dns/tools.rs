//! Programs that people resolve names with.

use std::{fs, path::Path};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use shunt_tests::{
    Owner,
    agent::{Ran, run},
    dns::NAME,
};

use super::{PROXY, RESOLVER, SECOND, STRANGER, World, resolvers, same_with_rules};

/// Runs a program of an application in the pod, with this resolv.conf.
fn run_with(world: &World, resolv_conf: &Path, program: &str, args: &[&str]) -> Ran {
    let netns = world.pod.netns();
    netns.run(|| {
        // A thread of its own has a file system of its own.
        unshare(CloneFlags::CLONE_NEWNS).expect("root may");
        remount("none", "/", MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        let from = resolv_conf.to_str().expect("a path of this test");
        remount(from, "/etc/resolv.conf", MsFlags::MS_BIND);
        run(netns.command(program, Owner::APP).args(args))
    })
}

fn remount(from: &str, to: &str, flags: MsFlags) {
    mount(Some(from), to, None::<&str>, flags, None::<&str>)
        .unwrap_or_else(|error| panic!("cannot mount {from} on {to}: {error}"));
}

/// The same, with the resolv.conf that the pod is enrolled with; what it wrote.
fn output(world: &World, program: &str, args: &[&str]) -> String {
    let ran = run_with(world, &world.resolv_conf(), program, args);
    assert!(ran.status.success(), "{program} {args:?}: {ran:?}");
    ran.stdout
}

/// The resolver of the C library.
fn getent(world: &World, options: &str) -> String {
    let resolv_conf = world.directory.path().join("with-options");
    let text = resolvers().resolv_conf() + options;
    fs::write(&resolv_conf, text).expect("a file of this test");
    let args = ["--service=dns", "ahosts", NAME];
    let ran = run_with(world, &resolv_conf, "getent", &args);
    assert!(ran.status.success(), "getent: {ran:?}");
    let first = ran.stdout.split_whitespace().next();
    first.unwrap_or_default().to_owned()
}

#[test]
fn glibc_hears_the_proxy() {
    let heard = same_with_rules(&resolvers(), |world| {
        [
            getent(world, ""),
            getent(world, "options use-vc\n"),
            getent(world, "options rotate\n"),
            getent(world, "options single-request-reopen edns0\n"),
        ]
    });
    assert_eq!(heard, [(); 4].map(|()| PROXY.to_string()));
}

/// The answer and the server, as `dig` shows them.
fn dig(world: &World, args: &[&str]) -> Vec<String> {
    let options = ["+tries=1", "+time=15", "+noall", "+answer", "+stats"];
    let output = output(world, "dig", &[&options, args].concat());
    output
        .lines()
        // `reply from unexpected source` would be one, too.
        .filter(|line| !line.is_empty() && !line.contains("Query time:"))
        .filter(|line| !line.contains("WHEN:") && !line.contains("MSG SIZE"))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn dig_hears_the_proxy_for_the_resolvers_and_nobody_else() {
    let says = |answer, server, protocol: &str| {
        [
            format!("{NAME}. 0 IN A {answer}"),
            format!(";; SERVER: {server}#53({server}) ({protocol})"),
        ]
    };
    let (one, two) = (format!("@{RESOLVER}"), format!("@{SECOND}"));
    let stranger = format!("@{STRANGER}");
    let heard = same_with_rules(&resolvers(), |world| {
        [
            dig(world, &[NAME]),
            dig(world, &[&one, NAME]),
            dig(world, &["+tcp", &one, NAME]),
            dig(world, &[&one, &two, NAME]),
            dig(world, &[NAME, &one, NAME]),
            dig(world, &["-b", "0.0.0.0", &two, NAME]),
            dig(world, &[&stranger, NAME]),
        ]
        .concat()
    });
    let expected = [
        says(PROXY, RESOLVER, "UDP"),
        says(PROXY, RESOLVER, "UDP"),
        says(PROXY, RESOLVER, "TCP"),
        says(PROXY, RESOLVER, "UDP"),
        says(PROXY, RESOLVER, "UDP"),
        says(PROXY, RESOLVER, "UDP"),
        says(PROXY, SECOND, "UDP"),
        says(STRANGER, STRANGER, "UDP"),
    ];
    assert_eq!(heard, expected.concat());
}

#[test]
fn busybox_hears_the_proxy() {
    let heard = same_with_rules(&resolvers(), |world| {
        [
            output(world, "busybox", &["nslookup", "-type=a", NAME]),
            output(
                world,
                "busybox",
                &["nslookup", "-type=a", NAME, &SECOND.to_string()],
            ),
            output(
                world,
                "busybox",
                &["nslookup", "-type=a", NAME, &STRANGER.to_string()],
            ),
        ]
    });
    let expected = [(RESOLVER, PROXY), (SECOND, PROXY), (STRANGER, STRANGER)];
    for (heard, (server, answer)) in heard.iter().zip(expected) {
        let lines: Vec<_> = heard.split_whitespace().collect();
        assert!(lines.contains(&server.to_string().as_str()), "{heard}");
        assert!(lines.contains(&answer.to_string().as_str()), "{heard}");
    }
}
