use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream as StdStream,
    path::Path,
};

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::BytesMut;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::UnixStream;
use tokio_util::codec::{Decoder as _, Encoder as _, Framed, LengthDelimitedCodec};

use super::protocol::{Reply, Request, codec, decode, encode};

/// A connection to the agent.
pub struct Client {
    frames: Framed<UnixStream, LengthDelimitedCodec>,
}

impl Client {
    /// Connects to the agent that serves at `socket`.
    ///
    /// # Errors
    ///
    /// When none does, or the caller may not talk to it.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|error| explain(socket, &error))?;
        Ok(Self {
            frames: Framed::new(stream, codec()),
        })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    ///
    /// When the agent could not do it, or is gone.
    pub async fn ask(&mut self, request: &Request) -> Result<Reply> {
        let sent = self.frames.send(encode(request)?).await;
        // The agent may have closed its end after an answer that says why.
        let frame = match (self.frames.next().await, sent) {
            (Some(answer), _) => answer.context("the agent's answer is cut")?,
            (None, Err(error)) => Err(error).context("the agent closed the connection")?,
            (None, Ok(())) => {
                bail!("the agent closed the connection without an answer; its log says why")
            }
        };
        match decode(&frame)? {
            Reply::Failed(why) => bail!(why),
            reply @ (Reply::Done | Reply::Status(_) | Reply::Undecided(_)) => Ok(reply),
        }
    }
}

/// Asks the agent at `socket` once, without a runtime. Waits as long as it takes.
///
/// # Errors
///
/// When none serves there, or it does not answer.
pub(crate) fn ask_once(socket: &Path, request: &Request) -> Result<Reply> {
    let mut stream = StdStream::connect(socket).map_err(|error| explain(socket, &error))?;
    let (mut codec, mut bytes) = (codec(), BytesMut::new());
    codec.encode(encode(request)?, &mut bytes)?;
    stream
        .write_all(&bytes)
        .context("cannot send the request")?;
    stream
        .shutdown(Shutdown::Write)
        .context("cannot end the request")?;
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .context("cannot read the agent's answer")?;
    let frame = codec
        .decode_eof(&mut BytesMut::from(answer.as_slice()))
        .context("the agent's answer is cut")?
        .context("the agent closed the connection without an answer; its log says why")?;
    decode(&frame)
}

/// Why there is no connection, and what to do.
fn explain(socket: &Path, error: &io::Error) -> anyhow::Error {
    let shown = socket.display();
    if matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused
    ) {
        anyhow!(
            "no agent serves at {shown}; start one with `shunt run`, or name its socket \
             with --socket"
        )
    } else if error.kind() == ErrorKind::PermissionDenied {
        anyhow!("{shown} is for the user that runs the agent; call this as root")
    } else {
        anyhow!("cannot connect to the agent at {shown}: {error}")
    }
}
