//! The trials, each with what it would break.

use std::{
    fs,
    io::{self, Read as _},
    net::{Shutdown, TcpStream},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    libc,
    sys::socket::{MsgFlags, recv, send as send_with, setsockopt, sockopt},
    unistd::{gettid, pipe},
};

use super::{
    Trial,
    bench::{Bench, Pair, buffer, drain, queued, send},
};
use crate::settings::Splice;

/// A trial and what it is about.
type Named = (&'static str, Splice, fn(&mut Bench) -> Result<()>);

/// Those without which nothing is safe come first.
const TRIALS: &[Named] = &[
    ("bytes arrive", Splice::Between, arrives),
    (
        "a sleeping reader holds a bounded amount",
        Splice::Between,
        is_bounded,
    ),
    (
        "bytes are in order while the way changes",
        Splice::Between,
        is_in_order,
    ),
    ("what waits to be read is seen", Splice::Between, is_seen),
    ("a close is read after the bytes", Splice::Between, closes),
    ("a reset is read after the bytes", Splice::Between, resets),
    (
        "urgent data stays out of band",
        Splice::Between,
        is_out_of_band,
    ),
    ("a sender in blocking mode leaves", Splice::Proxy, leaves),
    (
        "a member without spliced bytes reads as ever",
        Splice::Proxy,
        reads_as_ever,
    ),
    (
        "a member that goes back to blocking mode reads as ever",
        Splice::Proxy,
        blocks_as_ever,
    ),
    ("splice(2) reads the bytes", Splice::All, is_read_by_splice),
    ("FIONREAD counts the bytes", Splice::All, is_counted),
    (
        "a blocking read waits after a half-close",
        Splice::All,
        waits_after_half_close,
    ),
    (
        "a blocking read ends with the reset",
        Splice::All,
        reads_the_reset,
    ),
    ("MSG_WAITALL waits for all", Splice::All, waits_for_all),
    (
        "bytes unread at a close are answered with a reset",
        Splice::All,
        is_reset_when_unread,
    ),
];

/// Runs them all.
pub(super) fn run(bench: &mut Bench) -> Vec<Trial> {
    TRIALS
        .iter()
        .map(|(name, needed_for, trial)| Trial {
            name: (*name).to_owned(),
            needed_for: *needed_for,
            failed: trial(bench).err().map(|error| format!("{error:#}")),
        })
        .collect()
}

fn arrives(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    send(&pair.a, b"there")?;
    ensure!(bench.has_spliced(&pair.a)?, "they went by TCP");
    expect(&drain(&pair.b)?, b"there")?;
    send(&pair.b, b"and back")?;
    ensure!(bench.has_spliced(&pair.b)?, "the answer went by TCP");
    expect(&drain(&pair.a)?, b"and back")
}

/// A message that there is room for.
const LARGE: usize = 16 * 1024;

fn is_bounded(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    let bytes = pattern(1024 * LARGE);
    send(&pair.a, &bytes[..LARGE])?;
    ensure!(bench.has_spliced(&pair.a)?, "they went by TCP");
    let mut sent = LARGE;
    // Until neither the other end nor TCP takes any more.
    while let Ok(more) =
        io::Write::write(&mut &pair.a, &bytes[sent..(sent + LARGE).min(bytes.len())])
    {
        sent += more;
        ensure!(
            sent < bytes.len(),
            "{sent} bytes were taken that nobody reads"
        );
    }
    let (queued, buffer) = (queued(&pair.b)?, buffer(&pair.b)?);
    ensure!(queued > buffer / 4, "only {queued} bytes were counted");
    // What the last segment of TCP brings may be above it.
    ensure!(
        queued <= buffer + buffer / 4,
        "{queued} bytes wait in a buffer of {buffer}"
    );
    let mut read = Vec::new();
    let until = Instant::now() + DELIVERY;
    while read.len() < sent && Instant::now() < until {
        read.extend(drain(&pair.b)?);
    }
    ensure!(
        read == bytes[..sent],
        "of {sent} bytes other ones were read"
    );
    Ok(())
}

fn is_in_order(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    let bytes = pattern(64 * 1000);
    let mut read = Vec::new();
    let mut spliced = 0;
    for (number, piece) in bytes.chunks(1000).enumerate() {
        bench.by_tcp(number % 3 == 1)?;
        send(&pair.a, piece)?;
        spliced += usize::from(bench.has_spliced(&pair.a)?);
        if number % 4 == 3 {
            read.extend(await_bytes(&pair.b, number * 1000 + 1000 - read.len())?);
        }
    }
    bench.by_tcp(false)?;
    ensure!(read == bytes, "they were read in another order");
    ensure!(
        (8..64).contains(&spliced),
        "{spliced} of 64 messages were spliced"
    );
    Ok(())
}

fn is_seen(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    ensure!(bench.unread()? == 0, "something is unread at the start");
    send(&pair.a, b"bytes")?;
    ensure!(bench.unread()? == 1, "they are not seen");
    drain(&pair.b)?;
    ensure!(bench.unread()? == 0, "they are seen after they were read");
    Ok(())
}

fn closes(bench: &mut Bench) -> Result<()> {
    let Pair { a, mut b } = bench.pair()?;
    send(&a, b"last words")?;
    drop(a);
    b.set_nonblocking(false)?;
    // The close comes by TCP.
    b.set_read_timeout(Some(DELIVERY))?;
    let mut read = Vec::new();
    b.read_to_end(&mut read)?;
    expect(&read, b"last words")
}

fn resets(bench: &mut Bench) -> Result<()> {
    let Pair { a, b } = bench.pair()?;
    send(&a, b"last words")?;
    reset_on_close(&a)?;
    drop(a);
    let mut room = [0; 64];
    let read = (&b).read(&mut room)?;
    expect(&room[..read], b"last words")?;
    is_reset(awaited(|| (&b).read(&mut room)))
}

fn is_out_of_band(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    send(&pair.a, b"before")?;
    send_with(pair.a.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
    send(&pair.a, b"after")?;
    let mut room = [0; 64];
    let read = (&pair.b).read(&mut room)?;
    expect(&room[..read], b"before")?;
    urgent(&pair.b, &mut room[..1]).context("no urgent byte is there")?;
    expect(&room[..1], b"!")?;
    expect(&await_bytes(&pair.b, b"after".len())?, b"after")
}

fn leaves(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    send(&pair.a, b"one")?;
    pair.a.set_nonblocking(false)?;
    send(&pair.a, b"two")?;
    ensure!(!bench.has_spliced(&pair.a)?, "it does not");
    expect(&await_bytes(&pair.b, b"onetwo".len())?, b"onetwo")
}

/// What an application's socket has to do in the mode `proxy`: it is a member,
/// so that it can send, and what it is sent goes by TCP.
fn reads_as_ever(bench: &mut Bench) -> Result<()> {
    without_splicing(bench, |pair| {
        as_ever(&pair)?;
        ends_as_ever(pair)
    })
}

/// Tries a pair of members whose bytes all go by TCP.
fn without_splicing(bench: &mut Bench, trial: impl FnOnce(Pair) -> Result<()>) -> Result<()> {
    let pair = bench.pair()?;
    bench.by_tcp(true)?;
    let seen = trial(pair);
    bench.by_tcp(false)?;
    seen
}

/// A reset is read as an error, and later reads as the end.
fn ends_as_ever(Pair { a, b }: Pair) -> Result<()> {
    reset_on_close(&b)?;
    drop(b);
    let mut room = [0; 64];
    is_reset(awaited(|| (&a).read(&mut room)))?;
    ensure!(
        (&a).read(&mut room)? == 0,
        "there is something after the reset"
    );
    Ok(())
}

/// Only a socket in non-blocking mode is made a member, but nobody is told when its
/// application changes that.
fn blocks_as_ever(bench: &mut Bench) -> Result<()> {
    without_splicing(bench, |Pair { a, b }| is_woken_by_reset(&a, b))
}

fn as_ever(pair: &Pair) -> Result<()> {
    let mut room = [0; 64];
    would_block((&pair.a).read(&mut room))?;
    send(&pair.b, b"hello")?;
    let peeked = awaited(|| {
        let peeked = recv(pair.a.as_raw_fd(), &mut room, MsgFlags::MSG_PEEK);
        Ok(peeked?)
    })?;
    expect(&room[..peeked], b"hello")?;
    let counted = readable(&pair.a)?;
    ensure!(counted == 5, "FIONREAD counts {counted} of 5");
    expect(&drain(&pair.a)?, b"hello")?;
    pair.a.shutdown(Shutdown::Write)?;
    would_block((&pair.a).read(&mut room))?;
    send(&pair.b, b"more")?;
    expect(&await_bytes(&pair.a, b"more".len())?, b"more")
}

fn is_read_by_splice(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    send(&pair.a, b"bytes")?;
    let (_reader, writer) = pipe()?;
    let moved = splice(
        &pair.b,
        None,
        &writer,
        None,
        64,
        SpliceFFlags::SPLICE_F_NONBLOCK,
    )?;
    ensure!(
        moved == 5,
        "it reads {moved} of 5 bytes, which is the end of the file to a program"
    );
    Ok(())
}

fn is_counted(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    send(&pair.a, b"bytes")?;
    let readable = readable(&pair.b)?;
    ensure!(readable == 5, "it counts {readable} of 5");
    Ok(())
}

/// How often something is tried that fails now and then.
const OFTEN: usize = 10;

fn waits_after_half_close(bench: &mut Bench) -> Result<()> {
    for _ in 0..OFTEN {
        let pair = bench.pair()?;
        pair.b.set_nonblocking(false)?;
        pair.b.shutdown(Shutdown::Write)?;
        let read = blocked_read(&pair.b, || send(&pair.a, b"answer"))?;
        expect(&read?, b"answer")?;
    }
    Ok(())
}

fn reads_the_reset(bench: &mut Bench) -> Result<()> {
    let Pair { a, b } = bench.pair()?;
    is_woken_by_reset(&b, a)
}

/// A blocking read of one end, while the other one is reset.
fn is_woken_by_reset(end: &TcpStream, other: TcpStream) -> Result<()> {
    end.set_nonblocking(false)?;
    let read = blocked_read(end, || {
        reset_on_close(&other)?;
        drop(other);
        Ok(())
    })?;
    is_reset(read.map(|bytes| bytes.len()))
}

fn waits_for_all(bench: &mut Bench) -> Result<()> {
    let pair = bench.pair()?;
    pair.b.set_nonblocking(false)?;
    send(&pair.a, b"half")?;
    let read = while_blocked(
        || {
            let mut room = [0; 8];
            let read = recv(pair.b.as_raw_fd(), &mut room, MsgFlags::MSG_WAITALL);
            read.map(|length| room[..length].to_vec())
        },
        || send(&pair.a, b"half"),
    )?;
    expect(&read?, b"halfhalf")
}

fn is_reset_when_unread(bench: &mut Bench) -> Result<()> {
    let Pair { a, b } = bench.pair()?;
    send(&a, b"unread")?;
    drop(b);
    let mut room = [0; 1];
    is_reset(awaited(|| (&a).read(&mut room)))
}

/// Reads while another thread waits until the reader sleeps, and then does
/// `meanwhile`.
fn blocked_read(
    mut end: &TcpStream,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<io::Result<Vec<u8>>> {
    while_blocked(
        || {
            let mut room = [0; 64];
            let length = end.read(&mut room)?;
            Ok(room[..length].to_vec())
        },
        meanwhile,
    )
}

/// Does `work` on a thread of its own, and `meanwhile` when that one sleeps, or
/// is done.
fn while_blocked<T: Send>(
    work: impl FnOnce() -> T + Send,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<T> {
    thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let worker = scope.spawn(move || {
            tell.send(gettid()).ok();
            work()
        });
        let thread = told.recv().context("a thread did not start")?;
        let stat = format!("/proc/self/task/{thread}/stat");
        let until = Instant::now() + Duration::from_millis(100);
        while !worker.is_finished() && !sleeps(&stat) && Instant::now() < until {
            thread::yield_now();
        }
        let done = meanwhile();
        let result = worker
            .join()
            .map_err(|_panic| anyhow::anyhow!("a reader panicked"))?;
        done.map(|()| result)
    })
}

/// Whether the thread with this `stat` waits for something.
fn sleeps(stat: &str) -> bool {
    // The state follows the name, which is in parentheses.
    fs::read_to_string(stat).is_ok_and(|text| {
        text.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('S'))
    })
}

/// How long TCP may take to deliver what has been sent: on a busy machine a packet of
/// loopback waits for the processor, too, and one trial that is late means that nothing is
/// spliced until the agent starts again.
const DELIVERY: Duration = Duration::from_secs(2);

/// Repeats what would block until it does not, or nothing comes any more.
fn awaited<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let until = Instant::now() + DELIVERY;
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                thread::yield_now();
            }
            done => return done,
        }
    }
}

/// Reads the urgent byte that has been sent.
fn urgent(end: &TcpStream, room: &mut [u8]) -> io::Result<usize> {
    awaited(|| match recv(end.as_raw_fd(), room, MsgFlags::MSG_OOB) {
        // That there is none (yet).
        Err(Errno::EINVAL) => Err(Errno::EAGAIN.into()),
        done => Ok(done?),
    })
}

/// Reads `count` bytes that have been sent.
fn await_bytes(end: &TcpStream, count: usize) -> Result<Vec<u8>> {
    let mut read = Vec::new();
    while read.len() < count {
        let mut room = [0; 4096];
        let more = awaited(|| (&*end).read(&mut room))
            .with_context(|| format!("{} bytes are missing", count - read.len()))?;
        ensure!(more > 0, "{} bytes are missing", count - read.len());
        read.extend(&room[..more]);
    }
    Ok(read)
}

/// Bytes of which no two stretches are alike.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn expect(read: &[u8], expected: &[u8]) -> Result<()> {
    if read != expected {
        bail!(
            "{:?} was read in place of {:?}",
            String::from_utf8_lossy(read),
            String::from_utf8_lossy(expected)
        );
    }
    Ok(())
}

fn would_block(read: io::Result<usize>) -> Result<()> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => bail!("a read without bytes gave {other:?}"),
    }
}

fn is_reset(read: io::Result<usize>) -> Result<()> {
    match read {
        Err(error) if error.raw_os_error() == Some(Errno::ECONNRESET as i32) => Ok(()),
        Err(error) => bail!("it gave {error}"),
        Ok(read) => bail!("it gave {read} bytes"),
    }
}

/// The close of this end will be a reset.
fn reset_on_close(end: &TcpStream) -> Result<()> {
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(end, sockopt::Linger, &at_once).context("cannot ask for a reset")
}

nix::ioctl_read_bad!(
    /// `FIONREAD`
    fionread,
    libc::FIONREAD,
    libc::c_int
);

/// How many bytes the kernel says can be read.
fn readable(end: &TcpStream) -> Result<i32> {
    let mut count = 0;
    // SAFETY: the socket is open, and the number has room.
    unsafe { fionread(end.as_raw_fd(), &raw mut count) }?;
    Ok(count)
}
