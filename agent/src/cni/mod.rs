//! The CNI plugin, and the agent's side of it.
