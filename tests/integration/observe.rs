//! What the agent says of itself: metrics and health over HTTP, and its log.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use serde_json::Value;
use shunt_tests::{
    Agent, Netns, Node, Owner, Pod, Probe, Process,
    agent::Place,
    bpf,
    command::output_of,
    connect_all,
    deadline::{DEADLINE, wait_until},
    header_options::HeaderOptions,
    http::{Response, get_from_here},
    mesh::ISTIO_DEFAULTS,
    probe_all,
};

use crate::lab::{Lab, PORT};

/// The agent listens here, at a port that the kernel chooses.
const SOMEWHERE: &str = "127.0.0.1:0";

/// Where it listens, as its log says.
fn address(log: &str) -> SocketAddr {
    let line = log
        .lines()
        .find(|line| line.contains("serving health and metrics"))
        .unwrap_or_else(|| panic!("it does not listen:\n{log}"));
    let (_, address) = line.split_once("address=").expect("it has an address");
    address.trim().parse().expect("an address and a port")
}

/// An agent of the lab that is asked over HTTP.
struct Observed {
    agent: Agent,
    address: SocketAddr,
}

impl Observed {
    fn start(lab: &Lab) -> Self {
        let place = Place::new(lab.node.cgroup());
        let agent = Agent::start_with(place, &["--listen", SOMEWHERE]);
        let address = address(&agent.log());
        Self { agent, address }
    }

    fn enrolled(lab: &Lab) -> Self {
        let observed = Self::start(lab);
        observed.agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
        observed
    }

    fn get(&self, path: &str) -> Response {
        get_from_here(&format!("http://{}{path}", self.address)).expect("it answers")
    }

    fn metrics(&self) -> BTreeMap<String, f64> {
        let page = self.get("/metrics");
        assert_eq!(page.status, 200);
        assert!(page.body.ends_with("# EOF\n"), "it is cut:\n{}", page.body);
        let lines = page.body.lines().filter(|line| !line.starts_with('#'));
        lines
            .map(|line| {
                let (series, value) = line.rsplit_once(' ').expect("a series has a value");
                (series.to_owned(), value.parse().expect("a number"))
            })
            .collect()
    }

    /// Waits until these series have these values: figures may be half a second old.
    #[track_caller]
    fn wait_for(&self, wanted: &[(&str, f64)]) {
        self.wait_with_strays(wanted, || 0);
    }

    /// The same where so many packets may have come to the pod when their connection was
    /// gone, which are counted as inbound connections, too.
    #[track_caller]
    fn wait_with_strays(&self, wanted: &[(&str, f64)], strays: impl Fn() -> u32) {
        wait_until("the metrics", || {
            let metrics = self.metrics();
            let strays = f64::from(strays());
            for (series, value) in wanted {
                let inbound = series.contains("direction=\"inbound\"");
                let most = value + if inbound { strays } else { 0.0 };
                let found = metrics.get(*series);
                if !found.is_some_and(|found| (*value..=most).contains(found)) {
                    return Err(format!("{series} is {found:?} and not {value} to {most}"));
                }
            }
            Ok(())
        });
    }
}

/// How many resets a pod has sent, beside those of connections that were refused. As a rule each
/// answers a packet without a connection: a last acknowledgement, for one, that is sent again when
/// the machine is busy.
fn strays(pod: &Pod, refused: u32) -> u32 {
    let resets = pod.netns().tcp_counters()["OutRsts"];
    u32::try_from(resets)
        .expect("they are few")
        .saturating_sub(refused)
}

/// So many connections of applications, each with what became of it.
fn call(from: &Netns, to: IpAddr, times: usize) -> Vec<String> {
    let probes = vec![Probe::new(Owner::APP, (to, PORT)); times];
    let answers = probe_all(from, &probes);
    answers.iter().map(|a| a.outcome.to_string()).collect()
}

const OUTBOUND: &str = "shunt_connections_total{direction=\"outbound\",verdict=\"outbound\"}";
const OUTBOUND_DIRECT: &str = "shunt_connections_total{direction=\"outbound\",verdict=\"direct\"}";
const INBOUND: &str = "shunt_connections_total{direction=\"inbound\",verdict=\"inbound\"}";
const AWAY_OUTBOUND: &str = "shunt_proxy_away_refusals_total{direction=\"outbound\"}";
const AWAY_INBOUND: &str = "shunt_proxy_away_refusals_total{direction=\"inbound\"}";
const ENROLLED: &str = "shunt_pods_enrolled";
const DONE: &str = "shunt_enrolments_total{outcome=\"done\"}";
const FAILED: &str = "shunt_enrolments_total{outcome=\"failed\"}";

#[test]
fn metrics_count_what_has_happened_and_nothing_else() {
    let lab = Lab::new();
    let observed = Observed::enrolled(&lab);
    let proxy = lab.proxy();
    assert_eq!(call(lab.pod.netns(), Node::OUTSIDE, 20), ["pod:15001"; 20]);
    assert_eq!(call(lab.node.netns(), lab.pod.ip(), 15), ["pod:15006"; 15]);
    // To itself, which no rule captures.
    assert_eq!(call(lab.pod.netns(), lab.pod.ip(), 3), ["pod:80"; 3]);
    let came_through = [
        (OUTBOUND, 20.0),
        (OUTBOUND_DIRECT, 3.0),
        (INBOUND, 15.0),
        (AWAY_OUTBOUND, 0.0),
        (AWAY_INBOUND, 0.0),
        (ENROLLED, 1.0),
        (DONE, 1.0),
        (FAILED, 0.0),
        ("shunt_map_entries{map=\"PODS\"}", 1.0),
    ];
    observed.wait_with_strays(&came_through, || strays(&lab.pod, 0));

    drop(proxy);
    assert_eq!(call(lab.pod.netns(), Node::OUTSIDE, 7), ["refused"; 7]);
    assert_eq!(call(lab.node.netns(), lab.pod.ip(), 9), ["refused"; 9]);
    let with_refused = [
        (OUTBOUND, 27.0),
        (INBOUND, 24.0),
        (AWAY_OUTBOUND, 7.0),
        (AWAY_INBOUND, 9.0),
    ];
    let strays = || strays(&lab.pod, 7 + 9);
    observed.wait_with_strays(&with_refused, strays);

    // What a pod has counted stays when it goes, and when it comes again.
    observed.agent.unenroll(lab.pod.netns());
    assert_eq!(call(lab.pod.netns(), Node::OUTSIDE, 2), ["node:80"; 2]);
    let place_that_is_none = observed
        .agent
        .enroll_command("/run/netns/there-is-none".as_ref(), &ISTIO_DEFAULTS)
        .output()
        .expect("it can be started");
    assert!(!place_that_is_none.status.success());
    observed.wait_with_strays(&with_refused, strays);
    observed.wait_for(&[(ENROLLED, 0.0), (DONE, 1.0), (FAILED, 1.0)]);
    observed.agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    let _proxy = lab.proxy();
    assert_eq!(call(lab.pod.netns(), Node::OUTSIDE, 1), ["pod:15001"]);
    observed.wait_for(&[
        (OUTBOUND, 28.0),
        (AWAY_OUTBOUND, 7.0),
        (ENROLLED, 1.0),
        (DONE, 2.0),
        (FAILED, 1.0),
    ]);
}

/// The hook for what comes to a pod does not tell a first packet from another without a socket.
#[test]
fn what_comes_when_its_connection_is_gone_counts_as_another_connection() {
    let lab = Lab::new();
    let observed = Observed::enrolled(&lab);
    let _proxy = lab.proxy();
    let probe = Probe::new(Owner::APP, (lab.pod.ip(), PORT));
    let (answer, stream) = connect_all(lab.node.netns(), &[probe]).remove(0);
    let mut stream = stream.expect("the proxy answers");
    observed.wait_with_strays(&[(INBOUND, 1.0)], || strays(&lab.pod, 0));

    // The pod forgets the socket, and nobody hears of it.
    let client = answer.sockname.expect("it is connected");
    let mute = format!("blackhole {}", client.ip());
    lab.pod.netns().ip(&format!("route add {mute}"));
    let mut kill = lab.pod.netns().command("ss", Owner::ROOT);
    output_of(kill.args(["-K", "dport", "=", &format!(":{}", client.port())]));
    lab.pod.netns().ip(&format!("route del {mute}"));
    // The reset that did not get there counts, too.
    let before = strays(&lab.pod, 0);

    stream.write_all(b"secret").expect("it is still open");
    let error = stream.read_exact(&mut [0]).expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let strays = || strays(&lab.pod, 0);
    observed.wait_with_strays(&[(INBOUND, 2.0)], strays);
    assert!(strays() > before);
}

/// It needs no help on its way: no decision, and none to be counted.
#[test]
fn what_stays_at_loopback_is_decided_over_once() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let loopback = IpAddr::from([127, 0, 0, 1]);
    assert_eq!(call(lab.pod.netns(), loopback, 2), ["pod:80"; 2]);
    assert_eq!(call(lab.pod.netns(), lab.pod.ip(), 3), ["pod:80"; 3]);
    let rules = agent.status()["pods"][0]["counters"]["rules"].clone();
    let inbound = rules["inbound 0"].as_u64().unwrap_or(0);
    let strays = u64::from(strays(&lab.pod, 0));
    assert!((3..=3 + strays).contains(&inbound), "{rules}");
    let counts = rules.as_object().expect("rules have counts").values();
    let all: u64 = counts.filter_map(Value::as_u64).sum();
    assert_eq!(all - inbound, 2 + 3, "{rules}");
}

/// The socket of an answer to a SYN is none that programs may look into, and some kernels say
/// otherwise: what is asked of them because of another program must not matter.
#[test]
fn options_of_headers_of_a_listener_do_not_matter() {
    let lab = Lab::new();
    let other = HeaderOptions::attach(lab.node.cgroup().path());
    let _agent = lab.enrolled();
    let _proxy = lab.proxy();
    let before = other.asked();
    lab.assert_redirected();
    assert!(other.asked() > before);
}

/// IPv6 is sent to the pod's own address, and refused by another program: it is the
/// same refusal, and one.
#[test]
fn a_refused_connection_over_ipv6_counts_once() {
    let node = Node::new();
    let pod = node.pod_with("pod", shunt_tests::Stack::Dual);
    let place = Place::new(node.cgroup());
    let agent = Agent::start_with(place, &["--listen", SOMEWHERE]);
    let observed = Observed {
        address: address(&agent.log()),
        agent,
    };
    let flags = [&ISTIO_DEFAULTS[..], &["--dual-stack"]].concat();
    observed.agent.enroll(pod.netns(), &flags);
    assert_eq!(call(pod.netns(), Node::OUTSIDE6, 4), ["refused"; 4]);
    observed.wait_for(&[(OUTBOUND, 4.0), (AWAY_OUTBOUND, 4.0), (AWAY_INBOUND, 0.0)]);
}

/// From the first moment in which it listens: not ready, with a reason, and then
/// ready, not before its programs are attached.
#[test]
fn it_is_ready_when_everything_is_attached() {
    let lab = Lab::new();
    let place = Place::new(lab.node.cgroup());
    let mut command = place.run_command();
    command.args(["--listen", SOMEWHERE]);
    let process = Process::spawn("shunt run", &mut command);
    process.wait_for_line("serving health and metrics", DEADLINE);
    let url = format!("http://{}", address(&process.output()));
    wait_until("the agent to be ready", || {
        let ready = get_from_here(&format!("{url}/readyz"))?;
        let attached = bpf::attached_to_cgroup(lab.node.cgroup().path());
        if ready.status == 200 {
            assert!(attached > 0, "it is ready and nothing is attached");
            return Ok(());
        }
        assert_eq!(ready.status, 503);
        assert_eq!(ready.body, "attached: the programs are being loaded\n");
        let health = get_from_here(&format!("{url}/healthz"))?;
        assert_eq!(health.status, 200, "it starts, and is well: {health:?}");
        Err(ready.body)
    });
    assert!(process.stop().success());
    assert!(get_from_here(&format!("{url}/healthz")).is_err());
}

#[test]
fn metrics_can_be_read_while_pods_come_and_go_under_load() {
    const READERS: usize = 4;
    let lab = Lab::new();
    let observed = Observed::enrolled(&lab);
    let _proxy = lab.proxy();
    let neighbour = lab.node.pod("neighbour");
    let done = AtomicBool::new(false);
    let sent = thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut sent = 0;
            while !done.load(Ordering::Relaxed) {
                let answers = call(lab.pod.netns(), Node::OUTSIDE, 16);
                assert_eq!(answers, ["pod:15001"; 16]);
                sent += answers.len();
            }
            sent
        });
        let churn = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                observed.agent.enroll(neighbour.netns(), &ISTIO_DEFAULTS);
                observed.agent.unenroll(neighbour.netns());
            }
        });
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                scope.spawn(|| {
                    let mut before = 0.0;
                    for _ in 0..25 {
                        let now = observed.metrics()[OUTBOUND];
                        assert!(now >= before, "{OUTBOUND} fell from {before} to {now}");
                        before = now;
                        assert_eq!(observed.get("/healthz").status, 200);
                        assert_eq!(observed.get("/readyz").status, 200);
                    }
                })
            })
            .collect();
        let read: Vec<_> = readers.into_iter().map(|reader| reader.join()).collect();
        done.store(true, Ordering::Relaxed);
        churn.join().expect("pods come and go");
        for reader in read {
            reader.expect("every answer is whole");
        }
        load.join().expect("every connection is redirected")
    });
    observed.wait_for(&[(OUTBOUND, sent as f64), (AWAY_OUTBOUND, 0.0)]);
}

/// At debug every program that decides says so; all of them load with it.
#[test]
fn decisions_are_in_the_log_at_debug() {
    let lab = Lab::new();
    lab.pod
        .netns()
        .ip("link add vm0 type bridge\nlink set vm0 up\n");
    let place = Place::new(lab.node.cgroup());
    let agent = Agent::start_logging(place, "info,shunt::bpf=debug", &["--splice", "auto"]);
    let flags = [&ISTIO_DEFAULTS[..], &["-k", "vm0"]].concat();
    agent.enroll(lab.pod.netns(), &flags);
    let _proxy = lab.proxy();
    lab.assert_redirected();
    let cookie = agent.status()["pods"][0]["cookie"].to_string();
    let pod = lab.pod.ip();
    for (direction, rule, verdict, source, destination) in [
        (
            "outbound",
            "outbound 11",
            "outbound",
            Some(pod),
            Node::OUTSIDE,
        ),
        ("inbound", "inbound 4", "inbound", None, pod),
        ("outbound", "outbound 4a", "inbound", Some(pod), pod),
    ] {
        let parts = [
            format!("direction=\"{direction}\""),
            format!("rule=\"{rule}\""),
            format!("verdict=\"{verdict}\""),
            source.map_or_else(String::new, |source| format!("source={source} ")),
            format!("destination={destination} port={PORT} "),
            format!("cookie={cookie}"),
        ];
        wait_until("the decision in the log", || {
            let log = agent.log();
            let found = log
                .lines()
                .filter(|line| line.contains("shunt::bpf"))
                .any(|line| parts.iter().all(|part| line.contains(part)));
            found.then_some(()).ok_or(format!("no {parts:?} in\n{log}"))
        });
    }
}

#[test]
fn no_decision_is_in_the_log_at_info() {
    let lab = Lab::new();
    let agent = Agent::start_logging(Place::new(lab.node.cgroup()), "info", &[]);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    let _proxy = lab.proxy();
    lab.assert_redirected();
    // What it is told comes after what the programs would have said.
    assert!(agent.errors("proxy_away") == 0);
    assert!(!agent.log().contains("shunt::bpf"), "{}", agent.log());
}

#[test]
fn the_log_is_json_where_that_is_asked_for() {
    let lab = Lab::new();
    let place = Place::new(lab.node.cgroup());
    let agent = Agent::start_logging(place, "debug", &["--log-format", "json"]);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    let _proxy = lab.proxy();
    lab.assert_redirected();
    let path = lab.pod.netns().path();
    let line = |wanted: &str| {
        wait_until(wanted, || {
            let log = agent.log();
            let lines = log.lines().filter(|line| !line.contains(" ready: serving"));
            let mut lines = lines.map(|line| {
                let line: Value = serde_json::from_str(line)
                    .unwrap_or_else(|error| panic!("no JSON ({error}): {line}"));
                assert!(line["timestamp"].is_string() && line["level"].is_string());
                line
            });
            let found = lines.find(|line| line["message"] == wanted);
            found.ok_or_else(|| log.clone())
        })
    };
    let enrolled = line("enrolled");
    assert_eq!(enrolled["netns"].as_str(), path.to_str());
    assert!(enrolled["cookie"].is_u64(), "{enrolled}");
    let decided = line("the destination is in a captured range (-i)");
    assert_eq!(decided["target"], "shunt::bpf");
    assert_eq!(decided["rule"], "outbound 11");
    assert_eq!(decided["uid"].as_u64(), Some(Owner::APP.uid.into()));
}
