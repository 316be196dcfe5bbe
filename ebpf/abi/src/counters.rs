use core::array;

use crate::SpliceCounters;

/// How many rule codes [`Counters::by_rule`] has room for.
pub const RULE_SLOTS: usize = 40;

/// How many codes [`ErrorCode`] has room for.
pub const ERROR_COUNT: usize = 16;

/// Value of the map `COUNTERS`, one for each pod and processor.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Connections decided, by the code of the rule that decided.
    pub by_rule: [u64; RULE_SLOTS],
    /// Connections that met an error, by [`ErrorCode`].
    pub by_error: [u64; ERROR_COUNT],
    /// What was spliced.
    pub splice: SpliceCounters,
}

impl Counters {
    /// Nothing counted yet.
    pub const ZERO: Self = Self {
        by_rule: [0; RULE_SLOTS],
        by_error: [0; ERROR_COUNT],
        splice: SpliceCounters::ZERO,
    };

    /// The sum of both, modulo 2⁶⁴.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        self.with(other, u64::wrapping_add)
    }

    /// What this has more than the other, modulo 2⁶⁴.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        self.with(other, u64::wrapping_sub)
    }

    fn with(&self, other: &Self, each: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            by_rule: array::from_fn(|i| each(self.by_rule[i], other.by_rule[i])),
            by_error: array::from_fn(|i| each(self.by_error[i], other.by_error[i])),
            splice: SpliceCounters {
                messages: each(self.splice.messages, other.splice.messages),
                bytes: each(self.splice.bytes, other.splice.bytes),
                fallbacks: array::from_fn(|i| {
                    each(self.splice.fallbacks[i], other.splice.fallbacks[i])
                }),
            },
        }
    }
}

/// What can go wrong in a program. Each comment says which way the connection
/// goes: none of them lets a captured connection out directly.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The asked-for destination could not be remembered (no memory for socket
    /// storage): the connect fails with ENOMEM.
    RememberFailed = 0,
    /// The source address could not be bound: the connect fails with
    /// EADDRNOTAVAIL.
    BindFailed = 1,
    /// The owner of the socket could not be read: it counts as the application.
    OwnerUnknown = 2,
    /// Neither its slot nor room in `FLOWS`: the connection reaches the proxy without an original
    /// destination, and the proxy drops it.
    PublishFailed = 3,
    /// The original destination could not be kept with the accepted socket (no
    /// memory): as above.
    KeepFailed = 4,
    /// A listener of the proxy could not be remembered: while no other is
    /// known, inbound connections are refused.
    ListenerFailed = 5,
    /// No listener of the proxy is known: the inbound connection is refused.
    ProxyAway = 6,
    /// The listener of the proxy was not taken by the kernel: the inbound
    /// connection is refused.
    AssignFailed = 7,
    /// No route leads to the destination of a connection to redirect: the
    /// connect fails with ENETUNREACH, from a socket bound to 127/8 with EINVAL,
    /// which is what it gets without shunt.
    NoRoute = 8,
    /// A packet that is forwarded from a virtual interface (`-k`) cannot be
    /// redirected because its TCP header cannot be found: it is a fragment, cut
    /// short, or of a link layer that is not known. It is dropped.
    ForwardUnreadable = 9,
    /// A packet from a virtual interface cannot be redirected because the
    /// interface has no address of its family. It is dropped, as by `REDIRECT`.
    ForwardNoAddress = 10,
    /// A packet from a virtual interface could not be redirected: no room in
    /// `FORWARDED`, or it could not be written to. It is dropped.
    ForwardFailed = 11,
    /// A connection from a virtual interface comes from a port that still has
    /// another connection, to another destination. Its packet is dropped.
    ForwardCollision = 12,
    /// A redirected connection of the pod did not get through to the proxy's port:
    /// nobody listens there, and the connect fails with ECONNREFUSED.
    ProxyAwayOutbound = 13,
}

impl ErrorCode {
    /// Every code, in order.
    pub const ALL: [Self; 14] = [
        Self::RememberFailed,
        Self::BindFailed,
        Self::OwnerUnknown,
        Self::PublishFailed,
        Self::KeepFailed,
        Self::ListenerFailed,
        Self::ProxyAway,
        Self::AssignFailed,
        Self::NoRoute,
        Self::ForwardUnreadable,
        Self::ForwardNoAddress,
        Self::ForwardFailed,
        Self::ForwardCollision,
        Self::ProxyAwayOutbound,
    ];

    /// Its name in `shunt status` and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RememberFailed => "remember_failed",
            Self::BindFailed => "bind_failed",
            Self::OwnerUnknown => "owner_unknown",
            Self::PublishFailed => "publish_failed",
            Self::KeepFailed => "keep_failed",
            Self::ListenerFailed => "listener_failed",
            Self::ProxyAway => "proxy_away",
            Self::AssignFailed => "assign_failed",
            Self::NoRoute => "no_route",
            Self::ForwardUnreadable => "forward_unreadable",
            Self::ForwardNoAddress => "forward_no_address",
            Self::ForwardFailed => "forward_failed",
            Self::ForwardCollision => "forward_collision",
            Self::ProxyAwayOutbound => "proxy_away_outbound",
        }
    }
}
