//! One end of a connection, each call on which is put on record.

use std::{
    fmt::Debug,
    io::{IoSlice, IoSliceMut},
    net::Shutdown,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    poll::PollFlags,
    sys::{
        signal::Signal,
        socket::{MsgFlags, recv, send, shutdown},
    },
};
use socket2::Socket;

use crate::{
    Blocked,
    deadline::{DEADLINE, wait_until},
    pattern::Pattern,
};

/// What was seen of a connection, a line for each call, in their order. Clones
/// write to the same record.
#[derive(Clone, Debug, Default)]
pub struct Record(Arc<Mutex<Vec<String>>>);

impl Record {
    /// Adds what was seen of something.
    pub fn note(&self, what: &str, seen: impl Debug) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(format!("{what}: {seen:?}"));
    }

    /// All of it.
    pub fn lines(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// What a read gave: text, as all that scripts send is.
pub type Text = Result<String, Errno>;

/// This text.
///
/// # Errors
///
/// None: it is of the type of what it is compared with.
pub fn text(text: &str) -> Text {
    Ok(text.to_owned())
}

/// The end of a stream.
///
/// # Errors
///
/// As [`text`].
pub fn nothing() -> Text {
    text("")
}

/// POLLRDHUP: the other side has sent its last byte.
pub const ENDED: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);

/// One end. Clones are the same socket.
#[derive(Clone, Debug)]
pub struct End {
    name: &'static str,
    socket: Arc<Socket>,
    record: Record,
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl End {
    /// An end that the record calls `name`.
    pub fn new(name: &'static str, socket: Socket, record: &Record) -> Self {
        Self {
            name,
            socket: Arc::new(socket),
            record: record.clone(),
        }
    }

    /// The same socket, off the record.
    pub fn unnoticed(&self) -> Self {
        Self {
            record: Record::default(),
            ..self.clone()
        }
    }

    /// Does `work` with this socket on another thread, off the record, and
    /// returns when that sleeps in the system call with this number, or is done.
    ///
    /// # Panics
    ///
    /// When neither happens.
    pub fn waits_in<T: Debug + Send + 'static>(
        &self,
        call: libc::c_long,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Waiting<T> {
        let unnoticed = self.unnoticed();
        Waiting {
            end: self.clone(),
            blocked: Blocked::in_call(call, move || work(&unnoticed)),
        }
    }

    /// A thread that waits in recv().
    pub fn waits_for_bytes(&self, length: usize, flags: MsgFlags) -> Waiting<Text> {
        self.waits_in(libc::SYS_recvfrom, move |end| end.recv_with(length, flags))
    }

    /// Adds to the record, and gives back what was seen.
    pub fn note<T: Debug>(&self, what: &str, seen: T) -> T {
        self.record.note(&format!("{} {what}", self.name), &seen);
        seen
    }

    /// Its socket, for options.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// O_NONBLOCK on or off.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn set_nonblocking(&self, nonblocking: bool) {
        let flags = fcntl(self, FcntlArg::F_GETFL).expect("an open file");
        let mut flags = OFlag::from_bits_retain(flags);
        flags.set(OFlag::O_NONBLOCK, nonblocking);
        fcntl(self, FcntlArg::F_SETFL(flags)).expect("an open file");
    }

    /// send(), without flags but MSG_NOSIGNAL.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn send(&self, text: &str) -> Result<usize, Errno> {
        self.send_with(text, MsgFlags::empty())
    }

    /// The same with flags.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn send_with(&self, text: &str, flags: MsgFlags) -> Result<usize, Errno> {
        let sent = send(
            self.socket.as_raw_fd(),
            text.as_bytes(),
            flags | MsgFlags::MSG_NOSIGNAL,
        );
        self.note(&format!("sends {text:?} {flags:?}"), sent)
    }

    /// recv() of at most `length` bytes.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn recv(&self, length: usize) -> Text {
        self.recv_with(length, MsgFlags::empty())
    }

    /// The same with flags.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn recv_with(&self, length: usize, flags: MsgFlags) -> Text {
        let seen = self.recv_silently(length, flags);
        self.note(&format!("reads {length} {flags:?}"), seen)
    }

    fn recv_silently(&self, length: usize, flags: MsgFlags) -> Text {
        let mut bytes = vec![0; length];
        let read = recv(self.socket.as_raw_fd(), &mut bytes, flags)?;
        Ok(String::from_utf8_lossy(&bytes[..read]).into_owned())
    }

    /// readv() into pieces of these lengths; what each of them got.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn readv(&self, lengths: &[usize]) -> Result<Vec<String>, Errno> {
        let mut pieces: Vec<_> = lengths.iter().map(|&length| vec![0; length]).collect();
        let mut slices: Vec<_> = pieces.iter_mut().map(|p| IoSliceMut::new(p)).collect();
        let read = nix::sys::uio::readv(self, &mut slices);
        let seen = read.map(|mut left| {
            let text = |piece: &Vec<u8>| {
                let length = left.min(piece.len());
                left -= length;
                String::from_utf8_lossy(&piece[..length]).into_owned()
            };
            pieces.iter().map(text).collect()
        });
        self.note(&format!("reads into {lengths:?}"), seen)
    }

    /// writev() of these pieces.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn writev(&self, pieces: &[&str]) -> Result<usize, Errno> {
        let slices: Vec<_> = pieces.iter().map(|p| IoSlice::new(p.as_bytes())).collect();
        let sent = nix::sys::uio::writev(self, &slices);
        self.note(&format!("sends {pieces:?}"), sent)
    }

    /// Waits for bytes, and takes them until there are as many as in `expected`,
    /// in as many reads as it takes.
    ///
    /// # Panics
    ///
    /// When others come, or the end, or an error.
    #[track_caller]
    pub fn gets(&self, expected: &str) {
        let mut seen = String::new();
        while seen.len() < expected.len() {
            self.poll(PollFlags::POLLIN);
            match self.recv_silently(expected.len() - seen.len(), MsgFlags::MSG_DONTWAIT) {
                Ok(more) if !more.is_empty() => seen += &more,
                Err(Errno::EAGAIN) => {}
                other => panic!("{} has {seen:?}, and then {other:?}", self.name),
            }
        }
        assert_eq!(self.note("gets", seen), expected);
    }

    /// Waits until there is something to read, which is nothing or an error, and
    /// reads.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn gets_end(&self) -> Text {
        self.poll(PollFlags::POLLIN);
        let seen = self.recv_silently(16, MsgFlags::MSG_DONTWAIT);
        self.note("gets its end", seen)
    }

    /// Takes `length` bytes of a pattern, in as many reads as it takes.
    ///
    /// # Panics
    ///
    /// When others come, or the end, or an error.
    #[track_caller]
    pub fn gets_pattern(&self, pattern: Pattern, length: usize) {
        let mut buffer = vec![0; 64 * 1024];
        let mut done = 0;
        while done < length {
            self.poll(PollFlags::POLLIN);
            let most = buffer.len().min(length - done);
            let flags = MsgFlags::MSG_DONTWAIT;
            match recv(self.socket.as_raw_fd(), &mut buffer[..most], flags) {
                Ok(read @ 1..) => {
                    let checked = pattern.check(done as u64, &buffer[..read]);
                    checked.unwrap_or_else(|complaint| panic!("{}: {complaint}", self.name));
                    done += read;
                }
                Err(Errno::EAGAIN) => {}
                other => panic!("{} has {done} bytes, and then {other:?}", self.name),
            }
        }
        self.note("gets so many bytes of a pattern", length);
    }

    /// Sends bytes of a pattern, in as many blocking calls as it takes; how many
    /// were sent, and with which error it ended, if any.
    pub fn sends_pattern(&self, pattern: Pattern, length: usize) -> (usize, Result<(), Errno>) {
        let bytes = pattern.bytes(0, length);
        let mut sent = 0;
        while sent < length {
            let flags = MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), &bytes[sent..], flags) {
                Ok(more) => sent += more,
                Err(error) => return (sent, Err(error)),
            }
        }
        (sent, Ok(()))
    }

    /// Sends a pattern from `offset` on without waiting, until nothing has fitted for a
    /// while: send() has said so (EAGAIN), and so has poll(). How much has been sent,
    /// which depends on the moment and is not on record. Proxies on the way may make
    /// room afterwards.
    ///
    /// # Panics
    ///
    /// When something else ends it than a lack of room.
    pub fn sends_until_full(&self, pattern: Pattern, offset: usize) -> usize {
        /// Long enough for what is on its way to settle, as a rule.
        const SETTLED: Duration = Duration::from_millis(100);
        let mut sent = 0;
        loop {
            let chunk = pattern.bytes((offset + sent) as u64, 16 * 1024);
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), &chunk, flags) {
                Ok(more) => sent += more,
                Err(Errno::EAGAIN) => {
                    if self.events(PollFlags::POLLOUT, SETTLED).is_empty() {
                        break;
                    }
                }
                Err(error) => panic!("{} cannot send: {error}", self.name),
            }
        }
        self.note("sends until it is full", ());
        sent
    }

    /// Waits until one of `events` is there, or an error or a hang-up; what
    /// there is of these. Not on record.
    ///
    /// # Panics
    ///
    /// When there is none within the deadline.
    #[track_caller]
    pub fn poll(&self, events: PollFlags) -> PollFlags {
        let end = Instant::now() + DEADLINE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            assert!(left > Duration::ZERO, "{} has no {events:?}", self.name);
            let seen = self.events(events, left);
            if !seen.is_empty() {
                return seen;
            }
        }
    }

    /// Waits until all of `events` are there at once.
    ///
    /// # Panics
    ///
    /// When they are not within the deadline.
    #[track_caller]
    pub fn has(&self, events: PollFlags) {
        wait_until(&format!("{} to have {events:?}", self.name), || {
            let seen = self.events(events, Duration::ZERO);
            if seen.contains(events) {
                Ok(())
            } else {
                Err(format!("{seen:?}"))
            }
        });
        self.note("has", events);
    }

    /// What there is now of `events`, errors and hang-ups.
    pub fn has_now(&self, events: PollFlags) -> PollFlags {
        let seen = self.events(events, Duration::ZERO);
        self.note(&format!("has of {events:?}"), seen)
    }

    /// poll() itself: the crate's does not know POLLRDHUP.
    fn events(&self, events: PollFlags, patience: Duration) -> PollFlags {
        let mut file = libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: events.bits(),
            revents: 0,
        };
        let patience = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one structure, which outlives the call. A signal for somebody
        // else is no event.
        unsafe { libc::poll(&raw mut file, 1, patience) };
        PollFlags::from_bits_retain(file.revents)
    }

    /// FIONREAD: how much there is to read, in bytes.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn queued(&self) -> usize {
        let mut queued: libc::c_int = 0;
        // SAFETY: the kernel writes one int.
        unsafe { fionread(self.socket.as_raw_fd(), &raw mut queued) }.expect("an open socket");
        let queued = usize::try_from(queued).expect("a length");
        self.note("has so much to read by FIONREAD", queued)
    }

    /// Waits until there are `length` bytes to read, as MSG_PEEK shows.
    ///
    /// # Panics
    ///
    /// When there are not within the deadline.
    #[track_caller]
    pub fn has_queued(&self, length: usize) {
        wait_until(&format!("{} to have {length} bytes", self.name), || {
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let queued = self
                .recv_silently(length + 1, flags)
                .map_or(0, |text| text.len());
            if queued == length {
                Ok(())
            } else {
                Err(format!("{queued}"))
            }
        });
        self.note("has so much to read", length);
    }

    /// shutdown().
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn shutdown(&self, how: Shutdown) -> Result<(), Errno> {
        let which = match how {
            Shutdown::Read => nix::sys::socket::Shutdown::Read,
            Shutdown::Write => nix::sys::socket::Shutdown::Write,
            Shutdown::Both => nix::sys::socket::Shutdown::Both,
        };
        let done = shutdown(self.socket.as_raw_fd(), which);
        self.note(&format!("shuts down {how:?}"), done)
    }

    /// SO_ERROR, which this resets.
    pub fn error(&self) -> Option<Errno> {
        let error = self.socket.take_error().expect("an open socket");
        let error = error.map(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        self.note("has the error", error)
    }

    /// close(). It may wait, where SO_LINGER says so.
    ///
    /// # Panics
    ///
    /// When there are clones.
    pub fn close(self) {
        self.note("closes", ());
        let socket = Arc::into_inner(self.socket).expect("the last to have the socket");
        drop(socket);
    }

    /// Closes it with a reset: SO_LINGER with no time.
    ///
    /// # Panics
    ///
    /// As [`close`](Self::close).
    pub fn reset(self) {
        self.lingers(Duration::ZERO);
        self.close();
    }

    /// SO_LINGER on.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn lingers(&self, time: Duration) {
        self.socket.set_linger(Some(time)).expect("an open socket");
        self.note("lingers", time);
    }
}

/// Work of another thread with an end.
#[derive(Debug)]
pub struct Waiting<T> {
    end: End,
    blocked: Blocked<T>,
}

impl<T: Debug + Send + 'static> Waiting<T> {
    /// What it gave, which is put on record now.
    ///
    /// # Panics
    ///
    /// When it still waits after the deadline, or has panicked.
    pub fn answer(self) -> T {
        let answer = self.blocked.answer();
        self.end.note("had waited, and has", answer)
    }

    /// Sends its thread a signal; see [`Blocked::signal`].
    ///
    /// # Panics
    ///
    /// When it has ended.
    pub fn signal(&self, signal: Signal) {
        self.blocked.signal(signal);
    }
}

nix::ioctl_read_bad!(
    /// How much there is to read.
    fionread,
    libc::FIONREAD,
    libc::c_int
);
