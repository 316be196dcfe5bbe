//! What the plugin asks of the agent.
//!
//! The agent answers [`Done`](crate::control::Reply::Done) when the runtime may go on,
//! [`Undecided`](crate::control::Reply::Undecided) when it cannot tell just now whether
//! the pod is to be redirected, and [`Failed`](crate::control::Reply::Failed) when it is
//! and could not be.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::pods::PodRef;

/// A call of the plugin, as far as it concerns the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CniRequest {
    /// A pod's network has just been made: redirect it, if it is of a mesh.
    Add(PodNetwork),
    /// Say whether a pod is redirected as it should be.
    Check(PodNetwork),
    /// A container's network is taken down.
    Del {
        /// Which container's.
        attachment: Attachment,
        /// Where its namespace was, as long as the runtime knows.
        #[serde(default, deserialize_with = "optional_path")]
        netns: Option<PathBuf>,
    },
    /// Of a network, these containers are all there are.
    Gc {
        /// The network's name.
        network: String,
        /// What is left of it.
        valid: Vec<Attachment>,
    },
    /// Say whether the agent serves.
    Status,
}

/// What a runtime calls a container's connection to a network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// The name of the network.
    pub network: String,
    /// The id of the container: for a pod that of its sandbox.
    pub container: String,
    /// The interface in the pod.
    pub interface: String,
}

/// The network of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// What the runtime calls it.
    pub attachment: Attachment,
    /// Where its namespace is, as the node's own processes see it.
    #[serde(deserialize_with = "crate::netns::absolute_path")]
    pub netns: PathBuf,
    /// The pod.
    pub pod: PodRef,
}

fn optional_path<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    struct Absolute(#[serde(deserialize_with = "crate::netns::absolute_path")] PathBuf);
    let path = Option::<Absolute>::deserialize(from)?;
    Ok(path.map(|Absolute(path)| path))
}
