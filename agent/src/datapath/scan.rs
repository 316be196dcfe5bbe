//! Looking for the listeners of a namespace, which may take as long as somebody there likes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read as _,
    sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use aya::programs::iter::IterLink;
use shunt_abi::NetnsCookie;

use crate::netns::Netns;

/// For how long the sockets of one namespace are waited for. A hundred thousand take a tenth of
/// a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// The scans that have not come to their end.
///
/// The iterator takes the lock of each socket (`bpf_iter_tcp_seq_show`), and a process may sit in
/// the kernel with one: where it sends from a mapped file, for as long as the storage does not
/// answer. No other namespace is to wait for that.
#[derive(Debug, Default)]
pub(super) struct Scans(BTreeMap<NetnsCookie, Receiver<Result<()>>>);

impl Scans {
    /// Visits every TCP socket of a namespace.
    ///
    /// # Errors
    ///
    /// When the iterator fails, or comes to no end; then it goes on.
    pub(super) fn run(&mut self, netns: &Netns, visits: IterLink) -> Result<()> {
        let cookie = netns.cookie();
        if let Some(former) = self.0.remove(&cookie)
            && matches!(former.try_recv(), Err(TryRecvError::Empty))
        {
            self.0.insert(cookie, former);
            return Err(is_held_up(netns));
        }
        let result = start(netns.try_clone()?, visits)?;
        match result.recv_timeout(PATIENCE) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                self.0.insert(cookie, result);
                Err(is_held_up(netns))
            }
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("the iterator's thread ended")),
        }
    }
}

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

fn is_held_up(netns: &Netns) -> anyhow::Error {
    anyhow!(
        "cannot look for listeners in {}: a process there sits in the kernel with the lock of one \
         of its TCP sockets for more than {PATIENCE:?}, as one does whose storage does not answer; \
         `ps -eo pid,stat,wchan:32,args` shows it, in state D; try again when it is gone",
        netns.path().display()
    )
}
