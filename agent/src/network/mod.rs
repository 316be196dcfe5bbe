//! What the agent learns from a pod's network namespace, and how it stays
//! current.
//!
//! [`Network::read`] takes a snapshot of routes, addresses and interfaces;
//! its routes, and the interfaces that the settings name ([`MarkedInterfaces`]), are
//! what the programs look up. [`Watch`] tells when a
//! namespace has changed or is gone, by the id ([`Nsid`]) that [`Nsids`] gave it.
//! Nothing here keeps a namespace alive for longer than a snapshot takes.

mod addresses;
mod interfaces;
mod nsid;
mod routes;
mod watch;

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use netlink_packet_route::address::AddressMessage;
use rtnetlink::Handle;
use shunt_abi::{Addr, Hairpin};

pub use self::{
    interfaces::{Link, MarkedInterfaces, OwnAddresses, virtual_ones},
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
    /// Its interfaces, by index.
    pub interfaces: BTreeMap<u32, Link>,
    /// The addresses that stand for them.
    pub own_addresses: BTreeMap<u32, OwnAddresses>,
}

impl Network {
    /// Takes a snapshot of a namespace. What changes meanwhile may be in it or
    /// not: watch the namespace first, and what is not will be reported.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or the kernel does not answer.
    pub fn read(netns: &Netns) -> Result<Self> {
        ask_kernel(netns, read_current)
            .with_context(|| format!("cannot read the network of {}", netns.path().display()))
    }

    /// Takes a snapshot of a namespace in which the proxy can call its own
    /// application over IPv6: from `::6`, which, unlike 127.0.0.6, is nobody's
    /// address before it is given to lo. Istio's init container does the same;
    /// the address stays when the redirection ends.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), or when the address cannot be added.
    pub fn read_with_proxy_source(netns: &Netns, settings: &Settings) -> Result<Self> {
        let network = Self::read(netns)?;
        if !network.lacks_proxy_source(settings) {
            return Ok(network);
        }
        ask_kernel(netns, addresses::add_proxy_source).with_context(|| {
            format!(
                "cannot give ::6, from which the proxy calls its application, to lo of {}; \
                 is IPv6 disabled for lo there (net.ipv6.conf.lo.disable_ipv6)?",
                netns.path().display()
            )
        })?;
        Self::read(netns)
    }

    fn lacks_proxy_source(&self, settings: &Settings) -> bool {
        let calls_from_it = matches!(settings.hairpin, Hairpin::Spared | Hairpin::Tunnel);
        calls_from_it && self.families(settings).v6 && !self.addresses.contains(&Addr::SIX6.to_ip())
    }

    /// Which address families the rules of these settings speak of here.
    pub fn families(&self, settings: &Settings) -> Families {
        Families::of(&self.addresses, settings.dual_stack)
    }

    /// The interfaces that these settings name.
    pub fn marked(&self, settings: &Settings) -> MarkedInterfaces {
        interfaces::marks(&self.interfaces, &self.own_addresses, settings)
    }
}

/// Asks the kernel by a netlink socket of the namespace, which is closed when
/// the answer is there.
fn ask_kernel<T, F>(netns: &Netns, ask: impl FnOnce(Handle) -> F + Send) -> Result<T>
where
    T: Send,
    F: Future<Output = Result<T>>,
{
    // A thread and a runtime of its own: the socket belongs to the namespace in
    // which it is opened.
    netns.within(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a runtime")?
            .block_on(async {
                let (connection, handle, _messages) =
                    rtnetlink::new_connection().context("cannot open a netlink socket")?;
                let connection = tokio::spawn(connection);
                let answer = ask(handle).await;
                connection.abort();
                answer
            })
    })?
}

async fn read_current(handle: Handle) -> Result<Network> {
    let addresses: Vec<AddressMessage> = addresses::read(&handle).await?;
    Ok(Network {
        interfaces: interfaces::read(&handle).await?,
        own_addresses: interfaces::own_addresses(&addresses),
        addresses: addresses.iter().filter_map(addresses::own).collect(),
        routes: routes::read(&handle).await?,
    })
}
