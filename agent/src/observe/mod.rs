//! What the agent says of itself: health, metrics, events, logs.
//!
//! [`Metrics`] and [`Readiness`] are told by whoever knows; [`Server`] shows them over
//! HTTP, with what the [`node`](crate::node) has counted. Nothing here waits for the
//! node's thread for longer than a moment.

mod answers;
pub(crate) mod events;
pub mod health;
mod http;
pub mod logs;
pub mod metrics;
mod server;

use std::{net::SocketAddr, sync::Arc};

use anyhow::Result;
use clap::Args;

pub use self::{
    health::Readiness,
    logs::LogFormat,
    metrics::{CniAdd, Metrics},
    server::Server,
};

/// How the agent shows what it does.
#[derive(Args, Clone, Debug, Default)]
pub struct ObserveFlags {
    /// Where to answer /metrics, /healthz and /readyz over HTTP, such as 0.0.0.0:15087
    /// [default: nowhere]
    #[arg(long, env = "SHUNT_LISTEN", value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// How a line of the log is written
    #[arg(
        long,
        env = "SHUNT_LOG_FORMAT",
        value_enum,
        value_name = "FORMAT",
        default_value_t
    )]
    pub log_format: LogFormat,
}

impl ObserveFlags {
    /// Serves over HTTP, where that is asked for, until what it gives is dropped.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened to.
    pub async fn serve(
        &self,
        metrics: &Arc<Metrics>,
        readiness: &Arc<Readiness>,
    ) -> Result<Option<Server>> {
        match self.listen {
            None => Ok(None),
            Some(address) => Server::start(address, Arc::clone(metrics), Arc::clone(readiness))
                .await
                .map(Some),
        }
    }
}
