//! What the agent says of itself: metrics, health, events.
