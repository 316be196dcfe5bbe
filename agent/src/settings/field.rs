macro_rules! fields {
    ($(
        $(#[doc = $doc:literal])+
        $variant:ident = $short:expr, $long:literal, $value:literal, $env:expr, $annotations:expr;
    )+) => {
        /// A setting, and the names under which people write it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Field {
            $(
                $(#[doc = $doc])+
                $variant,
            )+
        }

        impl Field {
            /// Every setting, in the order of `--help`.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The one-letter flag, without its dash.
            pub const fn short(self) -> Option<char> {
                match self { $(Self::$variant => $short,)+ }
            }

            /// The long flag, without its dashes.
            pub const fn long(self) -> &'static str {
                match self { $(Self::$variant => $long,)+ }
            }

            /// What stands for the value in `--help`.
            pub(super) const fn value_name(self) -> &'static str {
                match self { $(Self::$variant => $value,)+ }
            }

            /// The environment variables that the mesh's own tools read for
            /// it, the strongest first. [`shunt_env`](Self::shunt_env) beats
            /// them all.
            pub const fn mesh_env(self) -> &'static [&'static str] {
                match self { $(Self::$variant => $env,)+ }
            }

            /// The pod annotations that set it, the strongest first; a pod heeds those
            /// of its own mesh.
            pub const fn annotations(self) -> &'static [&'static str] {
                match self { $(Self::$variant => $annotations,)+ }
            }

            /// What it does, for `--help`.
            pub(super) const fn help(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+),)+ }
            }
        }
    };
}

// Flag, long flag, value, environment, annotations. The long flags and the
// environment variables are those of istio-iptables, so that its arguments can
// be handed over as they are; the rest is shunt's own.
fields! {
    /// Start from what this mesh's injector writes: istio, linkerd or kuma.
    /// Flags that are given replace its values. Without it the defaults are
    /// those of istio-iptables, which captures nothing
    Mesh = None, "mesh", "MESH", &[], &[];
    /// The proxy's port for outbound connections; 15001 if not given
    OutboundPort = Some('p'), "envoy-port", "PORT", &["ENVOY_PORT"],
        &["config.linkerd.io/outbound-port", "kuma.io/transparent-proxying-outbound-port"];
    /// The proxy's port for inbound connections; 15006 if not given
    InboundPort = Some('z'), "inbound-capture-port", "PORT", &["INBOUND_CAPTURE_PORT"],
        &["config.linkerd.io/inbound-port", "kuma.io/transparent-proxying-inbound-port"];
    /// The port of the mesh's own tunnel, never captured inbound; 15008 if not
    /// given
    TunnelPort = Some('e'), "inbound-tunnel-port", "PORT", &["INBOUND_TUNNEL_PORT"], &[];
    /// The port where the proxy answers DNS; 15053 if not given
    DnsPort = None, "dns-port", "PORT", &[], &["kuma.io/builtin-dns-port"];
    /// The uids that the proxy runs as; 1337 if not given
    ProxyUids = Some('u'), "proxy-uid", "UIDS", &["PROXY_UID"],
        &["config.linkerd.io/proxy-uid", "kuma.io/sidecar-uid"];
    /// The gids that the proxy runs as; the same numbers as the uids if not
    /// given
    ProxyGids = Some('g'), "proxy-gid", "GIDS", &["PROXY_GID"], &[];
    /// REDIRECT. The proxy sees the client's address in this mode, too, so
    /// TPROXY is neither needed nor accepted
    Mode = Some('m'), "istio-inbound-interception-mode", "MODE",
        &["ISTIO_INBOUND_INTERCEPTION_MODE", "INBOUND_INTERCEPTION_MODE"],
        &["sidecar.istio.io/interceptionMode"];
    /// Inbound ports to capture, * for all; none if not given
    InboundInclude = Some('b'), "istio-inbound-ports", "PORTS", &["ISTIO_INBOUND_PORTS"],
        &["traffic.sidecar.istio.io/includeInboundPorts"];
    /// Inbound ports to leave alone when all are captured
    InboundExclude = Some('d'), "istio-local-exclude-ports", "PORTS",
        &["ISTIO_LOCAL_EXCLUDE_PORTS"],
        &["traffic.sidecar.istio.io/excludeInboundPorts", "config.linkerd.io/skip-inbound-ports",
            "traffic.kuma.io/exclude-inbound-ports"];
    /// Destinations to capture outbound, * for all; none if not given
    OutboundInclude = Some('i'), "istio-service-cidr", "CIDRS", &["ISTIO_SERVICE_CIDR"],
        &["traffic.sidecar.istio.io/includeOutboundIPRanges"];
    /// Destinations to leave alone outbound
    OutboundExclude = Some('x'), "istio-service-exclude-cidr", "CIDRS",
        &["ISTIO_SERVICE_EXCLUDE_CIDR"],
        &["traffic.sidecar.istio.io/excludeOutboundIPRanges", "traffic.kuma.io/exclude-outbound-ips"];
    /// Outbound ports to capture whatever the destination
    OutboundPortsInclude = Some('q'), "istio-outbound-ports", "PORTS", &["ISTIO_OUTBOUND_PORTS"],
        &["traffic.sidecar.istio.io/includeOutboundPorts"];
    /// Outbound ports to leave alone
    OutboundPortsExclude = Some('o'), "istio-local-outbound-ports-exclude", "PORTS",
        &["ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE"],
        &["traffic.sidecar.istio.io/excludeOutboundPorts", "config.linkerd.io/skip-outbound-ports",
            "traffic.kuma.io/exclude-outbound-ports"];
    /// Interfaces to leave alone in both directions
    ExcludedInterfaces = Some('c'), "istio-exclude-interfaces", "NAMES",
        &["ISTIO_EXCLUDE_INTERFACES"],
        &["traffic.sidecar.istio.io/excludeInterfaces"];
    /// Virtual interfaces: what comes in through them counts as outbound
    VirtualInterfaces = Some('k'), "kube-virt-interfaces", "NAMES", &["KUBE_VIRT_INTERFACES"],
        &["istio.io/reroute-virtual-interfaces", "traffic.sidecar.istio.io/kubevirtInterfaces"];
    /// Send DNS for the pod's resolvers to the proxy
    RedirectDns = None, "redirect-dns", "BOOL", &["REDIRECT_DNS", "ISTIO_META_DNS_CAPTURE"], &[];
    /// With --redirect-dns: send DNS for every server to the proxy
    CaptureAllDns = None, "capture-all-dns", "BOOL", &["CAPTURE_ALL_DNS"], &[];
    /// Apply the rules to IPv6 as soon as the pod has any IPv6 address, not
    /// only when its first one is
    DualStack = None, "dual-stack", "BOOL",
        &["DUAL_STACK", "ISTIO_DUAL_STACK", "ISTIO_AGENT_DUAL_STACK"], &[];
    /// Capture only sockets of these gids, * for all
    OwnerGroups = None, "outbound-owner-groups", "GIDS", &["ISTIO_OUTBOUND_OWNER_GROUPS"], &[];
    /// Capture no sockets of these gids; looked at only when
    /// --outbound-owner-groups is *
    OwnerGroupsExclude = None, "outbound-owner-groups-exclude", "GIDS",
        &["ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"], &[];
    /// The IPv4 loopback range that is never captured; 127.0.0.1/32 if not
    /// given
    LoopbackCidr = None, "outbound-ipv4-loopback-cidr", "CIDR",
        &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR"], &[];
    /// Accepted and without effect: nothing is tracked, so nothing is ever
    /// out of the tracked window
    DropInvalid = None, "drop-invalid", "BOOL", &["DROP_INVALID", "INVALID_DROP"],
        &["traffic.kuma.io/drop-invalid-packets"];
    /// The proxy's calls to its own pod go to the inbound port even on the
    /// tunnel port (Istio before 1.22)
    TunnelHairpin = None, "tunnel-hairpin", "BOOL", &[], &[];
    /// Everybody's calls to their own pod outside loopback go to the outbound
    /// port (Istio before 1.10)
    LegacyHairpin = None, "legacy-hairpin", "BOOL", &[], &[];
    /// Capture the tunnel port inbound like any other (Istio before it had a
    /// tunnel)
    TunnelInbound = None, "tunnel-inbound", "BOOL", &[], &[];
    /// How far the pod's connections are spliced: off, between (proxies), proxy,
    /// all, or auto for what the node does. It can only be less than what the node does
    Splice = None, "splice", "MODE", &[], &["shunt.io/splice"];
}

impl Field {
    /// The environment variable of shunt itself: `SHUNT_` and the long flag.
    pub fn shunt_env(self) -> String {
        let name = self.long().replace('-', "_").to_ascii_uppercase();
        format!("SHUNT_{name}")
    }

    /// Whether the flag may stand without a value, which then is `true`.
    pub(super) fn is_switch(self) -> bool {
        self.value_name() == "BOOL"
    }

    /// The flag as errors write it, with the dashes.
    pub fn flag(self) -> String {
        match self.short() {
            Some(short) => format!("-{short}"),
            None => format!("--{}", self.long()),
        }
    }
}
