//! The agent's side: which of these types may be read from and written to maps.

use crate::{
    Addr, CidrKey, Counters, Decided, End, EndKey, Endpoint, Event, FlowKey, FlowSlot, Interface,
    InterfaceKey, KernelOffsets, ListenerKey, MAX_OWNERS, PodSettings, PortChunk, PortChunkKey,
    Route, RouteKey, Sender, SpliceCounters, SpliceOffsets, Unfinished,
};

macro_rules! pod {
    ($($name:ty),+ $(,)?) => {
        $(
            // SAFETY: the type is `repr(C)`, made of integers only, has its
            // padding spelled out (checked below), and any bits are a value.
            unsafe impl aya::Pod for $name {}
        )+
    };
}

pod!(
    Addr,
    CidrKey,
    Counters,
    End,
    EndKey,
    Endpoint,
    Event,
    FlowKey,
    Interface,
    InterfaceKey,
    KernelOffsets,
    ListenerKey,
    PodSettings,
    PortChunk,
    PortChunkKey,
    Route,
    RouteKey,
    Sender,
    SpliceOffsets,
);

// Sizes as the sum of the fields: a type with hidden padding does not compile.
const _: () = {
    assert!(size_of::<Addr>() == 16);
    assert!(size_of::<CidrKey>() == 24);
    assert!(size_of::<Counters>() == 8 * 56 + size_of::<SpliceCounters>());
    assert!(size_of::<SpliceCounters>() == 8 * 18);
    assert!(size_of::<Decided>() == 8 + 2 * 16 + 2 * 2 + 3 * 4);
    assert!(size_of::<End>() == 40);
    assert!(size_of::<EndKey>() == 56);
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<Event>() == 16);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<FlowSlot>() == 8 + 48 + 20 + 4);
    assert!(size_of::<Interface>() == 40);
    assert!(size_of::<InterfaceKey>() == 8);
    assert!(size_of::<KernelOffsets>() == 52);
    assert!(size_of::<ListenerKey>() == 16);
    assert!(size_of::<PodSettings>() == 4 * (4 + 2 + 7 + 2 * MAX_OWNERS + 64));
    assert!(size_of::<PortChunk>() == 512);
    assert!(size_of::<PortChunkKey>() == 8);
    assert!(size_of::<Route>() == 24);
    assert!(size_of::<RouteKey>() == 24);
    assert!(size_of::<Sender>() == 56 + 32 + 4 * 8);
    assert!(size_of::<SpliceOffsets>() == 4 * 19);
    assert!(size_of::<Unfinished>() == 8 + 2 * 4);
};
