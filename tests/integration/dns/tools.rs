//! Programs that people resolve names with.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use shunt_tests::{
    Owner,
    agent::{Ran, run},
    dns::{Capture, NAME},
};

use super::{
    PROXY, RESOLVER, SECOND, STRANGER, World, addresses, ipv6, resolvers, same_with_rules,
};

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

/// The resolver of the C library, with these servers.
fn getent(world: &World, servers: &[IpAddr], options: &str) -> String {
    let resolv_conf = world.directory.path().join("with-options");
    let capture = Capture {
        resolvers: servers.to_vec(),
        ..Capture::default()
    };
    let text = capture.resolv_conf() + options;
    fs::write(&resolv_conf, text).expect("a file of this test");
    let args = ["--service=dns", "ahosts", NAME];
    let ran = run_with(world, &resolv_conf, "getent", &args);
    assert!(ran.status.success(), "getent: {ran:?}");
    let first = ran.stdout.split_whitespace().next();
    first.unwrap_or_default().to_owned()
}

#[test]
fn glibc_hears_the_proxy() {
    let options = [
        "",
        "options use-vc\n",
        "options rotate\n",
        "options single-request-reopen edns0\n",
    ];
    let all = addresses(RESOLVER);
    same_with_rules(&resolvers(), |world| {
        for servers in [&all[..1], &all[1..], &all] {
            for options in options {
                let answer = getent(world, servers, options);
                assert_eq!(answer, PROXY.to_string(), "{servers:?} {options}");
            }
        }
    });
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
    let says = |answer: Ipv4Addr, server: IpAddr, protocol: &str| {
        [
            format!("{NAME}. 0 IN A {answer}"),
            format!(";; SERVER: {server}#53({server}) ({protocol})"),
        ]
    };
    let (one, two) = (format!("@{RESOLVER}"), format!("@{SECOND}"));
    let of_stranger = format!("@{STRANGER}");
    let second6 = IpAddr::from(ipv6(SECOND).expect("it has one"));
    let of_ipv6 = format!("@{second6}");
    let [resolver, second, stranger] = [RESOLVER, SECOND, STRANGER].map(IpAddr::from);
    let heard = same_with_rules(&resolvers(), |world| {
        [
            dig(world, &[NAME]),
            dig(world, &[&one, NAME]),
            dig(world, &["+tcp", &one, NAME]),
            dig(world, &[&one, &two, NAME]),
            dig(world, &[NAME, &one, NAME]),
            dig(world, &["-b", "0.0.0.0", &two, NAME]),
            dig(world, &[&of_ipv6, NAME]),
            dig(world, &["+tcp", &of_ipv6, NAME]),
            dig(world, &["-b", "::", &of_ipv6, NAME]),
            dig(world, &[&of_stranger, NAME]),
        ]
        .concat()
    });
    let expected = [
        says(PROXY, resolver, "UDP"),
        says(PROXY, resolver, "UDP"),
        says(PROXY, resolver, "TCP"),
        says(PROXY, resolver, "UDP"),
        says(PROXY, resolver, "UDP"),
        says(PROXY, resolver, "UDP"),
        says(PROXY, second, "UDP"),
        says(PROXY, second6, "UDP"),
        says(PROXY, second6, "TCP"),
        says(PROXY, second6, "UDP"),
        says(STRANGER, stranger, "UDP"),
    ];
    assert_eq!(heard, expected.concat());
}

#[test]
fn busybox_hears_the_proxy() {
    let nslookup = ["nslookup", "-type=a", NAME];
    let asked = [(RESOLVER, PROXY), (SECOND, PROXY), (STRANGER, STRANGER)];
    same_with_rules(&resolvers(), |world| {
        for (server, answer) in asked {
            for server in addresses(server) {
                let server = server.to_string();
                let args = [&nslookup[..], &[&server]].concat();
                let heard = output(world, "busybox", &args);
                assert!(heard.contains(&server), "{heard}");
                assert!(heard.contains(&answer.to_string()), "{heard}");
            }
        }
        // Whom the resolv.conf names.
        let heard = output(world, "busybox", &nslookup);
        assert!(heard.contains(&RESOLVER.to_string()), "{heard}");
        assert!(heard.contains(&PROXY.to_string()), "{heard}");
    });
}
