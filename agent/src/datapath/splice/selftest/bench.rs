//! Pairs of sockets in a namespace of their own, spliced by the real programs.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::{
    Btf,
    maps::{HashMap, MapData, SkStorage},
};
use nix::{
    getsockopt_impl, libc,
    sched::{CloneFlags, unshare},
    setsockopt_impl, sockopt_impl,
    sys::socket::{getsockopt, setsockopt},
};
use shunt_abi::{
    Addr, END_PROXY, End, EndKey, Endpoint, NetnsCookie, PodSettings, Sender, SpliceMode,
    SpliceOffsets,
};
use shunt_decide::most_offered;

use super::super::{Splicing, left};
use crate::netns::cookie_of_current;

/// What trials are made with.
pub(super) struct Bench {
    splicing: Splicing,
    senders: SkStorage<MapData, Sender>,
    ends: HashMap<MapData, EndKey, End>,
    netns: NetnsCookie,
}

/// Two ends of a connection. What `a` sends is spliced into `b`, and the other
/// way round. Both are in non-blocking mode; made to block, they wait for
/// [`LONGEST_WAIT`].
pub(super) struct Pair {
    pub(super) a: TcpStream,
    pub(super) b: TcpStream,
}

/// The longest that a blocking read of a trial takes.
const LONGEST_WAIT: Duration = Duration::from_millis(200);

/// Runs `work` with a bench, on a thread in a network namespace of its own.
///
/// # Errors
///
/// When the namespace cannot be made, or the programs are not to be loaded.
pub(super) fn alone<T: Send>(
    offsets: SpliceOffsets,
    btf: &Btf,
    work: impl FnOnce(&mut Bench) -> T + Send,
) -> Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).context(
                    "cannot make a network namespace to try splicing in; it takes CAP_SYS_ADMIN",
                )?;
                raise_loopback().context("cannot use the loopback of a new namespace")?;
                Ok(work(&mut Bench::new(offsets, btf)?))
            })
            .join()
            .map_err(|_panic| anyhow!("a trial of splicing panicked"))?
    })
}

impl Bench {
    fn new(offsets: SpliceOffsets, btf: &Btf) -> Result<Self> {
        let mut object = left::private(offsets)?;
        let netns = cookie_of_current()?;
        let mut take = |name: &str| {
            object
                .take_map(name)
                .with_context(|| format!("the embedded object lacks the map {name}"))
        };
        let mut pods: HashMap<_, NetnsCookie, PodSettings> = HashMap::try_from(take("PODS")?)?;
        let settings = PodSettings {
            splice: SpliceMode::All as u32,
            ..PodSettings::empty()
        };
        pods.insert(netns, settings, 0)?;
        Ok(Self {
            senders: SkStorage::try_from(take("SENDERS")?)?,
            ends: HashMap::try_from(take("ENDS")?)?,
            splicing: Splicing::attached(object, btf)?,
            netns,
        })
    }

    /// A connection that is spliced in both directions.
    pub(super) fn pair(&mut self) -> Result<Pair> {
        let pair = Pair::new()?;
        self.splice(&pair)?;
        Ok(pair)
    }

    /// Splices a connection in both directions.
    pub(super) fn splice(&mut self, pair: &Pair) -> Result<()> {
        self.know(&pair.a)?;
        self.know(&pair.b)?;
        self.splicing.admit()?;
        for end in [&pair.a, &pair.b] {
            if self.sender(end)?.member == 0 {
                bail!("the kernel does not take a socket into the map");
            }
        }
        Ok(())
    }

    /// Says what the `sock_ops` program finds out about a connection, and does what it does.
    fn know(&mut self, end: &TcpStream) -> Result<()> {
        setsockopt(end, WindowClamp, &most_offered(buffer(end)?))?;
        let local = endpoint(end.local_addr()?)?;
        let remote = endpoint(end.peer_addr()?)?;
        let key = EndKey::new(self.netns, &local, &remote, 0, 0);
        let known = End {
            starts: key.starts(),
            // The iterator knows where it is.
            address: 0,
            cookie: getsockopt(end, Cookie)?,
            netns: self.netns,
            flags: END_PROXY,
            wanted: 1,
        };
        self.ends.insert(key, known, 0)?;
        let sender = Sender {
            key,
            known: 1,
            ..Sender::default()
        };
        self.senders.insert(end, sender, 0)?;
        Ok(())
    }

    fn sender(&self, end: &TcpStream) -> Result<Sender> {
        self.senders.get(end, 0).context("a socket is not known")
    }

    /// Whether the last message that this end sent was spliced.
    pub(super) fn has_spliced(&self, end: &TcpStream) -> Result<bool> {
        Ok(self.sender(end)?.spliced != 0)
    }

    /// Sends everything by TCP, or not any more.
    pub(super) fn by_tcp(&mut self, by_tcp: bool) -> Result<()> {
        self.splicing.pause(by_tcp)
    }

    /// How many sockets have something left to read that was spliced. None of them may be in
    /// the middle of a call.
    pub(super) fn unread(&self) -> Result<usize> {
        let members = self.splicing.unfinished()?;
        let calls = members.iter().filter(|member| member.under_way != 0);
        ensure!(
            calls.count() == 0,
            "a socket at rest counts as in use: it may be in somebody else's socket map"
        );
        Ok(members.len())
    }
}

impl Pair {
    /// A connection over loopback.
    pub(super) fn new() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let a = TcpStream::connect(listener.local_addr()?)?;
        let (b, _) = listener.accept()?;
        for end in [&a, &b] {
            end.set_nonblocking(true)?;
            end.set_nodelay(true)?;
            // For when a trial makes it wait: what a kernel does not bring, it may never.
            end.set_read_timeout(Some(LONGEST_WAIT))?;
        }
        Ok(Self { a, b })
    }
}

/// How many bytes of the buffer of a socket are in use, as the kernel counts them.
pub(super) fn queued(end: &TcpStream) -> Result<u32> {
    // `SK_MEMINFO_RMEM_ALLOC` comes first.
    Ok(getsockopt(end, Memory)?[0])
}

/// The size of a socket's receive buffer, in bytes.
pub(super) fn buffer(end: &TcpStream) -> Result<u32> {
    // `SK_MEMINFO_RCVBUF`
    Ok(getsockopt(end, Memory)?[1])
}

/// Writes all of `bytes`, which the other end has room for.
pub(super) fn send(mut end: &TcpStream, bytes: &[u8]) -> Result<()> {
    end.write_all(bytes).context("a write failed")
}

/// Reads until nothing is left.
pub(super) fn drain(mut end: &TcpStream) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    match end.read_to_end(&mut all) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error.into()),
        Ok(_) | Err(_) => Ok(all),
    }
}

fn endpoint(address: std::net::SocketAddr) -> Result<Endpoint> {
    Ok(Endpoint::new(Addr::from_ip(address.ip()), address.port()))
}

sockopt_impl!(
    /// `TCP_WINDOW_CLAMP`
    WindowClamp,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_WINDOW_CLAMP,
    u32
);

sockopt_impl!(
    /// `SO_MEMINFO`
    Memory,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_MEMINFO,
    [u32; 9]
);

sockopt_impl!(
    /// `SO_COOKIE`
    Cookie,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_COOKIE,
    u64
);

nix::ioctl_write_ptr_bad!(
    /// `SIOCSIFFLAGS`
    set_interface_flags,
    libc::SIOCSIFFLAGS,
    libc::ifreq
);

/// Raises the loopback interface of the calling thread's namespace.
fn raise_loopback() -> Result<()> {
    // SAFETY: opens a socket.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: the kernel has just made it for this process.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all zeros are a request without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = libc::c_char::from_ne_bytes([b'l']);
    request.ifr_name[1] = libc::c_char::from_ne_bytes([b'o']);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: a request with a name that ends, and flags.
    unsafe { set_interface_flags(socket.as_raw_fd(), &raw const request) }?;
    Ok(())
}
