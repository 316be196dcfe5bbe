//! `/healthz`, `/readyz` and `/metrics`.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, task::JoinHandle};

use super::{
    answers::{Answers, Life},
    health::Readiness,
    http,
    metrics::{self, Metrics},
};
use crate::{node::WeakNode, pods::PodsState};

/// How Prometheus knows the format of OpenMetrics.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers over HTTP until it is dropped.
pub struct Server {
    shown: Arc<Shown>,
    address: SocketAddr,
    task: JoinHandle<Infallible>,
}

/// What there is to show.
struct Shown {
    metrics: Arc<Metrics>,
    readiness: Arc<Readiness>,
    answers: Arc<Answers>,
    pods: OnceLock<Arc<PodsState>>,
}

impl Server {
    /// Listens at `address` and answers. The node is not there yet:
    /// [`watch`](Self::watch) tells it.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened to.
    pub async fn start(
        address: SocketAddr,
        metrics: Arc<Metrics>,
        readiness: Arc<Readiness>,
    ) -> Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!(
                "cannot listen at {address} for health and metrics; name a free port, and an \
                 address of this machine, with --listen"
            )
        })?;
        let address = listener.local_addr().unwrap_or(address);
        let shown = Arc::new(Shown {
            metrics,
            readiness,
            answers: Arc::default(),
            pods: OnceLock::new(),
        });
        let router = Router::new()
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics_page))
            .with_state(Arc::clone(&shown));
        tracing::info!(%address, "serving health and metrics");
        let task = tokio::spawn(http::serve(listener, router));
        Ok(Self {
            shown,
            address,
            task,
        })
    }

    /// Where it listens; the port is the real one when 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The node whose thread has to be alive, and whose counters are shown.
    pub fn watch(&self, node: WeakNode) {
        self.shown.answers.of(node);
    }

    /// The pods of the node are followed: the agent is not ready before the first of
    /// them are enrolled. Later calls change nothing.
    pub fn follow_pods(&self, pods: Arc<PodsState>) {
        let _ = self.shown.pods.set(pods);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why the agent has to be started anew; `None` when it has not.
fn illness(life: &Life) -> Option<String> {
    match life {
        Life::Starting | Life::Alive => None,
        Life::Stuck(busy) => Some(format!(
            "the node's thread has not answered for {} s",
            busy.as_secs()
        )),
        Life::Ended => Some("the node's thread has ended; its log says why".to_owned()),
    }
}

async fn healthz(State(shown): State<Arc<Shown>>) -> Response {
    let (life, _) = shown.answers.ask().await;
    verdict(illness(&life).into_iter().collect())
}

async fn readyz(State(shown): State<Arc<Shown>>) -> Response {
    let (life, _) = shown.answers.ask().await;
    verdict(shown.not_ready(&life))
}

/// 200 where nothing speaks against it, or 503 and what does.
fn verdict(against: Vec<String>) -> Response {
    if against.is_empty() {
        return "ok\n".into_response();
    }
    let text = against.join("\n") + "\n";
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

impl Shown {
    fn not_ready(&self, life: &Life) -> Vec<String> {
        let mut against = self.readiness.missing();
        against.extend(self.pods.get().and_then(|pods| not_synced(pods)));
        against.extend(illness(life));
        against
    }
}

/// Why pods of the mesh may not be redirected yet.
fn not_synced(pods: &PodsState) -> Option<String> {
    if pods.is_synced() {
        return None;
    }
    let lag = pods.watch_lag();
    Some(if lag.is_zero() {
        "first sync: the pods of this node are not all listed and enrolled yet".to_owned()
    } else {
        format!(
            "first sync: the Kubernetes API has not answered for {} s; is it there, and may this \
             agent list and watch pods?",
            lag.as_secs()
        )
    })
}

async fn metrics_page(State(shown): State<Arc<Shown>>) -> Response {
    let (life, said) = shown.answers.ask().await;
    let ready = life == Life::Alive && shown.not_ready(&life).is_empty();
    match shown.metrics.render(metrics::Shown {
        said,
        pods: shown.pods.get().cloned(),
        ready,
    }) {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => {
            tracing::error!(error = %error, "cannot write the metrics");
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                "the metrics cannot be written\n",
            )
                .into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::{super::health::ATTACHED, *};
    use crate::node::handle_for_tests;

    /// The status line and the rest of an answer.
    async fn get(server: &Server, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(server.address())
            .await
            .expect("it listens");
        let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
        stream
            .write_all(request.as_bytes())
            .await
            .expect("it reads");
        let mut text = String::new();
        stream
            .read_to_string(&mut text)
            .await
            .expect("it answers in text");
        let (status, rest) = text.split_once("\r\n").expect("a status line");
        (status.to_owned(), rest.to_owned())
    }

    async fn server(readiness: &Arc<Readiness>) -> Server {
        let any = (Ipv4Addr::LOCALHOST, 0).into();
        Server::start(any, Metrics::new(), Arc::clone(readiness))
            .await
            .expect("some port is free")
    }

    #[tokio::test]
    async fn readiness_comes_and_goes_with_its_conditions() {
        let readiness = Arc::new(Readiness::default());
        readiness.not_yet(ATTACHED, "the programs are being loaded");
        let server = server(&readiness).await;
        let (status, text) = get(&server, "/readyz").await;
        assert!(status.contains("503"), "{status}");
        assert!(
            text.contains("attached: the programs are being loaded"),
            "{text}"
        );
        // It has not died for that.
        assert!(get(&server, "/healthz").await.0.contains("200"));
        readiness.met(ATTACHED);
        assert!(get(&server, "/readyz").await.0.contains("200"));
        readiness.not_yet(ATTACHED, "lost");
        assert!(get(&server, "/readyz").await.0.contains("503"));
    }

    #[tokio::test]
    async fn an_agent_whose_node_has_ended_is_neither_healthy_nor_ready() {
        let server = server(&Arc::default()).await;
        let (node, inbox) = handle_for_tests();
        server.watch(node.downgrade());
        drop(inbox);
        for path in ["/healthz", "/readyz"] {
            let (status, text) = get(&server, path).await;
            assert!(
                status.contains("503") && text.contains("has ended"),
                "{text}"
            );
        }
        let (status, text) = get(&server, "/metrics").await;
        assert!(
            status.contains("200") && text.contains("shunt_ready 0"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn with_kubernetes_it_is_ready_after_the_first_sync() {
        let server = server(&Arc::default()).await;
        assert!(get(&server, "/readyz").await.0.contains("200"));
        let pods = Arc::new(PodsState::default());
        server.follow_pods(Arc::clone(&pods));
        let (status, text) = get(&server, "/readyz").await;
        assert!(
            status.contains("503") && text.contains("first sync: the pods"),
            "{text}"
        );
        pods.set_synced();
        assert!(get(&server, "/readyz").await.0.contains("200"));
    }

    /// Nobody answers for the node, and still there are metrics.
    #[tokio::test]
    async fn a_busy_node_holds_nobody_up() {
        let server = server(&Arc::default()).await;
        let (node, _inbox) = handle_for_tests();
        server.watch(node.downgrade());
        let (status, text) = get(&server, "/metrics").await;
        assert!(
            status.contains("200") && text.contains("shunt_build_info"),
            "{text}"
        );
        assert!(text.contains(OPEN_METRICS), "{text}");
        assert!(get(&server, "/healthz").await.0.contains("200"));
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_named() {
        let taken = server(&Arc::default()).await;
        let error = Server::start(taken.address(), Metrics::new(), Arc::default())
            .await
            .err()
            .map(|error| error.to_string());
        let error = error.expect("it is taken");
        assert!(error.contains("--listen"), "{error}");
    }
}
