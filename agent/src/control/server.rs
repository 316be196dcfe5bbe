use std::{
    fs::{self, File},
    io,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixStream as StdStream,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use nix::fcntl::{Flock, FlockArg};
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::codec::Framed;

use super::protocol::{Reply, Request, codec, decode, encode};
use crate::node::NodeHandle;

/// The agent's end of the control socket. Dropping it removes the socket.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Listens at `path`, for the owner only (mode 0600). A socket that nobody
    /// serves any more is replaced.
    ///
    /// # Errors
    ///
    /// When another agent serves there, or the place cannot be used.
    pub fn bind(path: &Path) -> Result<Self> {
        let shown = path.display();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)
                .with_context(|| format!("cannot make the directory {}", dir.display()))?;
        }
        let _turn = wait_for_turn(path)?;
        if StdStream::connect(path).is_ok() {
            bail!(
                "another agent serves at {shown}; stop it first, or give this one \
                 its own --socket"
            );
        }
        remove_socket(path)?;
        let listener =
            UnixListener::bind(path).with_context(|| format!("cannot listen at {shown}"))?;
        let server = Self {
            listener,
            path: path.to_owned(),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot keep others from {shown}"))?;
        Ok(server)
    }

    /// Answers requests until it is dropped, and the conversations with it: each
    /// of them holds on to the node.
    pub async fn serve(&self, node: NodeHandle) {
        let mut conversations = JoinSet::new();
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let node = node.clone();
                    conversations.spawn(async move {
                        if let Err(error) = converse(stream, &node).await {
                            tracing::warn!("a control connection failed: {error:#}");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!("cannot accept on the control socket: {error}");
                    // Out of descriptors, most likely: let others end first.
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
            while conversations.try_join_next().is_some() {}
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = remove_socket(&self.path) {
            tracing::warn!("{error:#}");
        }
    }
}

/// Keeps other agents from binding beside this one while it is held: each would
/// remove the socket that the other has just made.
fn wait_for_turn(path: &Path) -> Result<Flock<File>> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let opened =
        File::open(dir).with_context(|| format!("cannot open the directory {}", dir.display()))?;
    Flock::lock(opened, FlockArg::LockExclusive)
        .map_err(|(_dir, errno)| errno)
        .with_context(|| format!("cannot lock the directory {}", dir.display()))
}

/// Removes a socket that nobody serves, and nothing else.
fn remove_socket(path: &Path) -> Result<()> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            fs::remove_file(path).with_context(|| format!("cannot remove the socket {shown}"))
        }
        Ok(_) => bail!("{shown} is there and is no socket; name another place with --socket"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot look at {shown}")),
    }
}

async fn converse(stream: UnixStream, node: &NodeHandle) -> Result<()> {
    let peer = stream
        .peer_cred()
        .context("cannot tell who is at the other end")?;
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid() != 0 && peer.uid() != own {
        bail!("uid {} may not control the agent", peer.uid());
    }
    let mut frames = Framed::new(stream, codec());
    while let Some(frame) = frames.next().await {
        let frame = frame.context("a request is cut or too long")?;
        let reply = match decode(&frame) {
            Ok(request) => answer(request, node).await,
            Err(error) => Err(error),
        };
        let reply = reply.unwrap_or_else(|error| Reply::Failed(format!("{error:#}")));
        frames
            .send(encode(&reply)?)
            .await
            .context("the client went away")?;
    }
    Ok(())
}

async fn answer(request: Request, node: &NodeHandle) -> Result<Reply> {
    match request {
        Request::Enrol(request) => node.enrol(*request).await.map(|()| Reply::Done),
        Request::Unenrol(netns) => node.unenrol(netns).await.map(|()| Reply::Done),
        Request::Status => Ok(Reply::Status(Box::new(node.status().await?))),
    }
}
