//! How long many calls took.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// A duration in nanoseconds.
pub(crate) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds in microseconds.
#[expect(clippy::cast_precision_loss, reason = "no time here has 53 bits")]
pub(crate) fn micro(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

/// Durations up to a minute, to three digits. Goes from one process to another as pairs:
/// nanoseconds, and how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub(crate) struct Times(Histogram<u64>);

impl Times {
    /// Without any.
    pub(crate) fn new() -> Self {
        const MINUTE: u64 = 60_000_000_000;
        Self(Histogram::new_with_bounds(1, MINUTE, 3).expect("these bounds make sense"))
    }

    /// Takes one in.
    pub(crate) fn record(&mut self, time: Duration) {
        self.0.saturating_record(nanoseconds(time));
    }

    /// Takes in all of them.
    pub(crate) fn add(&mut self, others: &Self) {
        self.0.add(&others.0).expect("they have the same bounds");
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.0.len()
    }

    /// In microseconds, the one that this part of them does not exceed.
    pub(crate) fn micro(&self, quantile: f64) -> f64 {
        micro(self.0.value_at_quantile(quantile))
    }
}

impl From<Vec<(u64, u64)>> for Times {
    fn from(pairs: Vec<(u64, u64)>) -> Self {
        let mut times = Self::new();
        for (nanoseconds, count) in pairs {
            times.0.saturating_record_n(nanoseconds, count);
        }
        times
    }
}

impl From<Times> for Vec<(u64, u64)> {
    fn from(times: Times) -> Self {
        let recorded = times.0.iter_recorded();
        recorded
            .map(|step| (step.value_iterated_to(), step.count_at_value()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(micro: &[u64]) -> Times {
        let mut times = Times::new();
        for time in micro {
            times.record(Duration::from_micros(*time));
        }
        times
    }

    #[test]
    fn they_arrive_as_they_were_sent() {
        let times = some(&[40, 40, 55, 70_000_000]);
        let sent = serde_json::to_string(&times).expect("plain data");
        let arrived: Times = serde_json::from_str(&sent).expect("the same data");
        assert_eq!(arrived, times);
        assert_eq!(arrived.count(), 4);
    }

    #[test]
    fn the_tail_is_that_of_all() {
        let mut all = some(&[10; 99]);
        all.add(&some(&[500]));
        assert!((all.micro(0.5) - 10.0).abs() < 0.1);
        assert!((all.micro(0.999) - 500.0).abs() < 1.0);
    }
}
