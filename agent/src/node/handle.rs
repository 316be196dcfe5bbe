//! The way to the thread that owns the node.

use std::{path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use shunt_abi::NetnsCookie;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

use super::{EnrolRequest, Enrolled, Node, Status, Store, Totals, Version};
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
    /// Every namespace of the pod with this uid; the answer says how many there were.
    UnenrolPod(String, oneshot::Sender<Result<usize>>),
    Enrolled(oneshot::Sender<Result<Vec<Enrolled>>>),
    Status(oneshot::Sender<Result<Status>>),
    Totals(oneshot::Sender<Result<Totals>>),
    /// Programs missed listeners in these namespaces.
    FindListeners(Vec<NetnsCookie>, oneshot::Sender<Result<Duration>>),
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

    /// A way to the node that does not keep it.
    pub fn downgrade(&self) -> WeakNode {
        WeakNode {
            commands: self.commands.downgrade(),
        }
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

    /// Ends the redirection of every namespace of the pod with this uid; says of how
    /// many. A pod has two for a moment when its sandbox is made anew.
    ///
    /// # Errors
    ///
    /// When the agent is shutting down.
    pub async fn unenrol_pod(&self, uid: String) -> Result<usize> {
        self.ask(|answer| Command::UnenrolPod(uid, answer)).await
    }

    /// What is in force.
    ///
    /// # Errors
    ///
    /// When the agent is shutting down.
    pub async fn enrolled(&self) -> Result<Vec<Enrolled>> {
        self.ask(Command::Enrolled).await
    }

    /// What the agent has to say.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub async fn status(&self) -> Result<Status> {
        self.ask(Command::Status).await
    }

    /// What was counted on the whole node.
    ///
    /// # Errors
    ///
    /// When the thread has ended.
    pub async fn totals(&self) -> Result<Totals> {
        self.ask(Command::Totals).await
    }

    /// Has the listeners of these namespaces looked for; says how long it took.
    ///
    /// # Errors
    ///
    /// When the thread has ended.
    pub async fn find_listeners(&self, pods: Vec<NetnsCookie>) -> Result<Duration> {
        self.ask(|answer| Command::FindListeners(pods, answer))
            .await
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
        // It fails only when the thread has ended, and then nobody needs it.
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

/// A way to the node that does not keep it: for whoever only looks.
#[derive(Clone)]
pub struct WeakNode {
    commands: mpsc::WeakSender<Command>,
}

impl WeakNode {
    /// The way to the node, `None` when it is ending.
    pub fn upgrade(&self) -> Option<NodeHandle> {
        let commands = self.commands.upgrade()?;
        Some(NodeHandle { commands })
    }

    /// Whether the thread has ended, or is ending.
    pub fn has_ended(&self) -> bool {
        self.commands
            .upgrade()
            .is_none_or(|commands| commands.is_closed())
    }
}

/// A node of which a test is the thread.
#[cfg(test)]
pub(crate) fn handle_for_tests() -> (NodeHandle, Inbox) {
    let (commands, inbox) = mpsc::channel(64);
    (NodeHandle { commands }, Inbox(inbox))
}

/// What a node is asked, for a test to answer.
#[cfg(test)]
pub(crate) struct Inbox(mpsc::Receiver<Command>);

#[cfg(test)]
impl Inbox {
    /// Answers the next question, which has to be that for the totals.
    pub(crate) fn answer_totals(&mut self, totals: Totals) {
        match self.0.try_recv() {
            Ok(Command::Totals(answer)) => {
                let _ = answer.send(Ok(totals));
            }
            Ok(_) => panic!("something else was asked"),
            Err(error) => panic!("nothing was asked: {error}"),
        }
    }

    /// Whether nothing is asked.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
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
