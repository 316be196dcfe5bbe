//! The real proxy.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::PathBuf,
    sync::Arc,
};

use nix::unistd::Pid;
use serde::Deserialize;

use crate::{
    Netns, Owner, Pod, Process,
    deadline::{DEADLINE, wait_until},
    http,
};

/// The listener for connections that leave the pod, on port 15001.
pub const OUTBOUND: &str = "out";
/// The listener for connections that come into the pod, on port 15006.
pub const INBOUND: &str = "in";
/// The port that answers whether the proxy is healthy, on `/healthz/ready`.
pub const HEALTH_PORT: u16 = 15021;
/// A service of which every pod is the only endpoint, as far as its own proxy
/// knows.
pub const SERVICE: SocketAddr = SocketAddr::V4(SocketAddrV4::new(
    Ipv4Addr::new(10, 96, 0, 10),
    APPLICATION_PORT,
));
/// The port of the applications behind [`SERVICE`].
pub const APPLICATION_PORT: u16 = 8080;
/// How many threads serve connections, each with listeners of its own.
pub const WORKERS: usize = 2;

const ADMIN: ([u8; 4], u16) = ([127, 0, 0, 1], 15000);
const CONFIG: &str = include_str!("../fixtures/envoy-sidecar.yaml");
const DEFAULT_BINARY: &str = "/var/cache/shunt/envoy/1.40.0/envoy";

/// An Envoy that behaves like a sidecar, with user and group 1337.
#[derive(Debug)]
pub struct Envoy {
    process: Process,
    netns: Arc<Netns>,
    workers: usize,
}

/// One connection through Envoy, from its access log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Connection {
    /// Who connected.
    pub peer: SocketAddr,
    /// Where to, as the kernel told Envoy.
    pub original_dst: SocketAddr,
    /// Where Envoy has passed it on to; `-` when nowhere.
    pub upstream: String,
    /// From which address.
    pub upstream_source: String,
    /// What went wrong, in Envoy's abbreviations; `-` when nothing did.
    pub flags: String,
}

impl Envoy {
    /// Starts one in `pod`. It accepts when this returns, and ends with the
    /// thread that called this.
    ///
    /// # Panics
    ///
    /// When the binary is missing or does not become ready.
    pub fn start(pod: &Pod) -> Self {
        Self::start_with(pod, &config(pod))
    }

    /// The same with another configuration (YAML), whose admin port is the one
    /// of the fixture.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_with(pod: &Pod, config: &str) -> Self {
        Self::start_with_workers(pod, config, WORKERS)
    }

    /// The same with so many threads in place of [`WORKERS`].
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_with_workers(pod: &Pod, config: &str, workers: usize) -> Self {
        let mut command = pod.netns().command(binary(), Owner::PROXY);
        command
            .args(["--config-yaml", config])
            .args(["--concurrency", &workers.to_string()])
            // Neither shared memory nor a socket that outlives it.
            .arg("--disable-hot-restart")
            .args(["--log-level", "warning"])
            .args(["--file-flush-interval-msec", "10"]);
        let name = format!("envoy of {}", pod.netns().purpose());
        let envoy = Self {
            process: Process::spawn(&name, &mut command),
            netns: Arc::clone(pod.netns()),
            workers,
        };
        envoy.wait_until_ready();
        envoy
    }

    fn wait_until_ready(&self) {
        wait_until("Envoy to be ready", || {
            assert!(
                !self.process.has_exited(),
                "Envoy has ended: {}",
                self.process.output()
            );
            let ready = self.admin("/ready")?;
            // Ready comes before the workers have called listen().
            let started = self.counters()["listener_manager.workers_started"] == 1;
            (ready.status == 200 && started)
                .then_some(())
                .ok_or_else(|| format!("{ready:?}"))
        });
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Every counter and gauge, by name.
    ///
    /// # Panics
    ///
    /// When the admin port does not answer.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let stats = self.admin("/stats").expect("the admin port answers");
        stats
            .body
            .lines()
            .filter_map(|line| {
                let (name, value) = line.rsplit_once(": ")?;
                // Histograms and texts are none.
                Some((name.to_owned(), value.parse().ok()?))
            })
            .collect()
    }

    /// One counter; a name that Envoy does not know counts as 0.
    ///
    /// # Panics
    ///
    /// As [`counters`](Self::counters).
    pub fn counter(&self, name: &str) -> u64 {
        self.counters().get(name).copied().unwrap_or(0)
    }

    /// How many connections each worker has accepted on a listener.
    ///
    /// # Panics
    ///
    /// As [`counters`](Self::counters).
    pub fn connections_by_worker(&self, listener: &str) -> Vec<u64> {
        let counters = self.counters();
        (0..self.workers)
            .map(|worker| {
                let name = format!("listener.{listener}.worker_{worker}.downstream_cx_total");
                counters.get(&name).copied().unwrap_or(0)
            })
            .collect()
    }

    /// Waits for the access log's line of the connection to `destination` that
    /// came in on a listener. A line is written
    /// when its connection is closed.
    ///
    /// # Panics
    ///
    /// When there is none within the deadline.
    pub fn connection(&self, listener: &str, destination: SocketAddr) -> Connection {
        let start = format!("connection {listener} ");
        self.process.wait_for_line_that(
            &format!("{listener} connection to {destination}"),
            DEADLINE,
            |line| {
                let json = line.strip_prefix(&start)?;
                let connection: Connection = serde_json::from_str(json).ok()?;
                (connection.original_dst == destination).then_some(connection)
            },
        )
    }

    fn admin(&self, path: &str) -> Result<http::Response, String> {
        http::get(&self.netns, Owner::APP, ADMIN.into(), path)
    }
}

/// The configuration of the sidecar of `pod`, in YAML.
pub fn config(pod: &Pod) -> String {
    config_for(&pod.ip().to_string())
}

/// The same for a pod with the address `ip`, or with what stands for it.
pub fn config_for(ip: &str) -> String {
    CONFIG
        .replace("SERVICE_IP", &SERVICE.ip().to_string())
        .replace("SERVICE_PORT", &SERVICE.port().to_string())
        .replace("POD_IP", ip)
}

/// The program.
///
/// # Panics
///
/// When there is none.
pub fn binary() -> PathBuf {
    let path = std::env::var_os("SHUNT_ENVOY")
        .map_or_else(|| PathBuf::from(DEFAULT_BINARY), PathBuf::from);
    assert!(
        path.is_file(),
        "there is no Envoy at {}: `cargo xtask setup` gets it, or SHUNT_ENVOY says where it is",
        path.display()
    );
    path
}
