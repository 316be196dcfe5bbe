use std::{collections::BTreeMap, net::IpAddr, str::SplitWhitespace};

use ipnet::IpNet;

use super::{Match, Rule, Table, Target, What};
use crate::{Family, Protocol};

/// The hooks at which the `nat` table has a chain of its own.
const BUILTIN: [&str; 4] = ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"];

/// Why the text of a table is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct ParseError {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: String,
}

/// A problem of which the line is not known yet.
type Problem = String;

pub(super) fn table(family: Family, text: &str) -> Result<Table, ParseError> {
    let mut reader = Reader {
        family,
        place: Place::Before,
        chains: BTreeMap::new(),
    };
    let mut last = 0;
    for (index, line) in text.lines().enumerate() {
        last = index + 1;
        reader.line(line.trim()).map_err(|problem| ParseError {
            line: last,
            problem,
        })?;
    }
    reader.finish().map_err(|problem| ParseError {
        line: last,
        problem,
    })
}

#[derive(PartialEq, Eq)]
enum Place {
    Before,
    Inside,
    After,
}

struct Reader {
    family: Family,
    place: Place,
    chains: BTreeMap<String, Vec<Rule>>,
}

impl Reader {
    fn line(&mut self, line: &str) -> Result<(), Problem> {
        if line.is_empty() || line.starts_with('#') {
            return Ok(());
        }
        match (&self.place, line) {
            (Place::Before, "*nat") => {
                self.place = Place::Inside;
                Ok(())
            }
            (Place::Inside, "COMMIT") => {
                self.place = Place::After;
                Ok(())
            }
            (Place::Inside, _) => self.inside(line),
            (Place::Before | Place::After, _) => {
                Err(format!("`{line}` is outside the one nat table"))
            }
        }
    }

    fn inside(&mut self, line: &str) -> Result<(), Problem> {
        if let Some(declaration) = line.strip_prefix(':') {
            return self.chain(declaration);
        }
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("-A"), Some(name)) => {
                let rule = RuleReader::new(self.family, words).rule()?;
                let chain = self
                    .chains
                    .get_mut(name)
                    .ok_or_else(|| format!("there is no chain {name}"))?;
                chain.push(rule);
                Ok(())
            }
            _ => Err(format!("`{line}` is neither a chain nor a rule")),
        }
    }

    fn chain(&mut self, declaration: &str) -> Result<(), Problem> {
        let words: Vec<_> = declaration.split_whitespace().collect();
        let (name, policy) = match words[..] {
            [name, policy] | [name, policy, _] => (name, policy),
            _ => return Err(format!("`:{declaration}` is not `:NAME POLICY [counters]`")),
        };
        let expected = if BUILTIN.contains(&name) {
            "ACCEPT"
        } else {
            "-"
        };
        if policy != expected {
            return Err(format!("policy {policy} of chain {name} is not supported"));
        }
        if self.chains.insert(name.to_owned(), Vec::new()).is_some() {
            return Err(format!("chain {name} is there twice"));
        }
        Ok(())
    }

    fn finish(self) -> Result<Table, Problem> {
        if self.place != Place::After {
            return Err("the nat table does not end with COMMIT".to_owned());
        }
        for start in BUILTIN {
            let mut path = Vec::new();
            self.walk(start, &mut path)?;
        }
        Ok(Table {
            family: self.family,
            chains: self.chains,
        })
    }

    /// Follows every jump from the last chain of `path`, as the kernel does
    /// when it takes a table.
    fn walk<'a>(&'a self, chain: &'a str, path: &mut Vec<&'a str>) -> Result<(), Problem> {
        if path.contains(&chain) {
            return Err(format!("chain {chain} leads back to itself"));
        }
        path.push(chain);
        for rule in self.chains.get(chain).into_iter().flatten() {
            if path[0] == "PREROUTING" && rule.asks_for_owner() {
                return Err(format!(
                    "chain {chain} asks for the owner, and PREROUTING leads there: \
                     a packet from outside has none"
                ));
            }
            if let Target::Jump(to) = &rule.target {
                if !self.chains.contains_key(to) {
                    return Err(format!(
                        "chain {chain} jumps to {to}, which is no chain and no known target"
                    ));
                }
                self.walk(to, path)?;
            }
        }
        path.pop();
        Ok(())
    }
}

impl Rule {
    fn asks_for_owner(&self) -> bool {
        self.matches
            .iter()
            .any(|m| matches!(m.what, What::Uid(_) | What::Gid(_)))
    }

    /// The protocol that `-p` names.
    fn protocol(&self) -> Option<Protocol> {
        self.matches
            .iter()
            .find_map(|m| match (m.negated, &m.what) {
                (false, What::Protocol(protocol)) => Some(*protocol),
                _ => None,
            })
    }
}

/// Reads what follows `-A CHAIN`.
struct RuleReader<'a> {
    family: Family,
    words: SplitWhitespace<'a>,
    modules: Vec<&'a str>,
    /// A `!` was read, and what it negates was not yet.
    negated: bool,
    rule: Rule,
}

impl<'a> RuleReader<'a> {
    fn new(family: Family, words: SplitWhitespace<'a>) -> Self {
        Self {
            family,
            words,
            modules: Vec::new(),
            negated: false,
            rule: Rule {
                matches: Vec::new(),
                target: Target::Return,
            },
        }
    }

    fn rule(mut self) -> Result<Rule, Problem> {
        while let Some(word) = self.words.next() {
            match word {
                "!" => self.negate()?,
                "-j" => {
                    self.rule.target = self.target()?;
                    return match self.words.next() {
                        Some(word) => Err(format!("`{word}` after the target")),
                        None => Ok(self.rule),
                    };
                }
                "-m" => self.module()?,
                option => self.option(option)?,
            }
        }
        Err("the rule has no target".to_owned())
    }

    fn negate(&mut self) -> Result<(), Problem> {
        if self.negated {
            return Err("`!` twice".to_owned());
        }
        self.negated = true;
        Ok(())
    }

    fn module(&mut self) -> Result<(), Problem> {
        let module = self.value("-m")?;
        let known = match module {
            "tcp" => self.rule.protocol() == Some(Protocol::Tcp),
            "udp" => self.rule.protocol() == Some(Protocol::Udp),
            "multiport" => self.rule.protocol().is_some(),
            "owner" => true,
            _ => false,
        };
        if !known || self.negated {
            return Err(format!(
                "`-m {module}` is not supported here (a module of ports needs its -p first)"
            ));
        }
        self.modules.push(module);
        Ok(())
    }

    fn option(&mut self, option: &str) -> Result<(), Problem> {
        let value = self.value(option)?;
        let what = match option {
            "-p" => What::Protocol(protocol(value)?),
            "-s" => What::Source(self.net(value)?),
            "-d" => What::Destination(self.net(value)?),
            "-i" => What::Incoming(interface(value)?),
            "-o" => What::Outgoing(interface(value)?),
            "--dport" if self.rule.protocol().is_some() => What::Ports(vec![port(value)?]),
            "--dports" if self.modules.contains(&"multiport") => {
                What::Ports(value.split(',').map(port).collect::<Result<_, _>>()?)
            }
            "--uid-owner" if self.modules.contains(&"owner") => What::Uid(id(value)?),
            "--gid-owner" if self.modules.contains(&"owner") => What::Gid(id(value)?),
            _ => return Err(format!("`{option}` is not supported here")),
        };
        self.rule.matches.push(Match {
            negated: std::mem::take(&mut self.negated),
            what,
        });
        Ok(())
    }

    fn target(&mut self) -> Result<Target, Problem> {
        let name = self.value("-j")?;
        if self.negated {
            return Err("`!` before or in the target".to_owned());
        }
        match name {
            "RETURN" => Ok(Target::Return),
            "ACCEPT" => Ok(Target::Accept),
            "REDIRECT" => self.redirect(),
            chain => Ok(Target::Jump(chain.to_owned())),
        }
    }

    fn redirect(&mut self) -> Result<Target, Problem> {
        if self.rule.protocol().is_none() {
            return Err("REDIRECT to a port needs -p".to_owned());
        }
        match (self.words.next(), self.words.next()) {
            (Some("--to-ports"), Some(value)) => Ok(Target::Redirect(port(value)?)),
            _ => Err("REDIRECT without `--to-ports PORT`".to_owned()),
        }
    }

    /// The value of `option`; older versions of iptables put the `!` before it.
    fn value(&mut self, option: &str) -> Result<&'a str, Problem> {
        let mut next = || {
            self.words
                .next()
                .ok_or_else(|| format!("`{option}` without a value"))
        };
        let value = next()?;
        if value != "!" {
            return Ok(value);
        }
        let value = next()?;
        self.negate()?;
        Ok(value)
    }

    fn net(&self, value: &str) -> Result<IpNet, Problem> {
        let net: Option<IpNet> = value
            .parse()
            .ok()
            .or_else(|| value.parse::<IpAddr>().ok().map(IpNet::from));
        match net {
            Some(net) if self.family.has(&net) => Ok(net),
            _ => Err(format!("`{value}` is no address range of this family")),
        }
    }
}

fn protocol(value: &str) -> Result<Protocol, Problem> {
    match value {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err(format!("protocol `{value}` is not supported")),
    }
}

fn interface(value: &str) -> Result<String, Problem> {
    if value.ends_with('+') {
        return Err(format!(
            "a prefix of interfaces (`{value}`) is not supported"
        ));
    }
    Ok(value.to_owned())
}

fn port(value: &str) -> Result<u16, Problem> {
    value
        .parse()
        .map_err(|error| format!("`{value}` is no single port: {error}"))
}

fn id(value: &str) -> Result<u32, Problem> {
    value
        .parse()
        .map_err(|error| format!("`{value}` is no single numeric id: {error}"))
}
