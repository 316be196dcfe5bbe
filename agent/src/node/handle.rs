//! The way to the thread that owns the node.

use std::{path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use shunt_abi::NetnsCookie;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

use super::{EnrolRequest, Node, Status, Store, Version};
use crate::{datapath::Datapath, network::Changes};

/// How long a version of settings that is no longer in force stays in the maps: a
/// program that read the settings just before still looks into its lists, and runs
/// for microseconds.
const GRACE: Duration = Duration::from_secs(1);

/// How long after a failure a pod's network is looked at again.
const RETRY: Duration = Duration::from_secs(1);

/// How long after a failure a namespace is looked at again that a former agent has
/// enrolled: all of /proc is searched for it.
const RETRY_KEPT: Duration = Duration::from_secs(30);

/// How long the programs of a former agent follow the connections that it began, when
/// those of this one cannot: until a handshake is over, with four SYNs lost.
const GRACE_OF_FORMER: Duration = Duration::from_secs(20);

/// A request to the thread, with where to answer.
pub(super) enum Command {
    Enrol(Box<EnrolRequest>, oneshot::Sender<Result<()>>),
    Unenrol(PathBuf, oneshot::Sender<Result<()>>),
    Status(oneshot::Sender<Result<Status>>),
    /// Programs missed listeners in these namespaces.
    FindListeners(Vec<NetnsCookie>),
    /// Programs asked for connections to be spliced; the answer says how long it
    /// took.
    Splice(oneshot::Sender<Result<Duration>>),
    /// Something has changed in some namespaces.
    FollowNetworks(Changes),
    /// This namespace could not be looked at.
    LookAgain(NetnsCookie),
    /// What was replaced, after its grace.
    Remove(Box<Version>),
    /// This namespace of a former agent could not be looked at.
    LookAtKept(NetnsCookie),
    /// Versions of settings before this one are no longer in force.
    Sweep(u32),
    /// The connections of a former agent have been accepted.
    Retire,
}

/// The way to the thread that owns the node.
#[derive(Clone)]
pub struct NodeHandle {
    commands: mpsc::Sender<Command>,
}

impl NodeHandle {
    /// Starts the thread, and puts the programs in force; what a former agent has
    /// left in force is taken over with what is in `store`, which is there when
    /// everything is to stay in force. The thread ends, and else detaches everything,
    /// when the last handle is dropped.
    ///
    /// # Errors
    ///
    /// When the datapath's maps are not to be had, or no thread or socket is, or the
    /// kernel refuses the programs.
    pub async fn start(
        datapath: Datapath,
        store: Option<Store>,
    ) -> Result<(Self, thread::JoinHandle<()>)> {
        let (commands, inbox) = mpsc::channel(64);
        let timer = Timer {
            runtime: Handle::current(),
            commands: commands.downgrade(),
        };
        let mut node = Node::new(datapath, store, timer)?;
        let (report, begun) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("node".to_owned())
            .spawn(move || {
                let begun = node.take_over();
                let is_good = begun.is_ok();
                let _ = report.send(begun);
                if is_good {
                    node.serve(inbox);
                }
            })
            .context("cannot start a thread")?;
        begun
            .await
            .context("the node's thread has panicked; its log says where")??;
        Ok((Self { commands }, thread))
    }

    /// The way to a node that has ended.
    #[cfg(test)]
    pub(crate) fn ended() -> Self {
        Self {
            commands: mpsc::channel(1).0,
        }
    }

    /// Enrols a namespace, or replaces the settings of an enrolled one. When it
    /// returns the redirection is in force.
    ///
    /// # Errors
    ///
    /// When it cannot be done; then nothing has changed.
    pub async fn enrol(&self, request: EnrolRequest) -> Result<()> {
        self.ask(|answer| Command::Enrol(Box::new(request), answer))
            .await
    }

    /// Ends the redirection of a namespace.
    ///
    /// # Errors
    ///
    /// When it is not enrolled.
    pub async fn unenrol(&self, netns: PathBuf) -> Result<()> {
        self.ask(|answer| Command::Unenrol(netns, answer)).await
    }

    /// What the agent has to say.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub async fn status(&self) -> Result<Status> {
        self.ask(Command::Status).await
    }

    /// Has the listeners of these namespaces looked for.
    pub async fn find_listeners(&self, pods: Vec<NetnsCookie>) {
        // It fails only when the thread has ended, and then nobody needs them.
        let _ = self.commands.send(Command::FindListeners(pods)).await;
    }

    /// Has the connections spliced that the programs asked for; says how long it
    /// took.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn splice(&self) -> Result<Duration> {
        self.ask(Command::Splice).await
    }

    /// Has the agent look at what has changed in the pods' networks.
    pub async fn follow_networks(&self, changes: Changes) {
        // As above.
        let _ = self.commands.send(Command::FollowNetworks(changes)).await;
    }

    /// Waits for the thread to end, which it does not do by itself: it has
    /// panicked.
    pub async fn has_ended(&self) {
        self.commands.closed().await;
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command,
    ) -> Result<T> {
        let (answer, wait) = oneshot::channel();
        self.commands
            .send(command(answer))
            .await
            .map_err(|_ended| anyhow!("the agent is shutting down"))?;
        wait.await
            .map_err(|_ended| anyhow!("the agent is shutting down"))?
    }
}

/// Sends a command back to the thread after a while.
pub(super) struct Timer {
    runtime: Handle,
    commands: mpsc::WeakSender<Command>,
}

impl Timer {
    pub(super) fn remove_later(&self, version: Version) {
        self.send_after(GRACE, Command::Remove(Box::new(version)));
    }

    pub(super) fn look_again(&self, cookie: NetnsCookie) {
        self.send_after(RETRY, Command::LookAgain(cookie));
    }

    pub(super) fn look_at_kept(&self, cookie: NetnsCookie) {
        self.send_after(RETRY_KEPT, Command::LookAtKept(cookie));
    }

    pub(super) fn sweep_later(&self, first: u32) {
        self.send_after(GRACE, Command::Sweep(first));
    }

    pub(super) fn retire_later(&self) {
        self.send_after(GRACE_OF_FORMER, Command::Retire);
    }

    fn send_after(&self, wait: Duration, command: Command) {
        let commands = self.commands.clone();
        self.runtime.spawn(async move {
            tokio::time::sleep(wait).await;
            if let Some(commands) = commands.upgrade() {
                let _ = commands.send(command).await;
            }
        });
    }
}
