//! `shunt explain` on what was asked: it must say what the kernel did.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::Command,
};

use nix::errno::Errno;
use shunt::{
    cli::explain::{self, Direction, Explanation, Proto},
    settings::Settings,
};
use shunt_tests::{
    Answer, Node, Outcome, Source, Stack,
    agent::{binary, run},
};

use super::{
    compare::Fault,
    probes::{From, Question, Version},
    setting::Setting,
    world::{self, World},
};

/// Explains the connections of one setting.
pub(crate) struct Explainer<'a> {
    setting: &'a Setting,
    settings: Settings,
    pod_ips: Vec<IpAddr>,
}

impl<'a> Explainer<'a> {
    pub(crate) fn new(setting: &'a Setting) -> Self {
        let mut pod_ips = world::addresses(setting.stack);
        if setting.stack == Stack::Dual {
            pod_ips.extend(world::GATEWAYS);
        }
        if setting.has_six() {
            pod_ips.push(world::SIX6);
        }
        Self {
            setting,
            settings: setting.settings(),
            pod_ips,
        }
    }

    /// What is wrong, where the kernel has not done what `explain` says.
    pub(crate) fn fault(&self, question: &Question, answer: &Answer) -> Option<Fault> {
        // Before any rule is asked the source has to be an address of the pod,
        // and a route has to lead from it to the destination.
        if let Outcome::Failed(Errno::ENETUNREACH | Errno::EINVAL | Errno::EADDRNOTAVAIL) =
            answer.outcome
        {
            return None;
        }
        let explanation = self.explain(question);
        let expected = self.expected(question, &explanation);
        let actual = match &answer.outcome {
            Outcome::Answered(greeting) => Some((greeting.place.as_str(), greeting.listener)),
            Outcome::Refused | Outcome::Closed | Outcome::Silent | Outcome::Failed(_) => None,
        };
        let refused = answer.outcome == Outcome::Refused;
        (actual != expected || (expected.is_none() && !refused)).then(|| {
            let text = format!(
                "  explain: {} {:?} by {}, so {expected:?} (none: refused)\n  kernel:  {}",
                explanation.verdict, explanation.port, explanation.rule, answer.outcome
            );
            Fault::new(question, text)
        })
    }

    /// Whether an answer can come: what leaves the pod from `::1` or `::6` has no
    /// way back, and nobody says so. Nor does a refusal find its way that the
    /// pod's address sends to them.
    pub(crate) fn is_answered(&self, question: &Question) -> bool {
        const ON_LO: [IpAddr; 2] = [IpAddr::V6(Ipv6Addr::LOCALHOST), world::SIX6];
        let from_lo = match question.probe.source {
            Source::Addr(ip) | Source::AddrLatePort(ip) => ON_LO.contains(&ip),
            Source::Unbound | Source::Port(_) => false,
        };
        let to = question.probe.destination;
        !from_lo
            || self.is_own(to.ip()) && (to.ip().is_loopback() || World::listens("pod", to.port()))
            || self.explain(question).port.is_some()
    }

    fn explain(&self, question: &Question) -> Explanation {
        self.question(question)
            .answer(&self.settings, self.setting.resolvers())
            .unwrap_or_else(|error| panic!("{question}: {error}"))
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_loopback() || ip.is_unspecified() || self.pod_ips.contains(&ip)
    }

    fn question(&self, question: &Question) -> explain::Question {
        let probe = &question.probe;
        let dst = probe.destination.ip();
        let any: IpAddr = match question.version {
            Version::V4 | Version::Mapped => Ipv4Addr::UNSPECIFIED.into(),
            Version::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let of_version = |[v4, v6]: [IpAddr; 2]| if dst.is_ipv4() { v4 } else { v6 };
        let unbound = match question.from {
            From::Pod => any,
            From::Outside => of_version([Node::GATEWAY, Node::GATEWAY6]),
            From::Machine => of_version(world::MACHINE),
        };
        let from_pod = question.from == From::Pod;
        let interface = match question.from {
            From::Pod if self.is_own(dst) => None,
            From::Pod | From::Outside => Some("eth0"),
            From::Machine => Some(world::VIRTUAL),
        };
        explain::Question {
            direction: if from_pod {
                Direction::Outbound
            } else {
                Direction::Inbound
            },
            uid: from_pod.then_some(probe.owner.uid),
            gid: from_pod.then_some(probe.owner.gid),
            src: match probe.source {
                Source::Addr(ip) | Source::AddrLatePort(ip) => ip,
                Source::Unbound | Source::Port(_) => unbound,
            },
            dst,
            port: probe.destination.port(),
            proto: Proto::Tcp,
            pod_ip: self.pod_ips.clone(),
            interface: interface.map(str::to_owned),
        }
    }

    /// Who has to answer; `None` where nobody listens.
    fn expected(
        &self,
        question: &Question,
        explanation: &Explanation,
    ) -> Option<(&'static str, u16)> {
        let destination = question.probe.destination;
        let (place, port) = match explanation.port {
            Some(port) => ("pod", port),
            None if self.is_own(destination.ip()) => ("pod", destination.port()),
            None => ("node", destination.port()),
        };
        World::listens(place, port).then_some((place, port))
    }

    /// Has the real command explain a question, with `resolv_conf` as the flag
    /// that names the nameservers, and compares.
    pub(crate) fn ask_command(&self, question: &Question, resolv_conf: &[String]) {
        let explanation = self.explain(question);
        let asked = self.question(question);
        let mut command = Command::new(binary());
        command.args(["explain", "--output", "json"]);
        command.args(self.setting.flags()).args(resolv_conf);
        let direction = match asked.direction {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
        };
        let pod_ips: Vec<_> = asked.pod_ip.iter().map(IpAddr::to_string).collect();
        command
            .args(["--direction", direction])
            .arg(format!("--src={}", asked.src))
            .arg(format!("--dst={}", asked.dst))
            .arg(format!("--port={}", asked.port))
            .arg(format!("--pod-ip={}", pod_ips.join(",")));
        for (flag, id) in [("--uid", asked.uid), ("--gid", asked.gid)] {
            command.args(id.map(|id| format!("{flag}={id}")));
        }
        command.args(asked.interface.map(|name| format!("--interface={name}")));
        let ran = run(&mut command);
        let answer: serde_json::Value = serde_json::from_str(&ran.stdout)
            .unwrap_or_else(|error| panic!("{command:?}: {error}: {ran:?}"));
        let expected = serde_json::to_value(&explanation).expect("plain data");
        assert_eq!(answer, expected, "{command:?}");
    }
}
