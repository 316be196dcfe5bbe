//! What the agent says of itself: metrics, health, events.

pub(crate) mod events;
