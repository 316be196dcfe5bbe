//! What the agent learns from a pod's network namespace, and how it stays
//! current.
//!
//! [`Network::read`] takes a snapshot of routes, addresses and interfaces;
//! [`Topology`] is what of it the programs look up. [`Watch`] tells when a
//! namespace has changed or is gone, by the id ([`Nsid`]) that [`Nsids`] gave it.
//! Nothing here keeps a namespace alive for longer than a snapshot takes.

mod addresses;
mod interfaces;
mod nsid;
mod routes;
mod watch;

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};

pub use self::{
    nsid::{Nsid, Nsids},
    routes::{RouteTable, route_key},
    watch::{Changes, Watch},
};
use crate::{
    netns::Netns,
    settings::{Families, Settings},
};

/// A network namespace at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// What each destination comes to.
    pub routes: RouteTable,
    /// Its addresses, in the order in which Istio looks at them.
    pub addresses: Vec<IpAddr>,
    /// The names of its interfaces, by index.
    pub interfaces: BTreeMap<u32, String>,
}

impl Network {
    /// Takes a snapshot of a namespace. What changes meanwhile may be in it or
    /// not: watch the namespace first, and what is not will be reported.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or the kernel does not answer.
    pub fn read(netns: &Netns) -> Result<Self> {
        let network = netns.within(|| {
            // A runtime of its own: the socket belongs to the namespace in which
            // it is opened, and is closed before the thread ends.
            tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()
                .context("cannot start a runtime")?
                .block_on(read_current())
        })?;
        network.with_context(|| format!("cannot read the network of {}", netns.path().display()))
    }

    /// Which address families the rules of these settings speak of here.
    pub fn families(&self, settings: &Settings) -> Families {
        Families::of(&self.addresses, settings.dual_stack)
    }

    /// What the programs look up, under these settings.
    pub fn topology(&self, settings: &Settings) -> Topology {
        Topology {
            routes: self.routes.clone(),
            interfaces: interfaces::marks(&self.interfaces, settings),
        }
    }
}

/// What of a network the maps hold for the programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// The entries of the trie `ROUTES`.
    pub routes: RouteTable,
    /// The entries of the map `INTERFACES`: index to `INTERFACE_…` bits.
    pub interfaces: BTreeMap<u32, u32>,
}

/// Reads the namespace of the calling thread.
async fn read_current() -> Result<Network> {
    let (connection, handle, _messages) =
        rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let connection = tokio::spawn(connection);
    let network = Network {
        interfaces: interfaces::read(&handle).await?,
        addresses: addresses::read(&handle).await?,
        routes: routes::read(&handle).await?,
    };
    connection.abort();
    Ok(network)
}
