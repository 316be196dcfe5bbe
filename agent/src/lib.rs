//! The node agent, as a library for its own binary and for the tests.
//!
//! The way of an enrolment: [`control`] takes the request, [`settings`] has
//! parsed it, [`node`] opens the namespace ([`netns`]), asks what its network
//! looks like ([`network`]) and how it numbers its users ([`userns`]), and hands
//! everything to the [`datapath`], which writes the maps and attaches the
//! programs. What changes in a namespace later comes in through [`network`], too.
//!
//! On a Kubernetes node nobody has to ask: [`pods`] says which pods are to be
//! redirected and how, [`containers`] where they run, and [`reconcile`] enrols them.

pub mod bpffs;
pub mod cgroup;
pub mod cli;
pub mod cni;
pub mod containers;
pub mod control;
pub mod datapath;
pub mod netns;
pub mod network;
pub mod node;
pub mod observe;
pub mod pods;
pub mod preflight;
pub mod reconcile;
pub mod settings;
pub mod userns;
