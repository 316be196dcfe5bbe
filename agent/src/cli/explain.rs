//! `shunt explain`: what becomes of one connection, and why. It asks the same
//! function that the kernel runs, over the same map entries, and needs neither
//! root nor an agent.
#![expect(
    clippy::print_stderr,
    reason = "a command writes for whoever called it"
)]

#[cfg(test)]
mod tests;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, ValueEnum};
use serde::Serialize;
use shunt_abi::Addr;
use shunt_decide::{Decision, Inbound, Outbound, Protocol};
use thiserror::Error;

use crate::{
    cli::{Output, fail, say},
    settings::{
        Compiled, Enrolment, Families, Flags, HostLists, ResolvConfError, Settings, SettingsError,
        compile, process_env, resolv_conf,
    },
    userns::IdMaps,
};

/// Says what becomes of one connection, which rule decides, and why.
///
/// Needs no root and no agent: the settings are those of the flags, and the
/// answer comes from the function that the kernel runs.
///
/// Exit codes: 0 when there is an answer, 2 when the question makes no sense.
// The variables of the facts begin with SHUNT_EXPLAIN_: in the namespace of a
// Service called "shunt" Kubernetes sets SHUNT_PORT, to something else.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  An application calls another service:
    shunt explain --mesh istio --direction outbound \\
      --uid 1000 --gid 1000 --src 10.1.1.5 --dst 10.2.0.9 --port 80
  The proxy calls its own pod, the settings as istio-init has them:
    shunt explain -p 15001 -z 15006 -u 1337 -m REDIRECT -i '*' -x '' -b '*' -d 15090,15021,15020 \\
      --direction outbound --uid 1337 --gid 1337 --src 10.1.1.5 --dst 10.1.1.5 --port 8080
  A health check from outside:
    shunt explain --mesh istio --direction inbound \\
      --src 10.2.0.1 --dst 10.1.1.5 --port 15021 --output json")]
pub struct Explain {
    #[command(flatten)]
    question: Question,
    /// The pod's resolv.conf, for --redirect-dns
    #[arg(long, env = "SHUNT_RESOLV_CONF", value_name = "PATH")]
    resolv_conf: Option<PathBuf>,
    /// How to write the answer
    #[arg(long, env = "SHUNT_OUTPUT", default_value = "text")]
    output: Output,
    #[command(flatten)]
    flags: Flags,
}

/// What is asked about a connection, settings apart.
#[derive(Args, Clone, Debug)]
pub struct Question {
    /// Which way the connection goes, seen from the pod
    #[arg(long, env = "SHUNT_EXPLAIN_DIRECTION")]
    pub direction: Direction,
    /// The uid that opened the socket (outbound)
    #[arg(
        long,
        env = "SHUNT_EXPLAIN_UID",
        value_name = "N",
        required_if_eq("direction", "outbound")
    )]
    pub uid: Option<u32>,
    /// The gid that opened the socket (outbound)
    #[arg(
        long,
        env = "SHUNT_EXPLAIN_GID",
        value_name = "N",
        required_if_eq("direction", "outbound")
    )]
    pub gid: Option<u32>,
    /// The source address; 0.0.0.0 or :: for a socket that is not bound
    #[arg(long, env = "SHUNT_EXPLAIN_SRC", value_name = "IP")]
    pub src: IpAddr,
    /// The destination address
    #[arg(long, env = "SHUNT_EXPLAIN_DST", value_name = "IP")]
    pub dst: IpAddr,
    /// The destination port
    #[arg(long, env = "SHUNT_EXPLAIN_PORT", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// The protocol
    #[arg(long, env = "SHUNT_EXPLAIN_PROTO", default_value = "tcp")]
    pub proto: Proto,
    /// The addresses of the pod; if not given, the source when it is neither
    /// loopback nor unspecified (outbound), or the destination (inbound)
    #[arg(
        long,
        env = "SHUNT_EXPLAIN_POD_IP",
        value_name = "IP,...",
        value_delimiter = ','
    )]
    pub pod_ip: Vec<IpAddr>,
    /// The interface through which it leaves or comes in, for -c and -k
    #[arg(long, env = "SHUNT_EXPLAIN_INTERFACE", value_name = "NAME")]
    pub interface: Option<String>,
}

/// Which way a connection goes, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From a socket of the pod.
    Outbound,
    /// To the pod.
    Inbound,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Proto {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

/// A question that makes no sense.
#[derive(Debug, Error)]
pub enum ExplainError {
    /// A setting cannot be understood.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The resolv.conf cannot be read.
    #[error("cannot read {}: {source}; --resolv-conf names the resolv.conf of the pod", .path.display())]
    ResolvConfRead {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The resolv.conf cannot be understood.
    #[error("{}: {source}", .path.display())]
    ResolvConf {
        /// The file.
        path: PathBuf,
        /// The line.
        source: ResolvConfError,
    },
    /// DNS capture without resolvers.
    #[error(
        "--redirect-dns captures DNS for the resolvers of the pod, which are not known here; \
         give --resolv-conf PATH, or --capture-all-dns"
    )]
    NoResolvConf,
    /// Addresses of two families.
    #[error(
        "--src {source_address} and --dst {destination} are not of one address family; \
         an IPv4 connection has two IPv4 addresses"
    )]
    TwoFamilies {
        /// The source.
        source_address: IpAddr,
        /// The destination.
        destination: IpAddr,
    },
    /// An inbound connection needs both of its addresses.
    #[error("an inbound connection has a source and a destination; {0} is neither")]
    Unspecified(IpAddr),
    /// An address of the pod is not reached through this interface.
    #[error(
        "{destination} is an address of the pod itself and is reached through lo, \
         not through {interface}; leave --interface out, or check --dst and --pod-ip"
    )]
    NotThroughLo {
        /// The destination.
        destination: IpAddr,
        /// The interface that was given.
        interface: String,
    },
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// `direct`, or which port of the proxy: `outbound`, `inbound` or `dns`.
    pub verdict: &'static str,
    /// The proxy's port (host byte order), if the verdict is not `direct`.
    pub port: Option<u16>,
    /// The rule that decided, as the contract numbers it.
    pub rule: &'static str,
    /// What that rule says.
    pub why: &'static str,
    /// What the rules were asked about.
    pub facts: Facts,
}

/// What is known of the connection, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// Which way it goes.
    pub direction: Direction,
    /// Its protocol.
    pub protocol: Proto,
    /// The source address that it has or would get.
    pub source: IpAddr,
    /// The destination as the kernel takes it: never unspecified.
    pub destination: IpAddr,
    /// The destination port, host byte order.
    pub port: u16,
    /// Who opened the socket; unknown for inbound connections.
    pub uid: Option<u32>,
    /// Likewise its group.
    pub gid: Option<u32>,
    /// The other end is an address of the pod itself.
    pub within_pod: bool,
    /// The interface, as far as it is known.
    pub interface: Option<String>,
    /// `-c` names the interface.
    pub interface_excluded: bool,
    /// `-k` names the interface; only inbound connections are asked.
    pub interface_virtual: bool,
}

impl Explain {
    /// Prints the answer, or what is wrong with the question.
    pub fn run(&self) -> ExitCode {
        match self.explain(&process_env) {
            Ok(explanation) => {
                let answered = match self.output {
                    Output::Text => say(&explanation),
                    Output::Json => say(&explanation.to_json()),
                };
                match answered {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => fail(&error),
                }
            }
            Err(error) => {
                eprintln!("shunt explain: {error}");
                ExitCode::from(2)
            }
        }
    }

    /// Answers the question; `env` looks up an environment variable. Reads the
    /// resolv.conf, if one is given.
    ///
    /// # Errors
    ///
    /// Settings or facts that make no sense.
    pub fn explain(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Explanation, ExplainError> {
        let settings = self.flags.settings(env)?;
        let resolvers = self.resolvers(&settings)?;
        self.question.answer(&settings, &resolvers)
    }

    fn resolvers(&self, settings: &Settings) -> Result<Vec<IpAddr>, ExplainError> {
        let Some(path) = &self.resolv_conf else {
            return if settings.redirect_dns && !settings.capture_all_dns {
                Err(ExplainError::NoResolvConf)
            } else {
                Ok(Vec::new())
            };
        };
        let text =
            std::fs::read_to_string(path).map_err(|source| ExplainError::ResolvConfRead {
                path: path.clone(),
                source,
            })?;
        resolv_conf(&text).map_err(|source| ExplainError::ResolvConf {
            path: path.clone(),
            source,
        })
    }
}

impl Question {
    /// Answers it, for a pod with these settings and these nameservers in its
    /// resolv.conf.
    ///
    /// # Errors
    ///
    /// Facts that make no sense.
    pub fn answer(
        &self,
        settings: &Settings,
        resolvers: &[IpAddr],
    ) -> Result<Explanation, ExplainError> {
        let own = self.own_addresses();
        let facts = self.facts(settings, &own)?;
        let families = if self.pod_ip.is_empty() {
            // Nothing is known of the pod: suppose that the rules apply to it.
            Families { v4: true, v6: true }
        } else {
            Families::of(&own, settings.dual_stack)
        };
        let compiled = compile(
            settings,
            &Enrolment {
                list_set: 1,
                resolvers,
                families,
                ids: &IdMaps::same(),
            },
        );
        Ok(answer(&compiled, facts))
    }

    /// The addresses of the pod, as far as they are known; loopback is always
    /// its own and is not among them.
    fn own_addresses(&self) -> Vec<IpAddr> {
        let guess = match self.direction {
            Direction::Outbound => self.src,
            Direction::Inbound => self.dst,
        };
        let given = match self.pod_ip.as_slice() {
            [] => std::slice::from_ref(&guess),
            given => given,
        };
        given
            .iter()
            .map(IpAddr::to_canonical)
            .filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
            .collect()
    }

    fn facts(&self, settings: &Settings, own: &[IpAddr]) -> Result<Facts, ExplainError> {
        let is_own = |ip: IpAddr| ip.is_loopback() || own.contains(&ip);
        let (source, destination) = self.addresses(own)?;
        let outbound = self.direction == Direction::Outbound;
        let within_pod = is_own(if outbound { destination } else { source });
        let interface = self.interface.clone();
        let interface = match interface {
            Some(interface) if outbound && within_pod && interface != "lo" => {
                return Err(ExplainError::NotThroughLo {
                    destination,
                    interface,
                });
            }
            None if within_pod => Some("lo".to_owned()),
            known => known,
        };
        let named = interface.as_deref();
        Ok(Facts {
            direction: self.direction,
            protocol: self.proto,
            source,
            destination,
            port: self.port,
            uid: self.uid.filter(|_| outbound),
            gid: self.gid.filter(|_| outbound),
            within_pod,
            interface_excluded: named.is_some_and(|n| settings.excluded_interfaces.contains(n)),
            interface_virtual: !outbound
                && named.is_some_and(|n| settings.virtual_interfaces.contains(n)),
            interface,
        })
    }

    /// Source and destination as the kernel takes them: `0.0.0.0` is the source
    /// that the socket is bound to, or else loopback; `::` is loopback; an
    /// unspecified source is what the routing table would give.
    fn addresses(&self, own: &[IpAddr]) -> Result<(IpAddr, IpAddr), ExplainError> {
        let (src, dst) = (self.src.to_canonical(), self.dst.to_canonical());
        let unbound = src.is_unspecified();
        if self.direction == Direction::Inbound
            && let Some(missing) = [src, dst].into_iter().find(IpAddr::is_unspecified)
        {
            return Err(ExplainError::Unspecified(missing));
        }
        if src.is_ipv4() != dst.is_ipv4() && !unbound {
            return Err(ExplainError::TwoFamilies {
                source_address: src,
                destination: dst,
            });
        }
        let loopback: IpAddr = if dst.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        };
        let destination = match (dst.is_unspecified(), unbound) {
            (false, _) => dst,
            (true, true) => loopback,
            (true, false) if dst.is_ipv4() => src,
            (true, false) => loopback,
        };
        let source = if !unbound {
            src
        } else if destination.is_loopback() {
            loopback
        } else if own.contains(&destination) {
            destination
        } else {
            let same_family = |ip: &&IpAddr| ip.is_ipv4() == destination.is_ipv4();
            own.iter().find(same_family).copied().unwrap_or(src)
        };
        Ok((source, destination))
    }
}

fn answer(compiled: &Compiled, facts: Facts) -> Explanation {
    let lists = HostLists::from(compiled);
    let protocol = match facts.protocol {
        Proto::Tcp => Protocol::Tcp,
        Proto::Udp => Protocol::Udp,
    };
    let Decision { verdict, rule } = match (facts.direction, protocol) {
        (Direction::Outbound, _) => shunt_decide::outbound(
            &compiled.pod,
            &Outbound {
                protocol,
                source: Addr::from_ip(facts.source),
                destination: Addr::from_ip(facts.destination),
                port: facts.port,
                uid: facts.uid.unwrap_or(shunt_abi::NO_OWNER),
                gid: facts.gid.unwrap_or(shunt_abi::NO_OWNER),
                to_self: facts.within_pod,
                interface_excluded: facts.interface_excluded,
            },
            &lists,
        ),
        (Direction::Inbound, Protocol::Tcp) => shunt_decide::inbound(
            &compiled.pod,
            &Inbound {
                destination: Addr::from_ip(facts.destination),
                port: facts.port,
                from_self: facts.within_pod,
                interface_excluded: facts.interface_excluded,
                interface_virtual: facts.interface_virtual,
            },
            &lists,
        ),
        // The kernel never asks either: the inbound program is for TCP alone.
        (Direction::Inbound, Protocol::Udp) => {
            return Explanation {
                verdict: "direct",
                port: None,
                rule: "inbound 0",
                why: "the inbound rules speak of TCP only: UDP passes untouched",
                facts,
            };
        }
    };
    Explanation {
        verdict: verdict.name(),
        port: verdict.port(&compiled.pod),
        rule: rule.number(),
        why: rule.why(),
        facts,
    }
}

impl Explanation {
    fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("no map and no fallible type is inside")
    }
}

/// For people.
///
/// ```text
/// outbound → proxy port 15001
///   rule outbound 11: the destination is in a captured range (-i)
///   tcp 10.1.1.5 → 10.2.0.9:80, opened by uid 1000, gid 1000
/// ```
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = &self.facts;
        match self.port {
            Some(port) => writeln!(f, "{} → proxy port {port}", self.verdict)?,
            None => writeln!(f, "{} → where it was sent", self.verdict)?,
        }
        writeln!(f, "  rule {}: {}", self.rule, self.why)?;
        write!(f, "  {facts}")
    }
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
        };
        let destination = std::net::SocketAddr::new(self.destination, self.port);
        write!(f, "{protocol} {} → {destination}", self.source)?;
        if let (Some(uid), Some(gid)) = (self.uid, self.gid) {
            write!(f, ", opened by uid {uid}, gid {gid}")?;
        }
        if self.within_pod {
            f.write_str(", within the pod")?;
        }
        if let Some(interface) = &self.interface {
            write!(f, ", through {interface}")?;
        }
        Ok(())
    }
}
