use std::path::PathBuf;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio_util::codec::LengthDelimitedCodec;

use crate::node::{EnrolRequest, Status};

/// The longest frame, in bytes: room for settings with 65,535 ports in each list
/// and 10,000 address ranges, and a bound for everybody else.
pub const MAX_FRAME: usize = 16 * 1024 * 1024;

/// What a client asks, one for each frame.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Enrol a namespace, or replace its settings.
    Enrol(Box<EnrolRequest>),
    /// End the redirection of the namespace at this path.
    Unenrol(PathBuf),
    /// Say what is enrolled, counted and attached.
    Status,
}

/// What the agent answers, one for each request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done,
    /// The answer to [`Request::Status`].
    Status(Box<Status>),
    /// It was not done, and why.
    Failed(String),
}

/// Frames: a length of four bytes in network byte order, then that much JSON.
pub(super) fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder()
        .max_frame_length(MAX_FRAME)
        .new_codec()
}

pub(super) fn encode(message: &impl Serialize) -> Result<Bytes> {
    let json = serde_json::to_vec(message).context("cannot write the message as JSON")?;
    Ok(Bytes::from(json))
}

pub(super) fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T> {
    serde_json::from_slice(frame).context(
        "the message is not one of this version of shunt; \
         are the agent and the command of the same version?",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_comes_through() {
        let frame = encode(&Request::Unenrol("/run/netns/a".into())).expect("it encodes");
        let back: Request = decode(&frame).expect("it decodes");
        assert!(matches!(back, Request::Unenrol(path) if path.as_os_str() == "/run/netns/a"));
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(frame in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<Request>(&frame);
            let _ = decode::<Reply>(&frame);
        }

        #[test]
        fn a_cut_request_is_an_error_that_says_so(cut in 0_usize..20) {
            let frame = encode(&Request::Unenrol("/run/netns/a".into())).expect("it encodes");
            let error = decode::<Request>(&frame[..cut]).expect_err("it is cut");
            prop_assert!(error.to_string().contains("same version"));
        }
    }
}
