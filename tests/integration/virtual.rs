//! A virtual machine behind a pod: what it sends through the pod's virtual
//! interface (`-k`), side by side with the mesh's rules in the kernel.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use shunt_istio_rules::{Capture, Rules};
use shunt_tests::{
    Agent, Answer, Greeting, Netns, Node, Outcome, Owner, Pod, Probe, Responder, Source, bpf,
    command::output_of, connect_all, deadline::wait_until, iptables, probe::DEADLINE, probe_all,
};
use socket2::{Domain, SockRef, Socket, Type};

/// Ports that rules speak of, and two that none does.
const PORTS: [u16; 9] = [22, 53, 80, 8080, 15001, 15006, 15008, 15020, 15021];
/// The machine.
const MACHINE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 44, 0, 2));
/// The pod, as the machine sees it.
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 44, 0, 1));
/// A host that there is not.
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// A host outside, by IPv6.
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 7);
/// The machine, by IPv6.
const MACHINE6: Ipv6Addr = Ipv6Addr::new(0xfd44, 0, 0, 0, 0, 0, 0, 2);
/// What Istio is asked for.
const SETTINGS: [&str; 6] = ["-i", "*", "-b", "*", "-k", "vif0"];

/// A pod with a machine behind it, and the hosts outside.
struct World {
    agent: Option<Agent>,
    _outside: Responder,
    machine: Netns,
    pod: Pod,
    node: Node,
}

impl World {
    /// Nothing is redirected, and the pod has no virtual interface yet.
    fn unplugged() -> Self {
        let node = Node::new();
        let pod = node.pod("pod");
        for parameter in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            pod.sysctl(parameter, "1");
        }
        node.netns().ip(&format!(
            "route add 10.44.0.0/24 via {}\n\
             addr add fd42::1/64 dev br0 nodad\n\
             addr add {OUTSIDE6}/128 dev lo nodad\n\
             route add fd44::/64 via fd42::2\n",
            pod.ip()
        ));
        pod.netns().ip("addr add fd42::2/64 dev eth0 nodad\n\
             route add default via fd42::1\n");
        Self {
            agent: None,
            _outside: Responder::start(node.netns(), Owner::APP, &PORTS),
            machine: node.machine("machine"),
            pod,
            node,
        }
    }

    /// The machine hangs on the pod.
    fn plain() -> Self {
        let world = Self::unplugged();
        world.plug();
        world
    }

    fn plug(&self) {
        self.pod.netns().ip(&format!(
            "link add vif0 type veth peer name eth0 netns {}\n\
             addr add {GATEWAY}/24 dev vif0\n\
             addr add fd44::1/64 dev vif0 nodad\n\
             link set vif0 up\n",
            self.machine.name()
        ));
        self.machine.ip(&format!(
            "addr add {MACHINE}/24 dev eth0\n\
             addr add {MACHINE6}/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via {GATEWAY}\n\
             route add default via fd44::1\n",
        ));
    }

    /// With the rules that Istio writes.
    fn with_rules(rules: &Rules) -> Self {
        let world = Self::plain();
        world.restore(rules);
        world
    }

    fn restore(&self, rules: &Rules) {
        iptables::restore(self.pod.netns(), &rules.ipv4());
        iptables::restore6(self.pod.netns(), &rules.ipv6());
    }

    /// With an agent that has enrolled the pod.
    fn enrolled(settings: &[&str]) -> Self {
        Self::plain().enrol(settings)
    }

    fn enrol(self, settings: &[&str]) -> Self {
        let agent = Agent::start(self.node.cgroup());
        agent.enroll(self.pod.netns(), settings);
        Self {
            agent: Some(agent),
            ..self
        }
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("it is enrolled")
    }

    fn proxy(&self) -> Responder {
        Responder::start(self.pod.netns(), Owner::PROXY, &[15001, 15006])
    }

    /// What the machine sees when it calls.
    fn call(&self, to: impl Into<SocketAddr>) -> String {
        seen(&probe_all(&self.machine, &[Probe::new(Owner::APP, to)])[0])
    }

    /// The machine's connection to the host outside, kept open.
    fn connection(&self) -> TcpStream {
        let probe = Probe::new(Owner::APP, (Node::OUTSIDE, 80));
        let (answer, stream) = connect_all(&self.machine, &[probe]).remove(0);
        stream.unwrap_or_else(|| panic!("nobody answered: {answer:?}"))
    }

    /// The errors that the programs have counted.
    fn errors(&self) -> serde_json::Value {
        self.agent().status()["pods"][0]["counters"]["errors"].clone()
    }
}

fn istio() -> Rules {
    Rules {
        interfaces_virtual: vec!["vif0".to_owned()],
        inbound_ports: Capture::All,
        outbound_ranges: Capture::All,
        ..Rules::default()
    }
}

/// What both ends see of a connection, without what is chance.
fn seen(answer: &Answer) -> String {
    match &answer.outcome {
        Outcome::Answered(greeting) => format!(
            "{} sees {}, asked for {}, known: {}; the client sees {:?}",
            answer.outcome,
            greeting.peer.ip(),
            greeting.destination(),
            greeting.knows_destination(),
            answer.peername,
        ),
        Outcome::Refused | Outcome::Closed | Outcome::Silent | Outcome::Failed(_) => {
            answer.outcome.to_string()
        }
    }
}

fn probes() -> Vec<Probe> {
    [
        Node::OUTSIDE,
        Node::FAR_OUTSIDE,
        Node::GATEWAY,
        NOWHERE,
        Node::FIRST_POD,
        GATEWAY,
    ]
    .into_iter()
    .flat_map(|ip| PORTS.map(|port| Probe::new(Owner::APP, (ip, port))))
    .collect()
}

fn answers(world: &World) -> Vec<String> {
    answers_to(world, &probes())
}

fn answers_to(world: &World, probes: &[Probe]) -> Vec<String> {
    let answers = probe_all(&world.machine, probes);
    let text = |(probe, answer): (&Probe, &Answer)| format!("{probe}: {}", seen(answer));
    probes.iter().zip(&answers).map(text).collect()
}

#[test]
fn a_machines_connections_reach_the_proxy_as_with_rules() {
    let real = World::with_rules(&istio());
    let enrolled = World::enrolled(&SETTINGS);
    let proxies = [real.proxy(), enrolled.proxy()];
    assert_eq!(answers(&real), answers(&enrolled));
    assert_eq!(
        enrolled.call((Node::OUTSIDE, 80)),
        "pod:15001 sees 10.44.0.2, asked for 198.51.100.7:80, known: true; \
         the client sees Some(198.51.100.7:80)"
    );
    drop(proxies);
    assert_eq!(answers(&real), answers(&enrolled));
    assert_eq!(enrolled.call((Node::OUTSIDE, 80)), "refused");
}

/// Each call is from a port of its own: where the machine uses one for several, the
/// rules take what the programs send to another place for a destination.
#[test]
fn rules_and_agent_can_stand_in_one_pod() {
    let real = World::with_rules(&istio());
    let both = World::with_rules(&istio()).enrol(&SETTINGS);
    let _proxies = [real.proxy(), both.proxy()];
    let probes: Vec<Probe> = probes()
        .into_iter()
        .zip(17_000..)
        .map(|(probe, port)| probe.from(Source::Port(port)))
        .collect();
    assert_eq!(answers_to(&real, &probes), answers_to(&both, &probes));
}

#[test]
fn another_interface_is_not_looked_at() {
    let settings = ["-i", "*", "-b", "80", "-k", "vif1"];
    let world = World::enrolled(&settings);
    let _proxy = world.proxy();
    let answer = world.call((Node::OUTSIDE, 8080));
    assert!(answer.starts_with("node:8080"), "{answer}");
}

/// What somebody opens to the machine is forwarded, and so are its answers.
#[test]
fn a_machine_can_serve() {
    let rules = Rules {
        inbound_ports: Capture::Listed(vec![80]),
        ..istio()
    };
    let settings = ["-i", "*", "-b", "80", "-k", "vif0"];
    let calls = [Probe::new(Owner::APP, (MACHINE, 9000))];
    for world in [World::with_rules(&rules), World::enrolled(&settings)] {
        let _proxy = world.proxy();
        let _server = Responder::start(&world.machine, Owner::APP, &[9000]);
        let answers = probe_all(world.node.netns(), &calls);
        assert_eq!(answers[0].outcome.to_string(), "machine:9000");
        assert!(world.call((Node::OUTSIDE, 80)).starts_with("pod:15001"));
    }
}

#[test]
fn other_protocols_are_forwarded_untouched() {
    let world = World::enrolled(&SETTINGS);
    let _proxy = world.proxy();
    let bind = |netns: &Netns, ip: IpAddr, port: u16| {
        let socket = netns.run(|| UdpSocket::bind((ip, port)).expect("a free port"));
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        socket
    };
    for port in [53, 15001] {
        let server = bind(world.node.netns(), Node::OUTSIDE, port);
        let client = bind(&world.machine, MACHINE, 0);
        client.connect((Node::OUTSIDE, port)).expect("a route");
        client.send(b"question").expect("it can be sent");
        let mut bytes = [0; 16];
        let (length, from) = server.recv_from(&mut bytes).expect("it arrives");
        assert_eq!((&bytes[..length], from.ip()), (&b"question"[..], MACHINE));
        server.send_to(b"answer", from).expect("it can be sent");
        let length = client.recv(&mut bytes).expect("an answer");
        assert_eq!(&bytes[..length], b"answer");
    }
    let host = Node::OUTSIDE.to_string();
    let mut ping = world.machine.command("busybox", Owner::ROOT);
    output_of(ping.args(["ping", "-c", "1", "-W", "5", &host]));
}

/// Bytes that no shift of them resembles.
fn bytes(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        })
        .collect()
}

#[test]
fn a_megabyte_goes_there_and_back() {
    let world = World::enrolled(&SETTINGS);
    let _proxy = world.proxy();
    let mut stream = world.connection();
    let sent = bytes(1 << 20);
    stream.write_all(&sent).expect("the proxy reads");
    let mut received = vec![0; sent.len()];
    stream.read_exact(&mut received).expect("the proxy echoes");
    assert!(sent == received, "other bytes came back");
    // Left to the devices no checksum is ever computed between two of them. With
    // devices that take none, each packet has to have its own right one.
    for (netns, device) in [(&**world.pod.netns(), "vif0"), (&world.machine, "eth0")] {
        netns.run(|| compute_checksums_of(device));
    }
    let mut stream = world.connection();
    stream.write_all(&sent).expect("the proxy reads");
    stream.read_exact(&mut received).expect("the proxy echoes");
    assert!(sent == received, "other bytes came back");
}

nix::ioctl_readwrite_bad!(ethtool, nix::libc::SIOCETHTOOL, nix::libc::ifreq);

/// Turns checksum offload of an interface off: TCP then computes each checksum,
/// and segments by itself.
fn compute_checksums_of(device: &str) {
    /// `ETHTOOL_STXCSUM`
    const SET_CHECKSUMMING: u32 = 0x17;
    /// `struct ethtool_value`
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let mut value = Value {
        command: SET_CHECKSUMMING,
        data: 0,
    };
    // SAFETY: a C structure of integers and pointers, all of which may be zero.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = nix::libc::c_char::from_ne_bytes([byte]);
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut value).cast();
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
    // SAFETY: an open socket, and a request that names a value of its kind.
    unsafe { ethtool(std::os::fd::AsRawFd::as_raw_fd(&socket), &raw mut request) }
        .unwrap_or_else(|error| panic!("cannot turn the offload of {device} off: {error}"));
}

#[test]
fn ipv6_goes_the_same_way() {
    let settings = [&SETTINGS[..], &["--dual-stack"]].concat();
    for world in [World::with_rules(&istio()), World::enrolled(&settings)] {
        let listen = |ip: Ipv6Addr, port: u16| {
            world.pod.netns().run(|| {
                Owner::PROXY.assume();
                TcpListener::bind((ip, port)).expect("a free port")
            })
        };
        let to = SocketAddr::from((OUTSIDE6, 443));
        let connect = || {
            world
                .machine
                .run(|| TcpStream::connect_timeout(&to, DEADLINE))
        };
        let refused = connect().expect_err("nobody listens").kind();
        assert_eq!(refused, std::io::ErrorKind::ConnectionRefused);

        let proxy = listen(Ipv6Addr::UNSPECIFIED, 15001);
        let mut client = connect().expect("the proxy listens");
        let (mut server, peer) = proxy.accept().expect("it is connected");
        assert_eq!(peer.ip(), IpAddr::V6(MACHINE6));
        assert_eq!(client.peer_addr().expect("connected"), to);
        let asked = SockRef::from(&server).original_dst_v6();
        let asked = asked.expect("it was redirected").as_socket();
        assert_eq!(asked, Some(to));
        let sent = bytes(100_000);
        for _ in 0..10 {
            client.write_all(&sent).expect("room");
            let mut received = vec![0; sent.len()];
            server.read_exact(&mut received).expect("what was sent");
            assert!(sent == received, "other bytes came");
        }
    }
}

/// Closed by either side first, reset, and refused.
#[test]
fn many_connections_leave_nothing_behind() {
    let world = World::enrolled(&SETTINGS);
    let of_connections = || {
        let mut entries = bpf::entries_by_map(&world.agent().status());
        entries.retain(|map, _| {
            matches!(
                map.as_str(),
                "FLOWS" | "FLOW_SLOTS" | "FORWARDED" | "SERVED"
            )
        });
        entries
    };
    let before = of_connections();
    assert_eq!(before.values().sum::<usize>(), 0, "{before:?}");
    assert_eq!(before.len(), 4, "{before:?}");
    let many = [Probe::new(Owner::APP, (Node::OUTSIDE, 80)); 500];
    let refused = probe_all(&world.machine, &many);
    let is_refused = |answer: &Answer| answer.outcome == Outcome::Refused;
    assert!(refused.iter().all(is_refused), "{refused:?}");
    let proxy = world.proxy();
    let answered = probe_all(&world.machine, &many);
    assert!(answered.iter().all(|a| seen(a).starts_with("pod:15001")));
    let open = connect_all(&world.machine, &many);
    // The proxy goes first.
    drop(proxy);
    for (_, stream) in &open {
        let mut stream = stream.as_ref().expect("it was answered");
        let read = stream.read(&mut [0]);
        assert!(matches!(read, Ok(0)), "{read:?}");
    }
    drop(open);
    wait_until("maps as they were", || {
        let after = of_connections();
        if after == before {
            Ok(())
        } else {
            Err(format!("{before:?} became {after:?}"))
        }
    });
    assert_eq!(
        world.errors().as_object().map(|errors| errors
            .keys()
            .filter(|name| name.starts_with("forward"))
            .count()),
        Some(0)
    );
}

#[test]
fn an_interface_may_come_later_and_go() {
    let world = World::unplugged().enrol(&SETTINGS);
    let _proxy = world.proxy();
    let on_interfaces = || {
        let programs = bpf::programs(&world.agent().status());
        let wanted = ["shunt_arrives", "shunt_leaves"];
        wanted
            .iter()
            .filter(|name| programs.contains_key(**name))
            .count()
    };
    assert_eq!(on_interfaces(), 0);
    for _ in 0..2 {
        world.plug();
        wait_until("the programs on the interface", || {
            if on_interfaces() == 2 {
                Ok(())
            } else {
                Err("none".to_owned())
            }
        });
        // Its address may have come after it.
        wait_until("the proxy", || {
            let answer = world.call((Node::OUTSIDE, 80));
            if answer.starts_with("pod:15001") {
                Ok(())
            } else {
                Err(answer)
            }
        });
        world.pod.netns().ip("link del vif0");
        wait_until("no programs", || {
            if on_interfaces() == 0 {
                Ok(())
            } else {
                Err("still there".to_owned())
            }
        });
    }
}

/// `REDIRECT` has nowhere to send it either.
#[test]
fn without_an_address_nothing_gets_through() {
    for world in [World::with_rules(&istio()), World::enrolled(&SETTINGS)] {
        let _proxy = world.proxy();
        let hardware = world.pod.netns().run(|| {
            output_of(std::process::Command::new("ip").args([
                "-n",
                world.pod.netns().name(),
                "-br",
                "link",
                "show",
                "vif0",
            ]))
        });
        let hardware = hardware
            .split_whitespace()
            .nth(2)
            .expect("an address")
            .to_owned();
        world.machine.ip(&format!(
            "neigh replace {GATEWAY} lladdr {hardware} dev eth0 nud permanent"
        ));
        world.pod.netns().ip(&format!(
            "addr del {GATEWAY}/24 dev vif0\n\
             route add {MACHINE}/32 dev vif0\n"
        ));
        if world.agent.is_some() {
            wait_until("the change", || {
                world.call((Node::OUTSIDE, 80));
                let errors = world.errors();
                if errors["forward_no_address"].as_u64() > Some(0) {
                    Ok(())
                } else {
                    Err(errors.to_string())
                }
            });
        }
        assert_eq!(world.call((Node::OUTSIDE, 80)), "silent");
    }
}

/// A connection that is cut off in the middle is not continued outside.
#[test]
fn what_belongs_to_no_connection_is_reset() {
    let world = World::enrolled(&SETTINGS);
    let proxy = world.proxy();
    let mut stream = world.connection();
    // The kernel forgets the socket without a word to the machine.
    world.pod.netns().ip("link set vif0 down");
    drop(proxy);
    let mut kill = world.pod.netns().command("ss", Owner::ROOT);
    output_of(kill.args(["-K", "state", "all", "sport", "=", ":15001"]));
    world.pod.netns().ip("link set vif0 up");
    stream.write_all(b"secret").expect("it is still open");
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    // Unlike `read` it goes on after a signal that was meant for nobody here.
    let error = stream.read_exact(&mut [0]).expect_err("nobody is there");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// Two connections from one port to two hosts at once. Connection tracking gives
/// the second another port; here it goes to another port of the proxy.
#[test]
fn one_port_can_call_two_hosts() {
    let world = World::enrolled(&SETTINGS);
    let _proxy = world.proxy();
    let connect = |ip: IpAddr| -> std::io::Result<_> {
        world.machine.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::from((MACHINE, 17_000)).into())?;
            socket.connect_timeout(&SocketAddr::from((ip, 80)).into(), DEADLINE)?;
            Ok(TcpStream::from(socket))
        })
    };
    let mut streams = Vec::new();
    for host in [Node::OUTSIDE, Node::FAR_OUTSIDE, Node::PRIVATE] {
        let stream = connect(host).unwrap_or_else(|error| panic!("{host}: {error}"));
        let greeting = Greeting::read(&stream);
        assert_eq!(greeting.destination(), SocketAddr::from((host, 80)));
        assert_eq!(greeting.peer, SocketAddr::from((MACHINE, 17_000)));
        streams.push(stream);
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let said = format!("connection {number}\n");
        stream.write_all(said.as_bytes()).expect("room");
        let mut echo = vec![0; said.len()];
        stream.read_exact(&mut echo).expect("an echo");
        assert_eq!(echo, said.as_bytes());
    }
}
