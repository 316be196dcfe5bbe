use crate::{Addr, Endpoint, NetnsCookie};

/// How far splicing goes. The codes are ordered: the smaller one does less.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SpliceMode {
    /// Nothing is spliced.
    #[default]
    Off = 0,
    /// What one proxy sends to another is spliced. No socket of an application has
    /// a part in it.
    Between = 1,
    /// So is what the application sends to its proxy: bytes are spliced into
    /// sockets of a proxy only.
    Proxy = 2,
    /// Bytes are spliced into sockets of the application as well.
    All = 3,
}

/// Key of the maps `ENDS` and `SPLICED`: one end of a TCP connection. The other
/// end of the same connection has the key with the two sides exchanged.
///
/// Addresses and ports are not enough: they repeat between namespaces. The two
/// sequence numbers are chosen by the two ends for this one connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
pub struct EndKey {
    /// The network namespace, of a connection over loopback; or else 0.
    pub scope: NetnsCookie,
    /// The address on this side.
    pub local: Addr,
    /// The address on the other side.
    pub remote: Addr,
    /// The port on this side, host byte order.
    pub local_port: u16,
    /// The port on the other side, host byte order.
    pub remote_port: u16,
    /// The sequence number of the first byte that this side sends.
    pub local_start: u32,
    /// The sequence number of the first byte that the other side sends.
    pub remote_start: u32,
    /// Always 0.
    pub pad: u32,
}

impl EndKey {
    /// The end of a connection in the namespace `netns`, between `local` and
    /// `remote`; see the fields for the sequence numbers.
    #[inline(always)]
    pub const fn new(
        netns: NetnsCookie,
        local: &Endpoint,
        remote: &Endpoint,
        local_start: u32,
        remote_start: u32,
    ) -> Self {
        let inside = local.addr.is_loopback() || remote.addr.is_loopback();
        Self {
            scope: if inside { netns } else { 0 },
            local: local.addr,
            remote: remote.addr,
            local_port: local.port,
            remote_port: remote.port,
            local_start,
            remote_start,
            pad: 0,
        }
    }

    /// Both sequence numbers in one word. Two connections of a node have the same
    /// by a chance of 2^-64.
    #[inline(always)]
    pub const fn starts(&self) -> u64 {
        (self.local_start as u64) << 32 | self.remote_start as u64
    }

    /// The other end.
    #[inline(always)]
    pub const fn peer(&self) -> Self {
        Self {
            scope: self.scope,
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port,
            remote_port: self.local_port,
            local_start: self.remote_start,
            remote_start: self.local_start,
            pad: 0,
        }
    }
}

/// Value of the map `ENDS`: what the other end has to know of this one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// What its key says by [`EndKey::starts`]: the first word that is written, so
    /// that a reader who looks at it last knows whose element it has read.
    pub starts: u64,
    /// Where the kernel has its `struct sock`. It is believed only as long as
    /// there is a socket with this cookie.
    pub address: u64,
    /// The socket's cookie.
    pub cookie: u64,
    /// The network namespace.
    pub netns: NetnsCookie,
    /// Bits `END_…`.
    pub flags: u32,
    /// 1 when both ends are known and the agent is to put this one into
    /// `SPLICED`.
    pub wanted: u32,
}

/// What a sender keeps of the other [`End`] of its connection, under the same names.
#[expect(missing_docs, reason = "they are those of the other type")]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    pub address: u64,
    pub cookie: u64,
    pub netns: NetnsCookie,
    pub flags: u32,
    /// Always 0.
    pub pad: u32,
}

impl End {
    /// What the sender on the other side keeps.
    #[inline(always)]
    pub const fn as_peer(&self) -> Peer {
        Peer {
            address: self.address,
            cookie: self.cookie,
            netns: self.netns,
            flags: self.flags,
            pad: 0,
        }
    }
}

/// Bit of [`End::flags`]: the socket is the proxy's.
pub const END_PROXY: u32 = 1 << 0;
/// Bit of [`End::flags`]: the connection was accepted here.
pub const END_PASSIVE: u32 = 1 << 1;

/// Value of the socket storage `SENDERS`: what is known of a socket that may be
/// spliced. Each field has one writer at a time. With what the kernel puts before it,
/// 72 bytes (`struct bpf_local_storage_elem`), it fills what it gives for 192.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sender {
    /// Which end of which connection it is; meaningful when `known` is set.
    pub key: EndKey,
    /// The other end; its address is 0 before it was found.
    pub peer: Peer,
    /// Bits `END_…`. Written by `sock_ops` when it begins to know the socket.
    pub flags: u32,
    /// 1 when its end is in `ENDS`. Written by `sock_ops`.
    pub known: u32,
    /// How often its peer was looked for. Written by `sock_ops`, and by the iterator that could
    /// not put it back.
    pub looks: u32,
    /// 1 when it is in `SPLICED` or `RECEIVERS`. Written by the agent's iterator, and by
    /// `sock_ops`, which takes it out.
    pub member: u32,
    /// How many messages went to the other end directly since it last had nothing to
    /// read; 0 when the last bytes went by TCP. Written by `sk_msg` while it is a member, and
    /// by the iterator before.
    pub spliced: u32,
    /// Not 0 when it is to be taken out of `SPLICED`: a `LEAVING_…` code. Written by `sk_msg`
    /// and by `sock_ops`, which does it.
    pub leaving: u32,
    /// How many more messages found the other end not ready than ready. Written by
    /// `sk_msg`; made 0 by `sock_ops`.
    pub missed: u32,
    /// When it may come back, after [`LEAVING_FOR_A_WHILE`]: in milliseconds since the
    /// node started, of which these are the lower 32 bits; 0 when it has not left.
    /// Written by `sock_ops`, and by the iterator that could not put it back.
    pub back: u32,
}

/// Code of [`Sender::leaving`]: it goes by TCP from now on.
pub const LEAVING_FOR_GOOD: u32 = 1;
/// Code of [`Sender::leaving`]: it goes by TCP, and may come back later.
pub const LEAVING_FOR_A_WHILE: u32 = 2;

/// Where the running kernel keeps what splicing looks at, in bytes from the start
/// of each structure; from the kernel's BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpliceOffsets {
    /// `struct sock`: `sk_socket`
    pub sock_socket: u32,
    /// `struct socket`: `file`
    pub socket_file: u32,
    /// `struct socket`: `sk`
    pub socket_sock: u32,
    /// `struct file`: `f_flags`
    pub file_flags: u32,
    /// `struct sock_common`: `skc_cookie`
    pub common_cookie: u32,
    /// `struct sock`: `sk_backlog.rmem_alloc`, the bytes that wait to be read
    pub sock_queued: u32,
    /// `struct sock`: `sk_rcvbuf`
    pub sock_buffer: u32,
    /// `struct sock_common`: `skc_flags`
    pub sock_flags: u32,
    /// `struct sock`: `sk_user_data`
    pub sock_user_data: u32,
    /// `struct inet_connection_sock`: `icsk_ulp_ops`
    pub icsk_ulp: u32,
    /// `struct tcp_sock`: `copied_seq`
    pub tcp_copied: u32,
    /// `struct tcp_sock`: `write_seq`
    pub tcp_written: u32,
    /// `struct tcp_sock`: `snd_una`
    pub tcp_acked: u32,
    /// `struct tcp_sock`: `snd_wnd`
    pub tcp_offered: u32,
    /// `struct tcp_sock`: `rcv_wnd`
    pub tcp_window: u32,
    /// `struct tcp_sock`: `window_clamp`
    pub tcp_clamp: u32,
    /// `struct sk_psock`: `ingress_msg`
    pub psock_queue: u32,
    /// `struct sk_psock`: `refcnt`
    pub psock_users: u32,
    /// The bit of `sk_flags` that SO_ZEROCOPY sets.
    pub zerocopy_bit: u32,
}

/// What the iterator over a socket map says of a member that is not done yet: it has something
/// left to read, or a call of it is under way.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// The socket's cookie.
    pub cookie: u64,
    /// 1 when something was spliced into it that it has not read.
    pub unread: u32,
    /// 1 when a call holds what makes it a member (`struct sk_psock`): who sends does, from
    /// before it is decided how until the other end has the bytes (`tcp_bpf_sendmsg`), and who
    /// reads; and of the other end, who is about to give it something
    /// (`tcp_bpf_sendmsg_redir`).
    pub under_way: u32,
}

impl Unfinished {
    /// From what the iterator has written.
    #[inline]
    pub const fn from_bytes(bytes: &[u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, unread @ .., i, j, k, l] = *bytes;
        Self {
            cookie: u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            unread: u32::from_ne_bytes(unread),
            under_way: u32::from_ne_bytes([i, j, k, l]),
        }
    }
}

/// How many codes [`Fallback`] has room for.
pub const FALLBACK_SLOTS: usize = 16;

/// Why a message went by TCP although its socket can be spliced, or why it cannot be.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// The pod's settings, or those of the other end's pod, do not want it, or
    /// the agent is about to stop.
    NotWanted = 0,
    /// The other end is not known here, or is gone.
    PeerUnknown = 1,
    /// The other end is the application's, and the mode is less than `all`.
    IntoApplication = 2,
    /// The other end has not yet read what came before by TCP.
    NotDrained = 3,
    /// The other end has not read enough of what it was given.
    ReceiverFull = 4,
    /// The socket is in blocking mode.
    Blocking = 5,
    /// A single byte, which may be urgent data.
    SingleByte = 6,
    /// One of the ends has a protocol on top of TCP, such as kTLS.
    Layered = 7,
    /// The kernel could not do it: the other end is not in the map, or not any
    /// more.
    Failed = 8,
    /// The socket has SO_ZEROCOPY, and may ask to be told when its bytes are sent.
    Zerocopy = 9,
    /// A table had no room for the socket, the kernel no memory for what is remembered of
    /// it, or somebody else has it in a map of theirs. Counted for each attempt to put it
    /// there, not for each message.
    NoRoom = 10,
    /// The socket offers so much to TCP that little may be spliced into it: what it sends by
    /// TCP is acknowledged, and then it is told to offer less.
    WideWindow = 11,
}

impl Fallback {
    /// Every code, in order.
    pub const ALL: [Self; 12] = [
        Self::NotWanted,
        Self::PeerUnknown,
        Self::IntoApplication,
        Self::NotDrained,
        Self::ReceiverFull,
        Self::Blocking,
        Self::SingleByte,
        Self::Layered,
        Self::Failed,
        Self::Zerocopy,
        Self::NoRoom,
        Self::WideWindow,
    ];

    /// Its name in `shunt status` and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotWanted => "not_wanted",
            Self::PeerUnknown => "peer_unknown",
            Self::IntoApplication => "into_application",
            Self::NotDrained => "not_drained",
            Self::ReceiverFull => "receiver_full",
            Self::Blocking => "blocking",
            Self::SingleByte => "single_byte",
            Self::Layered => "layered",
            Self::Failed => "failed",
            Self::Zerocopy => "zerocopy",
            Self::NoRoom => "no_room",
            Self::WideWindow => "wide_window",
        }
    }
}

/// Part of [`Counters`](crate::Counters): what the sockets of a pod sent, since
/// they can be spliced.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpliceCounters {
    /// Bytes that were given to the other end directly.
    pub bytes: u64,
    /// Messages that were, each as a whole.
    pub messages: u64,
    /// What went by TCP, by [`Fallback`].
    pub fallbacks: [u64; FALLBACK_SLOTS],
}

impl SpliceCounters {
    /// Nothing counted yet.
    pub const ZERO: Self = Self {
        bytes: 0,
        messages: 0,
        fallbacks: [0; FALLBACK_SLOTS],
    };
}
