//! Looking for the listeners of a namespace, which may take as long as somebody there likes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read as _,
    sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use aya::programs::iter::IterLink;
use shunt_abi::NetnsCookie;

use crate::netns::Netns;

/// For how long the end of a scan is waited for. A hundred thousand sockets take a tenth of a
/// second.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many scans of one namespace may be on their way.
const MOST: usize = 4;

/// The scans that have not come to their end, by namespace.
///
/// The iterator takes the lock of each socket (`bpf_iter_tcp_seq_show`), and a process may sit in
/// the kernel with one: where it sends from a mapped file, for as long as the storage does not
/// answer. The listeners come before all others (`TCP_SEQ_STATE_LISTENING`), so they are found
/// nevertheless.
#[derive(Debug, Default)]
pub(super) struct Scans(BTreeMap<NetnsCookie, Vec<Receiver<Result<()>>>>);

impl Scans {
    /// Visits the TCP sockets of a namespace, the listeners first. Where that comes to no end it
    /// goes on without the caller.
    ///
    /// # Errors
    ///
    /// When the iterator fails, or too many of them have come to no end.
    pub(super) fn run(&mut self, netns: &Netns, visits: IterLink) -> Result<()> {
        let cookie = netns.cookie();
        self.forget_ended();
        let others = self.0.get(&cookie).map_or(0, Vec::len);
        if others >= MOST {
            bail!(
                "cannot look for listeners in {}: {others} looks have not come to their end; \
                 {CAUSE}",
                netns.path().display()
            );
        }
        let result = start(netns.try_clone()?, visits)?;
        match result.recv_timeout(PATIENCE) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!(
                    cookie,
                    "{} has sockets that cannot be looked at; its listeners come first, so they \
                     are most likely known; {CAUSE}",
                    netns.path().display()
                );
                self.0.entry(cookie).or_default().push(result);
                Ok(())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the iterator's thread ended"),
        }
    }

    fn forget_ended(&mut self) {
        self.0.retain(|_, scans| {
            scans.retain(|scan| matches!(scan.try_recv(), Err(TryRecvError::Empty)));
            !scans.is_empty()
        });
    }
}

/// What most likely holds them up.
const CAUSE: &str = "most likely a process there sits in the kernel with the lock of a TCP socket, \
                     as one does whose storage does not answer: `ps -eLo pid,tid,stat,wchan:32,args` \
                     shows it in state D, beside the agent's thread that waits for it";

/// On a thread that nobody waits for.
fn start(netns: Netns, visits: IterLink) -> Result<Receiver<Result<()>>> {
    let (done, result) = mpsc::channel();
    thread::Builder::new()
        .name("listeners".to_owned())
        .spawn(move || {
            // An iterator sees the namespace of the thread that opens it.
            let seen = netns.within(|| {
                let visits = visits.into_file().context("cannot open the iterator")?;
                to_the_end(visits)
            });
            // Where it took too long nobody listens.
            let _ = done.send(seen.flatten());
        })
        .context("cannot start a thread")?;
    Ok(result)
}

fn to_the_end(mut visits: File) -> Result<()> {
    let mut nothing = Vec::new();
    visits
        .read_to_end(&mut nothing)
        .context("the iterator failed")?;
    Ok(())
}
