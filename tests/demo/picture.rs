//! The way of one request, drawn.

use std::fmt;

use shunt_tests::mesh::Journey;

/// A request from one application to another, as both proxies saw it.
pub(crate) struct Picture<'a> {
    client: &'a str,
    server: &'a str,
    journey: &'a Journey,
}

impl<'a> Picture<'a> {
    /// Of a request from the pod called `client` to the one called `server`.
    pub(crate) fn of(client: &'a str, server: &'a str, journey: &'a Journey) -> Self {
        Self {
            client,
            server,
            journey,
        }
    }
}

impl fmt::Display for Picture<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            client,
            server,
            journey: Journey { outbound, inbound },
        } = self;
        let asked = outbound.original_dst;
        writeln!(
            f,
            "application of {client}, {}, asks for {asked}",
            outbound.peer
        )?;
        writeln!(f, "  │  connect() is rewritten to 127.0.0.1:15001")?;
        writeln!(f, "  ▼")?;
        writeln!(f, "Envoy of {client}: from {}", outbound.peer)?;
        writeln!(f, "  │                original destination {asked}")?;
        writeln!(f, "  │                passed on to {}", outbound.upstream)?;
        if client == server {
            writeln!(
                f,
                "  │  the proxy's connect() to its own pod is rewritten to 15006"
            )?;
        } else {
            writeln!(f, "  │  sk_lookup gives it to the listener on 15006")?;
        }
        writeln!(f, "  ▼")?;
        writeln!(f, "Envoy of {server}: from {}", inbound.peer)?;
        writeln!(
            f,
            "  │                original destination {}",
            inbound.original_dst
        )?;
        writeln!(f, "  │                passed on to {}", inbound.upstream)?;
        writeln!(f, "  │  from {}: left alone", inbound.upstream_source)?;
        writeln!(f, "  ▼")?;
        writeln!(f, "application of {server}\n")
    }
}
