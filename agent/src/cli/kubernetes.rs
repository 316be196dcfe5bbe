//! The flags of `shunt run` on a Kubernetes node.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::pods::{Config, Connection};

/// Which pods the agent looks after by itself.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Kubernetes")]
pub struct KubernetesFlags {
    /// Redirect the pods of this node that a mesh has given a sidecar
    #[arg(long, env = "SHUNT_KUBERNETES", requires = "node_name")]
    kubernetes: bool,
    /// The name of this node in the Kubernetes API
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// Namespaces whose pods are left alone
    #[arg(
        long,
        env = "SHUNT_EXCLUDE_NAMESPACES",
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "kube-system"
    )]
    exclude_namespaces: Vec<String>,
    /// Where the processes of the node are seen
    #[arg(long, env = "SHUNT_PROC", value_name = "PATH", default_value = "/proc")]
    proc: PathBuf,
}

impl KubernetesFlags {
    /// Finds out where the API is, if it is needed.
    ///
    /// # Errors
    ///
    /// When nothing says so. It need not answer yet.
    pub(super) async fn connection(&self) -> Result<Option<Connection>> {
        if !self.kubernetes {
            return Ok(None);
        }
        let config = Config {
            node_name: self
                .node_name
                .clone()
                .context("--kubernetes needs --node-name, or NODE_NAME")?,
            excluded_namespaces: names(&self.exclude_namespaces),
            proc: self.proc.clone(),
        };
        Connection::infer(config).await.map(Some)
    }
}

/// Blanks around a name, and empty names, are ignored.
fn names<C: FromIterator<String>>(list: &[String]) -> C {
    let names = list.iter().map(|name| name.trim());
    let names = names.filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}
