//! What it costs everybody else, and whether it costs more when there is more
//! of it.

/// Names of settings and rows.
pub(crate) const OUTSIDE: &str = "outside the mesh";
pub(crate) const NO_AGENT: &str = "no agent";
pub(crate) const PODS_1000: &str = "1,000 pods";
pub(crate) const OPEN: &str = "open connections";
pub(crate) const OPEN_FEW: &str = "10 open";
pub(crate) const OPEN_MANY: &str = "100,000 open";
pub(crate) const ENROLLING: &str = "enrolling";
pub(crate) const POD_10: &str = "10th pod";
pub(crate) const POD_1000: &str = "1,000th pod";
