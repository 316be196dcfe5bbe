//! A pod of the mesh: an application, its sidecar, and the way of a request
//! between two of them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use crate::{
    Agent, Envoy, Node, Owner, Pod,
    envoy::{self, APPLICATION_PORT, Connection},
    http::{self, HttpServer, Response},
    iptables,
};

/// What Istio's injector gives `istio-iptables` when nobody has asked for
/// anything else.
pub const ISTIO_DEFAULTS: [&str; 16] = [
    "-p",
    "15001",
    "-z",
    "15006",
    "-u",
    "1337",
    "-g",
    "1337",
    "-m",
    "REDIRECT",
    "-i",
    "*",
    "-b",
    "*",
    "-d",
    "15090,15021,15020",
];

/// A pod with a real web server and a real Envoy in it.
#[derive(Debug)]
pub struct MeshPod {
    envoy: Envoy,
    application: HttpServer,
    pod: Pod,
}

impl MeshPod {
    /// Makes the pod and starts both; they answer when this returns. Nothing is
    /// redirected yet.
    ///
    /// # Panics
    ///
    /// When one of them does not start.
    pub fn start(node: &Node, name: &str) -> Self {
        let pod = node.pod(name);
        let text = format!("hello from the application of {name}\n");
        Self {
            application: HttpServer::start(pod.netns(), Owner::APP, APPLICATION_PORT, &text),
            envoy: Envoy::start(&pod),
            pod,
        }
    }

    /// Enrols it with [`ISTIO_DEFAULTS`].
    ///
    /// # Panics
    ///
    /// When the agent refuses.
    pub fn enroll(&self, agent: &Agent) {
        agent.enroll(self.pod.netns(), &ISTIO_DEFAULTS);
    }

    /// The pod.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Its sidecar.
    pub fn envoy(&self) -> &Envoy {
        &self.envoy
    }

    /// Its application.
    pub fn application(&self) -> &HttpServer {
        &self.application
    }

    /// Where its application listens.
    pub fn address(&self) -> SocketAddr {
        (self.pod.ip(), APPLICATION_PORT).into()
    }

    /// Its application asks for `/` at `server`.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn get(&self, server: SocketAddr) -> Result<Response, String> {
        http::get(self.pod.netns(), Owner::APP, server, "/")
    }

    /// What there is in this pod of what shunt does without.
    ///
    /// # Panics
    ///
    /// When `iptables-save` or `conntrack` fails.
    pub fn traces(&self) -> Traces {
        Traces {
            rules: iptables::rules(self.pod.netns()).len(),
            conntrack: self.pod.conntrack_entries(),
        }
    }
}

/// What redirection by rules leaves in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traces {
    /// The number of iptables rules.
    pub rules: usize,
    /// The number of tracked connections.
    pub conntrack: u64,
}

impl Traces {
    /// None at all.
    pub const NONE: Self = Self {
        rules: 0,
        conntrack: 0,
    };
}

/// The source address with which the sidecar calls its application.
pub const SIDECAR_SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 6));

/// The way of one request, as the proxies on it have logged it.
#[derive(Clone, Debug)]
pub struct Journey {
    /// On its way out of the pod of the client.
    pub outbound: Connection,
    /// On its way into the pod of the server.
    pub inbound: Connection,
}

impl Journey {
    /// Waits for the logs of a request from the application of `client` to
    /// `asked`, that ended at the application of `server`.
    ///
    /// # Panics
    ///
    /// When one of the proxies has not seen it.
    pub fn of(client: &MeshPod, asked: SocketAddr, server: &MeshPod) -> Self {
        Self {
            outbound: client.envoy.connection(envoy::OUTBOUND, asked),
            inbound: server.envoy.connection(envoy::INBOUND, server.address()),
        }
    }
}

/// How much each counter of `after` is above that of `before`; those that have
/// not moved are left out.
pub fn moved(
    before: &BTreeMap<String, u64>,
    after: &BTreeMap<String, u64>,
) -> BTreeMap<String, u64> {
    after
        .iter()
        .map(|(name, &now)| {
            let then = before.get(name).copied().unwrap_or(0);
            (name.clone(), now.saturating_sub(then))
        })
        .filter(|&(_, by)| by > 0)
        .collect()
}
