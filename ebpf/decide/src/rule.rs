use shunt_abi::PodSettings;

/// Where a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To where it was sent.
    Direct,
    /// To the proxy's outbound port.
    Outbound,
    /// To the proxy's inbound port.
    Inbound,
    /// To the proxy's DNS port.
    Dns,
}

impl Verdict {
    /// The proxy's port (host byte order), `None` when the proxy is not asked.
    #[inline(always)]
    pub const fn port(self, settings: &PodSettings) -> Option<u16> {
        match self {
            Self::Direct => None,
            Self::Outbound => Some(settings.outbound_port),
            Self::Inbound => Some(settings.inbound_port),
            Self::Dns => Some(settings.dns_port),
        }
    }

    /// The word for it in counters and in `shunt explain`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Dns => "dns",
        }
    }
}

/// Which way a connection goes, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// A socket of the pod opens it.
    Outbound,
    /// It comes to the pod.
    Inbound,
}

impl Direction {
    /// The word for it in logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// The codes from here on are those of inbound rules.
const FIRST_INBOUND: u8 = 20;

macro_rules! rules {
    ($($variant:ident = $code:literal, $verdict:ident, $number:literal, $why:literal;)+) => {
        /// A rule of the contract. The code is its place in
        /// [`Counters::by_rule`](shunt_abi::Counters::by_rule).
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Rule {
            $(
                #[doc = $why]
                $variant = $code,
            )+
        }

        impl Rule {
            /// Every rule, in the order in which they are tried.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Its number in the contract, such as `outbound 4a`.
            pub const fn number(self) -> &'static str {
                match self { $(Self::$variant => $number,)+ }
            }

            /// Where it sends what it applies to.
            pub const fn verdict(self) -> Verdict {
                match self { $(Self::$variant => Verdict::$verdict,)+ }
            }

            /// The rule of this code.
            pub fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }

            /// What it says, in a sentence.
            pub const fn why(self) -> &'static str {
                match self { $(Self::$variant => $why,)+ }
            }
        }
    };
}

impl Rule {
    /// For which connections it is.
    pub const fn direction(self) -> Direction {
        if (self as u8) < FIRST_INBOUND {
            Direction::Outbound
        } else {
            Direction::Inbound
        }
    }
}

rules! {
    OutFamily = 0, Direct, "outbound 0", "the settings do not speak of this address family: it passes untouched";
    OutInterface = 1, Direct, "outbound 1", "it leaves through an excluded interface (-c)";
    OutExcludedPort = 2, Direct, "outbound 2", "the destination port is excluded (-o)";
    OutSix = 3, Direct, "outbound 3", "the proxy calls its own application from 127.0.0.6 or ::6";
    OutUidHairpin = 4, Inbound, "outbound 4a", "the proxy's uid calls an address of its own pod outside loopback";
    OutLocalNotUid = 5, Direct, "outbound 4b", "the destination is an address of the pod itself, and the caller is not the proxy's uid";
    OutUid = 6, Direct, "outbound 4c", "the socket belongs to the proxy's uid";
    OutGidHairpin = 7, Inbound, "outbound 5a", "the proxy's gid calls an address of its own pod outside loopback";
    OutLocalNotGid = 8, Direct, "outbound 5b", "the destination is an address of the pod itself, and the caller is not the proxy's gid";
    OutGid = 9, Direct, "outbound 5c", "the socket belongs to the proxy's gid";
    OutGroup = 10, Direct, "outbound 6", "the owner groups leave the socket's gid out";
    OutDns = 11, Dns, "outbound 7", "DNS to a captured server (REDIRECT_DNS)";
    OutLoopback = 12, Direct, "outbound 8", "the destination is loopback";
    OutExcludedCidr = 13, Direct, "outbound 9", "the destination is in an excluded range (-x)";
    OutIncludedPort = 14, Outbound, "outbound 10", "the destination port is captured (-q)";
    OutIncludedCidr = 15, Outbound, "outbound 11", "the destination is in a captured range (-i)";
    OutRest = 16, Direct, "outbound 12", "no rule captures it";
    OutLegacyHairpin = 17, Outbound, "outbound 4 (legacy hairpin)", "an address of the pod outside loopback, whoever calls (--legacy-hairpin)";
    InFamily = 20, Direct, "inbound 0", "the settings do not speak of this address family: it passes untouched";
    InInside = 21, Direct, "inbound 0", "it starts inside the namespace: the inbound rules do not apply";
    InInterface = 22, Direct, "inbound 1", "it came in through an excluded interface (-c)";
    InVirtual = 23, Outbound, "inbound 2", "it came in through a virtual interface (-k)";
    InNone = 24, Direct, "inbound 3", "no inbound port is captured (-b is empty)";
    InExcludedPort = 25, Direct, "inbound 4", "the port is excluded (-d)";
    InTunnel = 26, Direct, "inbound 4", "the mesh's tunnel port is never captured";
    InAll = 27, Inbound, "inbound 4", "every other inbound port is captured (-b *)";
    InListed = 28, Inbound, "inbound 5", "the inbound port is captured (-b)";
    InUnlisted = 29, Direct, "inbound 5", "the inbound port is not among the captured ones (-b)";
}
