//! The agent's metrics, in the text format of OpenMetrics.
//!
//! Every name is in `docs/metrics.md`, which a test compares with what is written
//! here. No label takes a value that comes from a pod: the number of series of a node
//! is the same from its start on.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeMetric as _, text::encode,
    },
    metrics::{
        MetricType, counter::ConstCounter, family::Family, gauge::ConstGauge, histogram::Histogram,
        info::Info,
    },
    registry::{Registry, Unit},
};
use shunt_abi::{Counters, ErrorCode, Fallback};
use shunt_decide::{Direction, Rule, Verdict};

use super::answers::Said;
use crate::{
    node::{MapFill, Totals},
    pods::PodsState,
};

/// One label and its value.
type Label = [(&'static str, &'static str); 1];

/// How the ADD of a pod ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CniAdd {
    /// The pod is enrolled.
    Enrolled,
    /// It is no pod to be redirected.
    NotWanted,
    /// It was refused: kubelet tries again.
    Failed,
}

impl CniAdd {
    const ALL: [Self; 3] = [Self::Enrolled, Self::NotWanted, Self::Failed];

    const fn label(self) -> Label {
        let outcome = match self {
            Self::Enrolled => "enrolled",
            Self::NotWanted => "not_wanted",
            Self::Failed => "failed",
        };
        [("outcome", outcome)]
    }
}

/// Upper bounds of the time of an ADD, in seconds: kubelet waits for minutes, and
/// people for no more than a few seconds.
const ADD_SECONDS: [f64; 12] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// What the agent counts. Cheap to tell, from any thread.
pub struct Metrics {
    registry: Registry,
    shown: Arc<Mutex<Shown>>,
    cni_adds: Family<Label, Histogram>,
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new() -> Arc<Self> {
        let shown: Arc<Mutex<Shown>> = Arc::default();
        let mut metrics = Self {
            registry: Registry::with_prefix("shunt"),
            shown: Arc::clone(&shown),
            cni_adds: Family::new_with_constructor(|| Histogram::new(ADD_SECONDS)),
        };
        metrics.register();
        let of_node = Box::new(OfNode(shown));
        metrics.registry.register_collector(of_node);
        Arc::new(metrics)
    }

    fn register(&mut self) {
        // A family without a member is not written, and a rate starts at the second
        // value: every series is there from the beginning.
        for outcome in CniAdd::ALL {
            drop(self.cni_adds.get_or_create(&outcome.label()));
        }
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        let registry = &mut self.registry;
        registry.register("build", "The agent that runs", Info::new(version));
        registry.register_with_unit(
            "cni_add_duration",
            "From a pod's CNI ADD to its end; to the redirection in force where it is enrolled",
            Unit::Seconds,
            self.cni_adds.clone(),
        );
    }

    /// An ADD has ended so, `took` after it came.
    pub fn cni_add(&self, took: Duration, outcome: CniAdd) {
        self.cni_adds
            .get_or_create(&outcome.label())
            .observe(took.as_secs_f64());
    }

    /// Everything as text, with what else there is to show.
    pub(super) fn render(&self, shown: Shown) -> Result<String, fmt::Error> {
        *lock(&self.shown) = shown;
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind it is written in one step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one answer is made of, beside what is counted here.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// What the node's thread has said.
    pub(super) said: Option<Said>,
    /// How the pods of the node are followed; `None` without Kubernetes.
    pub(super) pods: Option<Arc<PodsState>>,
    /// As `/readyz` says it.
    pub(super) ready: bool,
}

/// What is found out when somebody asks.
#[derive(Debug)]
struct OfNode(Arc<Mutex<Shown>>);

impl Collector for OfNode {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let shown = lock(&self.0);
        let mut page = Page(encoder);
        page.gauge(
            "ready",
            "1 when the agent is ready, as /readyz says it",
            None,
            u32::from(shown.ready),
        )?;
        write_pods(
            &mut page,
            shown.pods.as_deref().unwrap_or(&PodsState::default()),
        )?;
        // Before the node's thread has said anything: no series, rather than zeros that
        // counters would then seem to fall back to.
        shown
            .said
            .as_ref()
            .map_or(Ok(()), |said| write_said(&mut page, said))
    }
}

fn write_pods(page: &mut Page<'_>, pods: &PodsState) -> fmt::Result {
    page.gauge(
        "kubernetes_watch_lag",
        "For how long the Kubernetes API has not answered; 0 while it does",
        Some(Unit::Seconds),
        pods.watch_lag().as_secs_f64(),
    )?;
    page.counters(
        "kubernetes_errors",
        "What went wrong between the Kubernetes API and the pods of the node",
        None,
        pods.errors
            .all()
            .map(|(reason, count)| ([("reason", reason)], count)),
    )
}

fn write_said(page: &mut Page<'_>, said: &Said) -> fmt::Result {
    let Totals {
        pods,
        counted,
        enrolled,
        failed,
        maps,
    } = &said.totals;
    page.gauge(
        "node_counters_age",
        "How old the figures of the node's thread are; they are old while it is busy",
        Some(Unit::Seconds),
        said.at.elapsed().as_secs_f64(),
    )?;
    page.gauge(
        "pods_enrolled",
        "Network namespaces that are enrolled",
        None,
        *pods as u64,
    )?;
    page.counters(
        "enrolments",
        "Enrolments, those that replace settings among them, by how they ended",
        None,
        [
            ([("outcome", "done")], *enrolled),
            ([("outcome", "failed")], *failed),
        ],
    )?;
    page.counters(
        "connections",
        "Connections and captured DNS questions of enrolled pods, by what was decided",
        None,
        connections(counted),
    )?;
    page.counters(
        "proxy_away_refusals",
        "Connections that were refused because the pod's proxy did not listen",
        None,
        [
            (Direction::Outbound, ErrorCode::ProxyAwayOutbound),
            (Direction::Inbound, ErrorCode::ProxyAway),
        ]
        .map(|(direction, error)| {
            let label = [("direction", direction.name())];
            (label, counted.by_error[error as usize])
        }),
    )?;
    page.counters(
        "connection_errors",
        "Connections that met an error, by the error",
        None,
        ErrorCode::ALL.map(|error| ([("reason", error.name())], counted.by_error[error as usize])),
    )?;
    write_splice(page, counted)?;
    write_maps(page, maps)
}

fn write_splice(page: &mut Page<'_>, counted: &Counters) -> fmt::Result {
    let splice = &counted.splice;
    page.counter(
        "spliced_messages",
        "Messages that were given to the other socket directly",
        None,
        splice.messages,
    )?;
    page.counter(
        "spliced",
        "Bytes that were given to the other socket directly",
        Some(Unit::Bytes),
        splice.bytes,
    )?;
    page.counters(
        "splice_fallbacks",
        "Messages of sockets that can be spliced that went by TCP, by the reason",
        None,
        Fallback::ALL.map(|why| ([("reason", why.name())], splice.fallbacks[why as usize])),
    )
}

fn write_maps(page: &mut Page<'_>, maps: &[MapFill]) -> fmt::Result {
    let label = |fill: &MapFill| [("map", fill.map)];
    page.gauges(
        "map_entries",
        "Entries that the pods in force have in a map",
        maps.iter().map(|fill| (label(fill), fill.entries as u64)),
    )?;
    page.gauges(
        "map_limit_entries",
        "Entries that a map takes",
        maps.iter().map(|fill| (label(fill), u64::from(fill.limit))),
    )
}

/// Two labels and their values.
type TwoLabels = [(&'static str, &'static str); 2];

/// How many connections went which way, for each way that a rule leads. One that starts
/// inside the namespace has been counted on its way out, and is none that comes to it.
fn connections(counted: &Counters) -> Vec<(TwoLabels, u64)> {
    let mut sums: Vec<(TwoLabels, u64)> = Vec::new();
    for rule in Rule::ALL.iter().filter(|rule| **rule != Rule::InInside) {
        let (direction, verdict): (Direction, Verdict) = (rule.direction(), rule.verdict());
        let labels = [("direction", direction.name()), ("verdict", verdict.name())];
        let count = counted.by_rule[*rule as usize];
        match sums.iter_mut().find(|(way, _)| *way == labels) {
            Some((_, sum)) => *sum += count,
            None => sums.push((labels, count)),
        }
    }
    sums
}

/// Where metrics are written that are found out when somebody asks.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: impl EncodeGaugeValue,
    ) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        let written = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        gauge.encode(written)
    }

    fn gauges<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = ([(&'static str, &'static str); N], u64)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn counter(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: impl EncodeCounterValue,
    ) -> fmt::Result {
        let counter = ConstCounter::new(value);
        let written = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        counter.encode(written)
    }

    fn counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl IntoIterator<Item = ([(&'static str, &'static str); N], u64)>,
    ) -> fmt::Result {
        let mut family =
            self.0
                .encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (labels, value) in values {
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
