//! What happens on a node, and what has to come of it.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use shunt_tests::{bpf, command::output_of, deadline::wait_until, envoy};

use crate::{
    cluster::{CNI_BIN, CNI_CONF, CONFLIST, Cluster},
    install::{self, Values},
    load::Load,
    network::OUTSIDE,
    pods::{Manifest, PORT, Pod},
};

/// A scenario: what it shows, and how.
pub(crate) struct Scenario {
    /// Its name, which says what holds.
    pub(crate) name: &'static str,
    /// Panics when it does not hold.
    pub(crate) run: fn(&Cluster),
}

macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        /// All of them, in the order in which they run: the first needs a node on
        /// which shunt has never been.
        pub(crate) const ALL: &[Scenario] = &[$(Scenario { name: stringify!($name), run: $name }),*];
    };
}

scenarios! {
    without_shunt_connections_go_past_the_proxies,
    uninstalling_leaves_nothing,
    pods_that_were_there_before_the_agent_are_redirected,
    both_ends_are_redirected,
    a_pod_reaches_itself_through_its_proxy,
    the_first_connection_is_redirected,
    nothing_passes_before_the_proxy_listens,
    pods_that_come_and_go_leave_nothing,
    a_killed_agent_leaves_no_gap,
    an_upgrade_leaves_no_gap,
    kubelet_restarts_under_load,
    the_api_server_is_away_for_a_minute,
    a_history_that_is_gone_is_read_anew,
    without_the_agent_mesh_pods_wait_and_others_do_not,
}

/// The address of the server that is in no mesh.
fn outside() -> SocketAddr {
    (OUTSIDE, PORT).into()
}

fn server(name: &str) -> Manifest {
    Manifest::in_mesh(name, &["serve", &PORT.to_string()])
}

fn caller(name: &str, servers: &[SocketAddr]) -> Manifest {
    let servers: Vec<_> = servers.iter().map(SocketAddr::to_string).collect();
    let words: Vec<_> = std::iter::once("call")
        .chain(servers.iter().map(String::as_str))
        .collect();
    Manifest::in_mesh(name, &words)
}

/// What of shunt can be seen on a node: files, and what hangs on cgroups. The
/// directories of the node's own programs change all the time and are left out, and so
/// is the empty /run/shunt: kubelet makes it, for the agent's container a mount point.
fn traces() -> BTreeSet<String> {
    let find = format!(
        "find {CNI_BIN} {CNI_CONF} /sys/fs/bpf /run -path /run/containerd -prune -o -path /run/netns -prune \
         -o -path /run/cluster -prune -o -path /run/mount -o -path /run/shunt -empty -o -print; sha256sum {CNI_CONF}/*; \
         bpftool cgroup tree {} | grep -v '^CgroupPath'",
        shunt_tests::cgroup::root().display()
    );
    let output = output_of(Command::new("sh").args(["-c", &format!("{find}; true")]));
    output.lines().map(str::to_owned).collect()
}

/// That the evidence of the others is none where nothing is redirected.
fn without_shunt_connections_go_past_the_proxies(cluster: &Cluster) {
    let server = Pod::start(cluster, &server("server"));
    let client = Pod::start(cluster, &caller("client", &[server.address(), outside()]));
    for to in [server.address(), outside()] {
        let outcome = client.outcome("application", to);
        assert!(
            outcome.error().is_none()
                && !outcome.left_through_proxy()
                && !outcome.arrived_through_proxy(),
            "{outcome:?}"
        );
    }
    Pod::delete_all([client, server]);
}

fn uninstalling_leaves_nothing(cluster: &Cluster) {
    let before = traces();
    let values = Values {
        uninstall_on_stop: true,
        ..Values::USUAL
    };
    install::install(cluster, &values);
    let pod = Pod::start(cluster, &server("uninstalled"));
    install::wait_until_enrolled(&pod);
    assert_ne!(traces(), before, "an installed agent is to be seen");

    install::remove(cluster, &values);
    assert_eq!(traces(), before);
    // The pod that was redirected is not any more: it is reached directly.
    let plain = Pod::start(
        cluster,
        &Manifest::plain("after", &["call", &pod.address().to_string()]),
    );
    let outcome = plain.outcome("application", pod.address());
    assert!(
        outcome.error().is_none() && !outcome.arrived_through_proxy(),
        "{outcome:?}"
    );
    Pod::delete_all([plain, pod]);
}

fn pods_that_were_there_before_the_agent_are_redirected(cluster: &Cluster) {
    install::remove(cluster, &Values::USUAL);
    // The plugin stays when the agent has only ended: a node that it never was on.
    let mut uninstall = Command::new(shunt_tests::agent::binary());
    uninstall.arg("uninstall");
    output_of(&mut uninstall);
    let early = Pod::start(cluster, &server("early"));
    install::install(cluster, &Values::USUAL);
    install::wait_until_enrolled(&early);
    let late = Pod::start(cluster, &caller("late", &[early.address()]));
    let outcome = late.outcome("application", early.address());
    assert!(
        outcome.left_through_proxy() && outcome.arrived_through_proxy(),
        "{outcome:?}"
    );
    Pod::delete_all([late, early]);
}

fn both_ends_are_redirected(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    let server = Pod::start(cluster, &server("server"));
    let client = Pod::start(cluster, &caller("client", &[server.address(), outside()]));
    let inside = client.outcome("application", server.address());
    assert!(
        inside.left_through_proxy() && inside.arrived_through_proxy(),
        "{inside:?}"
    );
    let outside = client.outcome("application", outside());
    assert!(
        outside.left_through_proxy() && !outside.arrived_through_proxy(),
        "{outside:?}"
    );

    // A pod of no mesh goes past shunt, and is taken by the server's proxy.
    let plain = Pod::start(
        cluster,
        &Manifest::plain("plain", &["call", &server.address().to_string()]),
    );
    let from_plain = plain.outcome("application", server.address());
    assert!(
        !from_plain.left_through_proxy() && from_plain.arrived_through_proxy(),
        "{from_plain:?}"
    );
    Pod::delete_all([plain, client, server]);
}

/// Through a service of which it is the only endpoint, and by its own address.
fn a_pod_reaches_itself_through_its_proxy(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    let words = ["both", &PORT.to_string(), &envoy::SERVICE.to_string()];
    let pod = Pod::start(cluster, &Manifest::in_mesh("itself", &words));
    let outcome = pod.outcome("application", envoy::SERVICE);
    assert!(
        outcome.left_through_proxy() && outcome.arrived_through_proxy(),
        "{outcome:?}"
    );
    let own = pod.address();
    let outcome = pod.outcome("application", own);
    assert!(
        outcome.error().is_none() && !outcome.left_through_proxy(),
        "an application that calls its own pod does so directly: {outcome:?}"
    );
    pod.delete();
}

/// Of pods that start while the agent hears of them for the first time.
fn the_first_connection_is_redirected(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    let pods = Vec::from_iter((0..5).map(|number| {
        let pod = Pod::start(cluster, &caller(&format!("first-{number}"), &[outside()]));
        let outcome = pod.outcome("application", outside());
        assert!(outcome.left_through_proxy(), "{outcome:?}");
        pod
    }));
    Pod::delete_all(pods);
}

fn nothing_passes_before_the_proxy_listens(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    let words = ["try", &outside().to_string()];
    let manifest = caller("refused", &[outside()]).first_running(&words);
    let pod = Pod::start(cluster, &manifest);
    let first = pod.outcome("first", outside());
    assert!(
        first.error().is_some_and(|error| error.contains("refused")),
        "a connection from before the proxy listens: {first:?}"
    );
    let later = pod.outcome("application", outside());
    assert!(later.left_through_proxy(), "{later:?}");
    pod.delete();
}

fn pods_that_come_and_go_leave_nothing(cluster: &Cluster) {
    const PODS: usize = 50;
    /// How many are there at once; kubelet takes 110, this machine's memory fewer.
    const AT_ONCE: usize = 10;
    install::install(cluster, &Values::USUAL);
    let status = install::status();
    let before = status["pods"].as_array().map(Vec::len);
    let entries_before = bpf::entries_by_map(&status);
    let server = Pod::start(cluster, &server("server"));
    let targets = [server.address(), outside()];
    for batch in 0..PODS / AT_ONCE {
        let pods: Vec<_> = (0..AT_ONCE)
            .map(|number| {
                Pod::create(
                    cluster,
                    &caller(&format!("one-of-many-{batch}-{number}"), &targets),
                )
            })
            .collect();
        for pod in &pods {
            pod.wait_until_ready();
            let inside = pod.outcome("application", targets[0]);
            assert!(
                inside.left_through_proxy() && inside.arrived_through_proxy(),
                "{inside:?}"
            );
            let outside = pod.outcome("application", targets[1]);
            assert!(outside.left_through_proxy(), "{outside:?}");
        }
        Pod::delete_all(pods);
    }
    server.delete();
    // As before, pod by pod and map by map.
    wait_until("the pods' entries to be gone", || {
        let now = install::status();
        let count = now["pods"].as_array().map(Vec::len);
        let entries = bpf::entries_by_map(&now);
        (count == before && entries == entries_before)
            .then_some(())
            .ok_or_else(|| format!("{before:?} {entries_before:?}, now {count:?} {entries:?}"))
    });
}

fn a_killed_agent_leaves_no_gap(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    let load = Load::start(cluster);
    install::kill_agent(cluster);
    load.finish();
}

/// To programs and maps of other types, and back: what is pinned fits neither way.
fn an_upgrade_leaves_no_gap(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    for tag in [install::OTHER, Values::USUAL.tag] {
        let load = Load::start(cluster);
        let before = install::agent_program();
        install::install(
            cluster,
            &Values {
                tag,
                ..Values::USUAL
            },
        );
        assert!(
            install::agent_program() != before,
            "it was not replaced by another"
        );
        install::status();
        load.finish();
    }
}

fn kubelet_restarts_under_load(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    let load = Load::start(cluster);
    cluster.restart_kubelet();
    let pod = Pod::start(cluster, &caller("after-kubelet", &[outside()]));
    assert!(pod.outcome("application", outside()).left_through_proxy());
    pod.delete();
    load.finish();
}

fn the_api_server_is_away_for_a_minute(cluster: &Cluster) {
    const AWAY: Duration = Duration::from_secs(60);
    install::install(cluster, &Values::USUAL);
    let load = Load::start_at(cluster, 100);
    let since = Instant::now();
    cluster.kill_apiserver();
    // The agent that comes now has nobody to ask: what is pinned and saved has to do.
    let agent = install::agent_pid();
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGKILL).expect("it runs");
    load.wait_for_more(1000);
    // That it lasts is what is tried, not how long something takes.
    thread::sleep(AWAY.saturating_sub(since.elapsed()));
    load.wait_for_more(1000);
    cluster.restart_apiserver();
    install::wait_until_rolled_out(cluster);
    let pod = Pod::start(cluster, &caller("after-the-api", &[outside()]));
    assert!(pod.outcome("application", outside()).left_through_proxy());
    pod.delete();
    load.finish();
}

/// The watch is told 410: what happened meanwhile is found out by listing.
fn a_history_that_is_gone_is_read_anew(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    let pod = Pod::start(cluster, &server("relisted"));
    let agent = install::agent_pid();
    cluster.kill_apiserver();
    cluster.restart_apiserver();
    cluster.forget_the_past();
    cluster.kill_apiserver();
    cluster.restart_apiserver();
    let uid = pod.uid();
    pod.delete();
    wait_until("the agent to be told 410", || {
        let log = install::log(cluster);
        let told = log.iter().any(|line| line.contains("has lost its place"));
        told.then_some(()).ok_or_else(|| log.join("\n"))
    });
    wait_until("the deleted pod to be forgotten", || {
        let status = install::status();
        if install::is_enrolled(&status, &uid) {
            Err(status.to_string())
        } else {
            Ok(())
        }
    });
    let pod = Pod::start(cluster, &caller("after-the-relist", &[outside()]));
    assert!(pod.outcome("application", outside()).left_through_proxy());
    pod.delete();
    assert_eq!(
        install::agent_pid(),
        agent,
        "the agent went through it without ending"
    );
}

fn without_the_agent_mesh_pods_wait_and_others_do_not(cluster: &Cluster) {
    install::install(cluster, &Values::USUAL);
    install::remove(cluster, &Values::USUAL);
    assert!(
        fs::read_to_string(CONFLIST).is_ok_and(|text| text.contains("shunt")),
        "the plugin stays when the agent goes"
    );
    let waiting = Pod::create(cluster, &caller("waiting", &[outside()]));
    let plain = Pod::start(cluster, &Manifest::plain("not-waiting", &["stay"]));
    wait_until("kubelet to say why the pod waits", || {
        let events = waiting.events();
        let said = events
            .iter()
            .any(|event| event.starts_with("FailedCreatePodSandBox") && event.contains("shunt"));
        said.then_some(()).ok_or_else(|| events.join("\n"))
    });
    assert!(!waiting.has_started(), "it has an address");
    install::install(cluster, &Values::USUAL);
    waiting.wait_until_ready();
    assert!(
        waiting
            .outcome("application", outside())
            .left_through_proxy()
    );
    Pod::delete_all([waiting, plain]);
}
