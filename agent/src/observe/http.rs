//! HTTP for whoever reaches the port: how many connections there are, and for how long
//! one may be silent, is bounded, so that nobody can fill the agent's memory.

use std::{convert::Infallible, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// How many connections are answered at once; more of them wait to be accepted.
/// kubelet and Prometheus need one each.
const CONNECTIONS: usize = 64;

/// How long a connection may be silent before a request, and how long a request's head
/// may take. Longer than the usual time between two scrapes, which share a connection.
const SILENCE: Duration = Duration::from_secs(75);

/// How long a peer may leave what is sent to it unacknowledged, or its window shut, in
/// milliseconds.
const UNREAD_MS: u32 = 30_000;

/// What is waited after an error of accept(): most often there is no descriptor left.
const PAUSE: Duration = Duration::from_secs(1);

/// Answers for ever. When this future is dropped, so are its connections.
pub(super) async fn serve(listener: TcpListener, router: Router) -> Infallible {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, _)) => {
                connections.spawn(answer(stream, router.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for health and metrics");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Answers what one connection asks until it ends, or is silent for too long.
async fn answer(stream: TcpStream, router: Router) {
    // Where it is refused, the connection is bounded by what the kernel does by itself.
    let _ = setsockopt(&stream, TcpUserTimeout, &UNREAD_MS);
    let ended = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SILENCE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection for health and metrics");
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn start() -> (SocketAddr, JoinSet<Infallible>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("some port is free");
        let address = listener.local_addr().expect("it listens");
        let router = Router::new().route("/", axum::routing::get(|| async { "here" }));
        let mut server = JoinSet::new();
        server.spawn(serve(listener, router));
        (address, server)
    }

    async fn connect(address: SocketAddr) -> TcpStream {
        TcpStream::connect(address).await.expect("it listens")
    }

    async fn ask(stream: &mut TcpStream) {
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n")
            .await
            .expect("it reads");
        let mut answer = Vec::new();
        while !answer.ends_with(b"here") {
            let read = stream.read_buf(&mut answer).await.expect("it answers");
            assert_ne!(read, 0, "{}", String::from_utf8_lossy(&answer));
        }
    }

    /// The clock jumps whenever everybody waits.
    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_is_closed() {
        let (address, _server) = start().await;
        let mut silent = connect(address).await;
        assert_eq!(silent.read(&mut [0; 1]).await.expect("it is closed"), 0);

        let mut half = connect(address).await;
        half.write_all(b"GET / HT").await.expect("it reads");
        // hyper says why, or not.
        half.read_to_end(&mut Vec::new())
            .await
            .expect("it is closed");
    }

    #[tokio::test]
    async fn a_connection_that_is_one_too_many_waits_for_its_turn() {
        let (address, _server) = start().await;
        let mut all = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut stream = connect(address).await;
            ask(&mut stream).await;
            all.push(stream);
        }
        let mut late = connect(address).await;
        let waiting = tokio::spawn(async move { ask(&mut late).await });
        // The others are answered as ever, and it is not.
        ask(&mut all[0]).await;
        assert!(!waiting.is_finished());
        drop(all.pop());
        waiting.await.expect("it is answered");
    }
}
