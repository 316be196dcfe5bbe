//! DNS: real servers, and messages to ask them with.
//!
//! Every server is asked for the address of [`NAME`], and each has another
//! answer: so the answer tells who gave it.

use std::{
    fmt::Write,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::Path,
    sync::atomic::{AtomicU16, Ordering},
};

use shunt_istio_rules::{Dns, Family, Rules};
use simple_dns::{CLASS, Name, Packet, Question, TYPE, rdata::RData};

use crate::{Netns, Owner, Process, deadline::DEADLINE, iptables, mesh::ISTIO_DEFAULTS};

/// What every server is asked for.
pub const NAME: &str = "who.test";

/// A real DNS server, dnsmasq, that answers over UDP and TCP.
#[derive(Debug)]
pub struct DnsServer {
    process: Process,
    /// Asks it directly, past every proxy.
    line: UdpSocket,
}

impl DnsServer {
    /// Starts one that listens on `port` of `addresses`, with sockets of
    /// `owner`, and says of [`NAME`] that its address is `answer`. It answers
    /// when this returns.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub fn start(
        netns: &Netns,
        owner: Owner,
        (addresses, port): (&[IpAddr], u16),
        answer: Ipv4Addr,
    ) -> Self {
        let mut command = netns.command("dnsmasq", owner);
        command.args([
            "--no-daemon",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
            // Stays who it is.
            "--user=",
            "--log-facility=-",
            "--log-queries=extra",
            // Nobody further on is asked.
            "--local=/test/",
        ]);
        command.arg(format!("--host-record={NAME},{answer}"));
        command.arg(format!("--port={port}"));
        command.args(addresses.iter().map(|ip| format!("--listen-address={ip}")));
        let name = format!("dnsmasq at {} on {addresses:?}:{port}", netns.purpose());
        let process = Process::spawn(&name, &mut command);
        process.wait_for_line("started, version", DEADLINE);
        let line = netns.run(|| {
            let any: IpAddr = match addresses[0] {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let line = UdpSocket::bind((any, 0))?;
            line.connect((addresses[0], port))?;
            Ok::<_, io::Error>(line)
        });
        Self {
            process,
            line: line.expect("a server has a way to itself"),
        }
    }

    /// From where it was asked so far, one for each question.
    ///
    /// # Panics
    ///
    /// When it does not log questions any more.
    pub fn asked_by(&self) -> Vec<SocketAddr> {
        // What it has logged may still be on its way here: a last question, for a
        // name of its own, comes after all others.
        let (id, _) = question();
        let last = format!("last-{id}.test");
        self.line
            .send(&question_for(&last, id))
            .expect("it takes questions");
        self.process.wait_for_line(&last, DEADLINE);
        // `Jan  1 00:00:00 dnsmasq[9]: 7 10.42.0.2/41234 query[A] who.test from 10.42.0.2`
        let output = self.process.output();
        let asked = format!(" query[A] {NAME} ");
        let questions = output.lines().filter(|line| line.contains(&asked));
        questions
            .map(|line| {
                let (_, logged) = line.split_once("]: ").expect("it logs its name");
                let client = logged.split(' ').nth(1).expect("it logs who asks");
                let (ip, port) = client.split_once('/').expect("address and port");
                let ip = ip.parse().expect("an address");
                SocketAddr::new(ip, port.parse().expect("a port"))
            })
            .collect()
    }
}

/// Which DNS of a pod is captured, in the two languages that are compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capture {
    /// The nameservers in the pod's resolv.conf.
    pub resolvers: Vec<IpAddr>,
    /// What goes to any other server, too.
    pub all: bool,
    /// Ports that are left alone outbound.
    pub excluded_ports: Vec<u16>,
}

impl Capture {
    /// The pod's resolv.conf.
    pub fn resolv_conf(&self) -> String {
        self.resolvers.iter().fold(String::new(), |mut text, ip| {
            writeln!(text, "nameserver {ip}").expect("a string takes everything");
            text
        })
    }

    /// The flags of `shunt enroll`, for a pod of both families whose resolv.conf is at
    /// `resolv_conf`.
    pub fn flags(&self, resolv_conf: &Path) -> Vec<String> {
        let mut flags: Vec<_> = ISTIO_DEFAULTS.map(str::to_owned).into();
        flags.extend(["--dual-stack", "--redirect-dns"].map(str::to_owned));
        if self.all {
            flags.push("--capture-all-dns".to_owned());
        }
        let ports: Vec<_> = self.excluded_ports.iter().map(u16::to_string).collect();
        flags.extend(["-o".to_owned(), ports.join(",")]);
        let path = resolv_conf.to_str().expect("a path of this test");
        flags.extend(["--resolv-conf".to_owned(), path.to_owned()]);
        flags
    }

    /// Loads Istio's rules into a namespace, for both families.
    ///
    /// # Panics
    ///
    /// When the kernel or a tool refuses them.
    pub fn load_rules(&self, netns: &Netns) {
        let rules = Rules {
            dns: if self.all {
                Dns::All
            } else {
                Dns::Resolvers(self.resolvers.clone())
            },
            outbound_ports_exclude: self.excluded_ports.clone(),
            ..Rules::istio()
        };
        iptables::restore(netns, &(rules.ipv4() + &self.zones(Family::V4)));
        iptables::restore6(netns, &(rules.ipv6() + &self.zones(Family::V6)));
    }

    /// The part of Istio's rules that redirects nothing: conversations of
    /// applications with the proxy are tracked apart from those of the proxy
    /// with the servers, which may have the same addresses and ports.
    fn zones(&self, family: Family) -> String {
        let own = |ip: &&IpAddr| !self.all && Family::of(**ip) == family;
        let mut servers: Vec<_> = self.resolvers.iter().filter(own).map(Some).collect();
        if self.all {
            servers.push(None);
        }
        let servers: String = servers
            .into_iter()
            .map(|server| {
                let is = |option| server.map_or_else(String::new, |ip| format!("{option} {ip}"));
                format!(
                    "-A OUTPUT {} -p udp -m udp --dport 53 -j CT --zone 2\n\
                     -A PREROUTING {} -p udp -m udp --sport 53 -j CT --zone 1\n",
                    is("-d"),
                    is("-s")
                )
            })
            .collect();
        let proxys: String = ["--uid-owner", "--gid-owner"]
            .map(|owner| {
                format!(
                    "-A OUTPUT -p udp -m udp --dport 53 -m owner {owner} 1337 -j CT --zone 1\n\
                     -A OUTPUT -p udp -m udp --sport 15053 -m owner {owner} 1337 -j CT --zone 2\n"
                )
            })
            .concat();
        format!("*raw\n{proxys}{servers}COMMIT\n")
    }
}

/// A question for the address of [`NAME`], and its number, which no other
/// question of this process has at the same time.
pub fn question() -> (u16, Vec<u8>) {
    static NUMBER: AtomicU16 = AtomicU16::new(0);
    let id = NUMBER.fetch_add(1, Ordering::Relaxed);
    (id, question_for(NAME, id))
}

fn question_for(name: &str, id: u16) -> Vec<u8> {
    let mut packet = Packet::new_query(id);
    packet.questions.push(Question::new(
        Name::new_unchecked(name),
        TYPE::A.into(),
        CLASS::IN.into(),
        false,
    ));
    packet.build_bytes_vec().expect("a question is short")
}

/// What a server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The number of the question.
    pub id: u16,
    /// The address of [`NAME`].
    pub answer: Ipv4Addr,
}

impl Reply {
    /// Reads a message.
    ///
    /// # Panics
    ///
    /// When it is not the answer to a [`question`].
    pub fn parse(message: &[u8]) -> Self {
        let packet = Packet::parse(message)
            .unwrap_or_else(|error| panic!("no DNS message: {error:?}: {message:?}"));
        let answers: Vec<_> = packet.answers.iter().map(|record| &record.rdata).collect();
        let [RData::A(address)] = answers[..] else {
            panic!("not the answer to a question for {NAME}: {packet:?}");
        };
        Self {
            id: packet.id(),
            answer: address.address.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use simple_dns::{ResourceRecord, rdata::A};

    use super::*;

    #[test]
    fn a_reply_is_read() {
        let (id, message) = question();
        let mut packet = Packet::parse(&message).expect("a message").into_reply();
        packet.answers.push(ResourceRecord::new(
            Name::new_unchecked(NAME),
            CLASS::IN,
            0,
            RData::A(A {
                address: Ipv4Addr::new(192, 0, 2, 1).into(),
            }),
        ));
        let message = packet.build_bytes_vec().expect("it is short");
        let answer = Ipv4Addr::new(192, 0, 2, 1);
        assert_eq!(Reply::parse(&message), Reply { id, answer });
    }

    #[test]
    fn questions_have_numbers_of_their_own() {
        assert_ne!(question().0, question().0);
    }
}
