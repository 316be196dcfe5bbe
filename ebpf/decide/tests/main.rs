//! The rules against the contract, against the rules that real sidecars
//! carried, and against Istio's rules for any settings.

mod contract;
mod oracle;
mod random;
mod settings;
mod splice;
mod support;
