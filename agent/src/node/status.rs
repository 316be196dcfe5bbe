//! What the agent says of itself.

use std::{net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};
use shunt_abi::NetnsCookie;

use crate::{
    datapath::{CounterReport, KernelObject, SpliceStatus},
    pods::PodRef,
    settings::Settings,
};

/// The agent and what it has enrolled.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// The attached programs.
    pub programs: Vec<KernelObject>,
    /// The maps.
    pub maps: Vec<KernelObject>,
    /// How splicing is set, and why.
    pub splice: SpliceStatus,
    /// The enrolled namespaces.
    pub pods: Vec<PodStatus>,
}

/// What is in force in a namespace, without what it takes the kernel to tell.
#[derive(Clone, Debug)]
pub struct Enrolled {
    /// Where its namespace was found.
    pub netns: PathBuf,
    /// The kernel's name of the namespace.
    pub cookie: NetnsCookie,
    /// Its settings.
    pub settings: Settings,
    /// The resolvers whose DNS is captured, when it is.
    pub resolvers: Vec<IpAddr>,
    /// The pod whose namespace it is, where that is known.
    pub pod: Option<PodRef>,
}

/// What the agent says of a pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodStatus {
    /// Where its namespace was found.
    pub netns: PathBuf,
    /// The kernel's name of the namespace.
    pub cookie: NetnsCookie,
    /// Its settings.
    pub settings: Settings,
    /// The resolvers whose DNS is captured, when it is.
    pub resolvers: Vec<IpAddr>,
    /// The pod whose namespace it is, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
    /// What the programs counted.
    pub counters: CounterReport,
}
