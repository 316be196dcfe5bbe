//! A load between two pods of the mesh.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
};

use serde::Deserialize;
use shunt_tests::deadline::wait_until;

use crate::{
    cluster::Cluster,
    pods::{CONTROL, Manifest, PORT, Pod},
};

/// New connections each second.
const RATE: u32 = 500;
/// Connections that stay.
const LONG: u32 = 20;

/// A running load: a server and a client, each with its sidecar.
pub(crate) struct Load<'a> {
    server: Pod<'a>,
    client: Pod<'a>,
    /// Where the client says what it has counted.
    control: SocketAddr,
    rate: u32,
}

/// What it has done so far.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Counts {
    /// New connections that were answered.
    pub(crate) new: u64,
    /// Answers on connections that stay.
    pub(crate) long: u64,
    /// Connections that failed.
    pub(crate) failed: u64,
    /// Connections that went past a proxy.
    pub(crate) around: u64,
    /// What was wrong with the first of those.
    pub(crate) complaints: Vec<String>,
}

impl<'a> Load<'a> {
    /// Starts one; connections are answered when this returns.
    pub(crate) fn start(cluster: &'a Cluster) -> Self {
        Self::start_at(cluster, RATE)
    }

    /// One with so many new connections each second. What lasts a minute needs fewer than
    /// usual: a proxy has 28,232 ports to call one server from, and each waits for a
    /// minute after its connection (TIME-WAIT).
    pub(crate) fn start_at(cluster: &'a Cluster, rate: u32) -> Self {
        let server = Pod::start(
            cluster,
            &Manifest::in_mesh("load-server", &["serve", &PORT.to_string()]),
        );
        let words = [
            "load",
            &CONTROL.to_string(),
            &server.address().to_string(),
            &rate.to_string(),
            &LONG.to_string(),
        ];
        let client = Pod::start(cluster, &Manifest::in_mesh("load-client", &words));
        // Kept, because the API server may be away while the load goes on.
        let control = (client.ip(), CONTROL).into();
        let load = Self {
            server,
            client,
            control,
            rate,
        };
        load.wait_for_more(u64::from(rate));
        load
    }

    /// The counts of now.
    ///
    /// # Panics
    ///
    /// When the client does not say.
    pub(crate) fn counts(&self) -> Counts {
        self.try_counts().expect("the client answers")
    }

    /// Waits until so many new connections have been answered from now on.
    pub(crate) fn wait_for_more(&self, connections: u64) {
        let before = self.try_counts().map_or(0, |counts| counts.new);
        wait_until("new connections", || {
            let counts = self.try_counts()?;
            if counts.new >= before + connections {
                Ok(())
            } else {
                Err(format!("{counts:?}"))
            }
        });
    }

    /// Ends it; not one connection may have failed or gone past a proxy.
    pub(crate) fn finish(self) -> Counts {
        // Of what has begun, most is over then.
        self.wait_for_more(u64::from(self.rate));
        let counts = self.counts();
        assert!(
            counts.failed == 0 && counts.around == 0,
            "{} connections have failed, {} have gone around the mesh: {:#?}",
            counts.failed,
            counts.around,
            counts.complaints
        );
        assert!(
            counts.new > 0 && counts.long > 0,
            "there was no load: {counts:?}"
        );
        // The next load has pods of the same names.
        Pod::delete_all([self.client, self.server]);
        counts
    }

    /// From outside of the pod to a port that is not redirected.
    fn try_counts(&self) -> Result<Counts, String> {
        let stream = TcpStream::connect(self.control).map_err(|error| error.to_string())?;
        (&stream)
            .write_all(b"?\n")
            .map_err(|error| error.to_string())?;
        let mut line = String::new();
        BufReader::new(&stream)
            .read_line(&mut line)
            .map_err(|error| error.to_string())?;
        serde_json::from_str(&line).map_err(|error| format!("{error}: {line}"))
    }
}
