use std::{
    fs::{self, File},
    io,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixStream as StdStream,
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::protocol::{MAX_FRAME, Reply, Request, codec, decode, encode};
use crate::{cni::server::CniServer, node::NodeHandle};

type Frames = Framed<UnixStream, LengthDelimitedCodec>;

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
            fs::create_dir_all(dir).with_context(|| {
                format!(
                    "cannot make the directory {}; name a socket in another one with --socket",
                    dir.display()
                )
            })?;
        }
        let _turn = wait_for_turn(path, LONGEST_TURN)?;
        if StdStream::connect(path).is_ok() {
            bail!(
                "another agent serves at {shown}; stop it first, or give this one \
                 its own --socket"
            );
        }
        remove_socket(path)?;
        let listener = UnixListener::bind(path).with_context(|| {
            format!("cannot listen at {shown}; name another place with --socket")
        })?;
        let server = Self {
            listener,
            path: path.to_owned(),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot keep others from {shown}"))?;
        Ok(server)
    }

    /// Answers requests until it is dropped, and the conversations with it: each
    /// of them holds on to the node. Without `cni` it is no CNI plugin's agent.
    pub async fn serve(&self, node: NodeHandle, cni: Option<CniServer>) {
        let asked = Asked { node, cni };
        let mut conversations = JoinSet::new();
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let asked = asked.clone();
                    conversations.spawn(async move {
                        if let Err(error) = converse(stream, &asked).await {
                            tracing::warn!(
                                error = format!("{error:#}"),
                                "a control connection failed"
                            );
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the control socket");
                    // Out of descriptors, most likely: let others end first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            while conversations.try_join_next().is_some() {}
        }
    }
}

/// Who knows the answers.
#[derive(Clone)]
struct Asked {
    node: NodeHandle,
    cni: Option<CniServer>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = remove_socket(&self.path) {
            tracing::warn!(error = format!("{error:#}"), "the control socket is left");
        }
    }
}

/// How long an agent that binds at the same time may take, with much to spare. Anybody who
/// can open the directory can lock it, and may never let go.
const LONGEST_TURN: Duration = Duration::from_secs(5);

/// Keeps other agents from binding beside this one while it is held: each would
/// remove the socket that the other has just made.
fn wait_for_turn(path: &Path, longest: Duration) -> Result<Flock<File>> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let shown = dir.display();
    let mut opened = File::open(dir).with_context(|| {
        format!("cannot open the directory {shown}; name a socket in another one with --socket")
    })?;
    let begun = Instant::now();
    loop {
        match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((dir, Errno::EWOULDBLOCK)) if begun.elapsed() < longest => opened = dir,
            Err((_dir, Errno::EWOULDBLOCK)) => bail!(
                "somebody else keeps the directory {shown} locked; give this agent a --socket in a \
                 directory of its own"
            ),
            Err((_dir, errno)) => {
                return Err(errno).with_context(|| format!("cannot lock the directory {shown}"));
            }
        }
        thread::sleep(longest / 100);
    }
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

/// Answers one client until it goes away, or says what cannot be understood.
async fn converse(stream: UnixStream, asked: &Asked) -> Result<()> {
    let peer = stream
        .peer_cred()
        .context("cannot tell who is at the other end")?;
    let mut frames = Framed::new(stream, codec());
    if let Err(error) = may_control(peer.uid()) {
        return refuse(&mut frames, error).await;
    }
    while let Some(frame) = frames.next().await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => return refuse(&mut frames, frame_error(&error)).await,
        };
        let reply = match decode(&frame) {
            Ok(request) => answer(request, asked).await,
            Err(error) => Err(error),
        };
        let reply = reply.unwrap_or_else(|error| Reply::Failed(format!("{error:#}")));
        send(&mut frames, &reply).await?;
    }
    Ok(())
}

/// The mode of the socket keeps others out already, as long as nobody changes it.
fn may_control(uid: u32) -> Result<()> {
    let own = nix::unistd::geteuid().as_raw();
    ensure!(
        uid == 0 || uid == own,
        "uid {uid} may not control the agent; call this as root"
    );
    Ok(())
}

/// Why no frame came in: what follows cannot be told apart any more.
fn frame_error(error: &io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::InvalidData {
        anyhow!("a request of more than {MAX_FRAME} bytes is not read; shorten its lists")
    } else {
        anyhow!("the request is cut ({error}); send all of it")
    }
}

/// Tells the client why this was the end, and the log as well.
async fn refuse(frames: &mut Frames, why: anyhow::Error) -> Result<()> {
    send(frames, &Reply::Failed(format!("{why:#}"))).await?;
    Err(why)
}

async fn send(frames: &mut Frames, reply: &Reply) -> Result<()> {
    let sent = frames.send(encode(reply)?).await;
    sent.context("the client went away")
}

async fn answer(request: Request, Asked { node, cni }: &Asked) -> Result<Reply> {
    match request {
        Request::Cni(request) => match cni {
            Some(cni) => cni.answer(request).await,
            None => bail!("this agent knows nothing of pods; start it with --kubernetes"),
        },
        Request::Enrol(request) => node.enrol(*request).await.map(|()| Reply::Done),
        Request::Unenrol(netns) => node.unenrol(netns).await.map(|()| Reply::Done),
        Request::Status => Ok(Reply::Status(Box::new(node.status().await?))),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, net::Shutdown};

    use super::*;

    /// What a server whose node has ended says to `bytes`, the first of which are
    /// the length of the frame.
    fn conversation(bytes: &[u8]) -> Vec<Reply> {
        let (mut client, server) = StdStream::pair().expect("two sockets");
        client.write_all(bytes).expect("there is room");
        client.shutdown(Shutdown::Write).expect("the end");
        let tokios = |stream: StdStream| {
            stream.set_nonblocking(true).expect("its own");
            UnixStream::from_std(stream).expect("a socket")
        };
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(async {
                // Its error goes into the log.
                let asked = Asked {
                    node: NodeHandle::ended(),
                    cni: None,
                };
                let _ = converse(tokios(server), &asked).await;
                let mut frames = Framed::new(tokios(client), codec());
                let mut replies = Vec::new();
                while let Some(frame) = frames.next().await {
                    replies.push(decode(&frame.expect("a whole frame")).expect("a reply"));
                }
                replies
            })
    }

    fn frame(body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).expect("short");
        [&length.to_be_bytes(), body].concat()
    }

    /// Why the only answer is a refusal.
    fn refusal(bytes: &[u8]) -> String {
        match conversation(bytes).as_slice() {
            [Reply::Failed(why)] => why.clone(),
            others => panic!("{others:?}"),
        }
    }

    #[test]
    fn frames_that_are_too_long_or_cut_are_refused_with_a_reason() {
        let longest = u32::try_from(MAX_FRAME).expect("it is short");
        for length in [longest + 1, u32::MAX] {
            let why = refusal(&length.to_be_bytes());
            assert!(why.contains("16777216 bytes"), "{why}");
        }
        let whole = frame(br#""status""#);
        // A length and nothing behind it looks like the end.
        for cut in (1..whole.len()).filter(|&cut| cut != 4) {
            let why = refusal(&whole[..cut]);
            assert!(why.contains("is cut"), "{cut}: {why}");
        }
        assert!(conversation(&[]).is_empty());
    }

    #[test]
    fn after_a_message_that_means_nothing_the_next_is_heard() {
        let both = [frame(b"{\"enroll\": 1}"), frame(br#""status""#)].concat();
        let replies = conversation(&both);
        let [Reply::Failed(first), Reply::Failed(second)] = replies.as_slice() else {
            panic!("{replies:?}");
        };
        assert!(first.contains("enroll"), "{first}");
        assert!(second.contains("shutting down"), "{second}");
    }

    #[test]
    fn nobody_else_may_control_the_agent() {
        let own = nix::unistd::geteuid().as_raw();
        assert!(may_control(0).is_ok() && may_control(own).is_ok());
        let error = may_control(own + 1).expect_err("somebody else").to_string();
        assert!(error.contains("may not control"), "{error}");
    }

    #[test]
    fn a_directory_that_somebody_keeps_locked_is_not_waited_for_without_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("shunt.sock");
        let _held = wait_for_turn(&path, Duration::ZERO).expect("nobody else is here");
        let error = wait_for_turn(&path, Duration::ZERO)
            .expect_err("it is locked")
            .to_string();
        assert!(error.contains("--socket"), "{error}");
    }
}
