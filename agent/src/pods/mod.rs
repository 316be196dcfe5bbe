//! The pods of this node that a mesh has given a sidecar.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// Which pod it is: its place in the API and its incarnation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodRef {
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid: a pod that is rebuilt under the same name has another.
    pub uid: String,
}

/// A pod that is to be redirected, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The pod.
    pub pod: PodRef,
    /// Its settings.
    pub settings: Settings,
    /// Whom the pod asks for names.
    pub resolvers: Vec<IpAddr>,
}
