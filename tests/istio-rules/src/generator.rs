//! From settings to the rules of the `nat` table.
//!
//! The rules and their order are those of `istio-iptables`; how they are
//! written is how `iptables-save` prints them, so that both can be compared as
//! text.

use std::{fmt::Write, net::IpAddr};

use ipnet::IpNet;
use shunt_abi::Hairpin;

use crate::{Capture, Dns, Family, Groups, Rules};

const INBOUND: &str = "ISTIO_INBOUND";
const IN_REDIRECT: &str = "ISTIO_IN_REDIRECT";
const OUTPUT: &str = "ISTIO_OUTPUT";
const OUTPUT_DNS: &str = "ISTIO_OUTPUT_DNS";
const REDIRECT: &str = "ISTIO_REDIRECT";

impl Rules {
    /// The table for `iptables-restore`.
    pub fn ipv4(&self) -> String {
        self.text(Family::V4)
    }

    /// The table for `ip6tables-restore`.
    pub fn ipv6(&self) -> String {
        self.text(Family::V6)
    }

    /// The `mangle` table, the same for both families: it redirects nothing.
    pub fn mangle(&self) -> String {
        let rule = if self.drop_invalid {
            "-A PREROUTING -m conntrack --ctstate INVALID -j DROP\n"
        } else {
            ""
        };
        format!("*mangle\n:PREROUTING ACCEPT [0:0]\n{rule}COMMIT\n")
    }

    fn text(&self, family: Family) -> String {
        let nat = Nat {
            rules: self,
            family,
        };
        let chains = nat.chains();
        let mut text = String::from("*nat\n");
        for name in ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"] {
            line(&mut text, format_args!(":{name} ACCEPT [0:0]"));
        }
        for (name, _) in &chains {
            line(&mut text, format_args!(":{name} - [0:0]"));
        }
        let builtin = [
            ("PREROUTING", nat.prerouting()),
            ("OUTPUT", nat.output_hook()),
        ];
        for (name, rules) in builtin.iter().chain(&chains) {
            for rule in rules {
                line(&mut text, format_args!("-A {name} {rule}"));
            }
        }
        text.push_str("COMMIT\n");
        text
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a String takes whatever is written to it");
}

/// One family's table.
struct Nat<'a> {
    rules: &'a Rules,
    family: Family,
}

impl Nat<'_> {
    /// Istio's own chains and what is in them, by name.
    fn chains(&self) -> Vec<(&'static str, Vec<String>)> {
        let mut chains = vec![(INBOUND, self.inbound())];
        if self.in_redirect() == IN_REDIRECT {
            chains.push((IN_REDIRECT, vec![to_port("tcp", self.rules.inbound_port)]));
        }
        chains.push((OUTPUT, self.output()));
        if self.has_dns() {
            chains.push((OUTPUT_DNS, self.output_dns()));
        }
        chains.push((REDIRECT, vec![to_port("tcp", self.rules.outbound_port)]));
        chains
    }

    /// The chain that leads to the inbound port: one chain serves both
    /// directions where both have one port.
    fn in_redirect(&self) -> &'static str {
        if self.rules.inbound_port == self.rules.outbound_port {
            REDIRECT
        } else {
            IN_REDIRECT
        }
    }

    fn prerouting(&self) -> Vec<String> {
        let rules = self.rules;
        let mut virtuals = Vec::new();
        for interface in &rules.interfaces_virtual {
            virtuals.push(format!("-i {interface} -j RETURN"));
        }
        match &rules.outbound_ranges {
            Capture::All => {
                for interface in &rules.interfaces_virtual {
                    virtuals.push(format!("-i {interface} -j {REDIRECT}"));
                }
            }
            Capture::Listed(nets) => {
                for net in self.own(nets) {
                    for interface in &rules.interfaces_virtual {
                        virtuals.push(format!("-d {net} -i {interface} -j {REDIRECT}"));
                    }
                }
            }
        }
        // Each of them was inserted at the head of the chain: last come, first
        // asked.
        virtuals.reverse();
        let mut chain = virtuals;
        for interface in &rules.interfaces_exclude {
            chain.push(format!("-i {interface} -j RETURN"));
        }
        if rules.inbound_ports != Capture::Listed(Vec::new()) {
            chain.push(format!("-p tcp -j {INBOUND}"));
        }
        chain
    }

    fn output_hook(&self) -> Vec<String> {
        let mut chain: Vec<_> = self
            .rules
            .interfaces_exclude
            .iter()
            .map(|interface| format!("-o {interface} -j RETURN"))
            .collect();
        // Only DNS capture has something to say of other protocols.
        chain.push(if self.rules.dns.is_captured() {
            format!("-j {OUTPUT}")
        } else {
            format!("-p tcp -j {OUTPUT}")
        });
        chain
    }

    fn inbound(&self) -> Vec<String> {
        let rules = self.rules;
        let mut chain = Vec::new();
        if !rules.tunnel_inbound {
            chain.push(port_rule("tcp", rules.tunnel_port, "RETURN"));
        }
        match &rules.inbound_ports {
            Capture::All => {
                for port in &rules.inbound_ports_exclude {
                    chain.push(port_rule("tcp", *port, "RETURN"));
                }
                chain.push(format!("-p tcp -j {}", self.in_redirect()));
            }
            Capture::Listed(ports) => {
                for port in ports {
                    chain.push(port_rule("tcp", *port, self.in_redirect()));
                }
            }
        }
        chain
    }

    fn output(&self) -> Vec<String> {
        let rules = self.rules;
        let mut chain = Vec::new();
        for port in &rules.outbound_ports_exclude {
            chain.push(port_rule("tcp", *port, "RETURN"));
            if rules.dns.is_captured() {
                chain.push(port_rule("udp", *port, "RETURN"));
            }
        }
        chain.push(self.own_calls());
        for uid in &rules.uids {
            self.owner(&mut chain, &Owns::uid(*uid));
        }
        for gid in &rules.gids {
            self.owner(&mut chain, &Owns::gid(*gid));
        }
        self.groups(&mut chain);
        if self.has_dns() {
            chain.push(format!("-j {OUTPUT_DNS}"));
        }
        chain.push(format!("-d {} -j RETURN", self.loopback()));
        for net in self.own(&rules.outbound_ranges_exclude) {
            chain.push(format!("-d {net} -j RETURN"));
        }
        for port in &rules.outbound_ports {
            chain.push(port_rule("tcp", *port, REDIRECT));
        }
        match &rules.outbound_ranges {
            Capture::All => chain.push(format!("-j {REDIRECT}")),
            Capture::Listed(nets) => {
                for net in self.own(nets) {
                    chain.push(format!("-d {net} -j {REDIRECT}"));
                }
            }
        }
        chain
    }

    /// The rule for what stays in the pod that does not depend on the owner.
    fn own_calls(&self) -> String {
        match self.rules.hairpin {
            Hairpin::Spared | Hairpin::Tunnel => {
                let six = match self.family {
                    Family::V4 => "127.0.0.6/32",
                    Family::V6 => "::6/128",
                };
                format!("-s {six} -o lo -j RETURN")
            }
            Hairpin::Legacy => format!("! -d {} -o lo -j {REDIRECT}", self.loopback()),
            Hairpin::None => "-o lo -j RETURN".to_owned(),
        }
    }

    /// The rules for one owner of the proxy.
    fn owner(&self, chain: &mut Vec<String>, owns: &Owns) {
        let Owns { option, id, .. } = owns;
        match self.rules.hairpin {
            Hairpin::Spared | Hairpin::Tunnel => {
                chain.push(format!(
                    "! -d {} -o lo {}-m owner {option} {id} -j {}",
                    self.loopback(),
                    self.hairpin_ports(owns),
                    self.in_redirect(),
                ));
                if !self.rules.captures_loopback() {
                    let ports = if self.rules.dns.is_captured() {
                        "-p tcp -m tcp ! --dport 53 "
                    } else {
                        ""
                    };
                    chain.push(format!("-o lo {ports}-m owner ! {option} {id} -j RETURN"));
                }
            }
            Hairpin::Legacy | Hairpin::None => {}
        }
        chain.push(format!("-m owner {option} {id} -j RETURN"));
    }

    /// The match on the ports of the hairpin to the inbound port.
    fn hairpin_ports(&self, owns: &Owns) -> String {
        let dns = owns.spares_dns && self.rules.dns.is_captured();
        let tunnel = self.rules.hairpin == Hairpin::Spared;
        let port = self.rules.tunnel_port;
        match (dns, tunnel) {
            (true, true) => format!("-p tcp -m multiport ! --dports 53,{port} "),
            (true, false) => "-p tcp -m tcp ! --dport 53 ".to_owned(),
            (false, true) => format!("-p tcp -m tcp ! --dport {port} "),
            (false, false) => String::new(),
        }
    }

    fn groups(&self, chain: &mut Vec<String>) {
        match &self.rules.groups {
            Groups::Only(groups) => {
                let in_none: String = groups
                    .iter()
                    .map(|group| format!("-m owner ! --gid-owner {group} "))
                    .collect();
                chain.push(format!("{in_none}-j RETURN"));
            }
            Groups::Except(groups) => {
                for group in groups {
                    chain.push(format!("-m owner --gid-owner {group} -j RETURN"));
                }
            }
        }
    }

    /// Whether this family has a server whose DNS is captured.
    fn has_dns(&self) -> bool {
        self.rules.dns == Dns::All || !self.servers().is_empty()
    }

    /// The captured servers of this family.
    fn servers(&self) -> Vec<IpAddr> {
        match &self.rules.dns {
            Dns::Off | Dns::All => Vec::new(),
            Dns::Resolvers(servers) => servers
                .iter()
                .copied()
                .filter(|server| Family::of(*server) == self.family)
                .collect(),
        }
    }

    fn output_dns(&self) -> Vec<String> {
        let mut chain = Vec::new();
        for protocol in ["tcp", "udp"] {
            let to_dns = format!(
                "-p {protocol} -m {protocol} --dport 53 -j REDIRECT --to-ports {}",
                self.rules.dns_port
            );
            if self.rules.dns == Dns::All {
                chain.push(to_dns.clone());
            }
            for server in self.servers() {
                chain.push(format!("-d {} {to_dns}", IpNet::from(server)));
            }
        }
        chain
    }

    fn loopback(&self) -> String {
        match self.family {
            Family::V4 => self.rules.loopback.trunc().to_string(),
            Family::V6 => "::1/128".to_owned(),
        }
    }

    /// The ranges of this family.
    fn own(&self, nets: &[IpNet]) -> Vec<IpNet> {
        nets.iter()
            .filter(|net| self.family.has(net))
            .map(IpNet::trunc)
            .collect()
    }
}

/// An owner of the proxy.
struct Owns {
    option: &'static str,
    id: u32,
    /// With DNS capture the hairpin of a uid spares port 53, that of a gid does
    /// not.
    spares_dns: bool,
}

impl Owns {
    const fn uid(id: u32) -> Self {
        Self {
            option: "--uid-owner",
            id,
            spares_dns: true,
        }
    }

    const fn gid(id: u32) -> Self {
        Self {
            option: "--gid-owner",
            id,
            spares_dns: false,
        }
    }
}

fn port_rule(protocol: &str, port: u16, target: &str) -> String {
    format!("-p {protocol} -m {protocol} --dport {port} -j {target}")
}

fn to_port(protocol: &str, port: u16) -> String {
    format!("-p {protocol} -j REDIRECT --to-ports {port}")
}

#[cfg(test)]
mod tests;
