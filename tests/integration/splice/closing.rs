//! An end goes away while bytes that were spliced into it are unread.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    time::Duration,
};

use shunt_tests::deadline::wait_until;
use socket2::SockRef;

use super::pair::{Hop, Lab};

/// How an end goes away: as that of a process that dies does, or with a reset.
const WAYS: [Option<Duration>; 2] = [None, Some(Duration::ZERO)];

/// The other end learns of it, by an end or by a reset, and nothing that it sends later is
/// taken for good. (By TCP it is always a reset: what is said of a close with unread bytes in
/// docs/splicing.md.)
#[test]
fn who_sent_what_was_not_read_learns_of_the_end() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        for linger in WAYS {
            let pair = lab.spliced();
            lab.send_spliced(&pair, b"nobody reads this");
            SockRef::from(&pair.server)
                .set_linger(linger)
                .expect("it is open");
            drop(pair.server);
            let seen = wait_until("the end to be seen", || match read(&pair.client) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => Err(error.to_string()),
                seen => Ok(seen.map_err(|error| error.kind())),
            });
            let expected: &[_] = match linger {
                None => &[Ok(0), Err(ErrorKind::ConnectionReset)],
                Some(_) => &[Err(ErrorKind::ConnectionReset)],
            };
            assert!(expected.contains(&seen), "{linger:?}: {seen:?}");
            wait_until("a send to fail", || {
                let failed = (&pair.client).write(b"more").err();
                let failed = failed.ok_or("it is taken")?.kind();
                let is_told = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&failed);
                is_told.then_some(()).ok_or(failed.to_string())
            });
        }
    }
}

fn read(mut end: &TcpStream) -> io::Result<usize> {
    end.read(&mut [0; 8])
}
