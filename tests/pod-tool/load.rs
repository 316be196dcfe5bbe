//! New connections at a constant rate, and some that stay, each of which is looked at.

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::ExitCode,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{client::Connection, server};

/// How many threads make new connections.
const THREADS: u32 = 8;
/// Between two questions on a connection that stays.
const PAUSE: Duration = Duration::from_millis(50);
/// How many complaints are kept; all are counted.
const KEPT: usize = 20;

/// What has happened so far.
#[derive(Default)]
struct Counts {
    /// New connections that were answered.
    new: u64,
    /// Questions on connections that stay that were answered.
    long: u64,
    /// Connections that failed.
    failed: u64,
    /// Connections that did not come through the mesh at both ends.
    around: u64,
    complaints: Vec<String>,
}

static COUNTS: Mutex<Counts> = Mutex::new(Counts {
    new: 0,
    long: 0,
    failed: 0,
    around: 0,
    complaints: Vec::new(),
});

fn counts() -> MutexGuard<'static, Counts> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connects to `target` `rate` times a second, and has `long` connections that stay,
/// until the process ends. Whoever connects to the port `control` is told the counts
/// for each line that it sends.
pub(crate) fn run(control: u16, target: SocketAddr, rate: u32, long: u32) -> ExitCode {
    let listener = server::listen(control);
    for _ in 0..long {
        thread::spawn(move || stay(target));
    }
    let interval = Duration::from_secs(1) * THREADS / rate.max(1);
    for number in 0..THREADS.min(rate) {
        thread::spawn(move || arrive(target, interval, interval * number / THREADS));
    }
    println!("load to {target}");
    for stream in listener.incoming().flatten() {
        let mut replies = &stream;
        for _ in BufReader::new(&stream).lines().map_while(Result::ok) {
            let counts = counts();
            let reply = json!({
                "new": counts.new,
                "long": counts.long,
                "failed": counts.failed,
                "around": counts.around,
                "complaints": counts.complaints,
            });
            // Somebody who does not listen any more.
            if writeln!(replies, "{reply}").is_err() {
                break;
            }
        }
    }
    ExitCode::SUCCESS
}

/// A new connection in each interval, also when one took longer than that.
fn arrive(server: SocketAddr, interval: Duration, offset: Duration) {
    let mut next = Instant::now() + offset;
    loop {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next += interval;
        let said = Connection::open(server).and_then(|mut connection| connection.ask());
        if judge("new", server, said) {
            counts().new += 1;
        }
    }
}

/// A connection that stays; another when it has failed, which counts.
fn stay(server: SocketAddr) {
    loop {
        let mut connection = match Connection::open(server) {
            Ok(connection) => connection,
            Err(error) => {
                judge("long", server, Err(error));
                thread::sleep(PAUSE);
                continue;
            }
        };
        while judge("long", server, connection.ask()) {
            counts().long += 1;
            thread::sleep(PAUSE);
        }
    }
}

/// Whether it was as it is to be.
fn judge(kind: &str, server: SocketAddr, said: std::io::Result<Value>) -> bool {
    let complaint = match said {
        Ok(answer) if is_through_the_mesh(&answer, server) => return true,
        Ok(answer) => {
            counts().around += 1;
            answer.to_string()
        }
        Err(error) => {
            counts().failed += 1;
            error.to_string()
        }
    };
    let mut counts = counts();
    if counts.complaints.len() < KEPT {
        counts.complaints.push(format!("{kind}: {complaint}"));
    }
    false
}

/// Of both proxies, and the first of them knew where to.
fn is_through_the_mesh(answer: &Value, server: SocketAddr) -> bool {
    let text = |name: &str| answer[name].as_str().unwrap_or_default();
    let header: Vec<_> = text("header").split(' ').collect();
    let destination = (server.ip().to_string(), server.port().to_string());
    text("peer").starts_with("127.0.0.6:")
        && header.get(3) == Some(&destination.0.as_str())
        && header.get(5) == Some(&destination.1.as_str())
}
