//! Bytes that the kernel moves between files.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::fd::OwnedFd,
};

use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    poll::PollFlags,
    sys::sendfile::sendfile,
    unistd::pipe,
};
use shunt_tests::{Blocked, End, Pattern, end::ENDED};

use super::{Ends, Manner, PLENTY, compare};

const PATTERN: Pattern = Pattern::new(5);

/// splice(2) from the socket into a pipe.
fn into_pipe(end: &End, pipe: &OwnedFd, length: usize) -> Result<usize, Errno> {
    splice(end, None, pipe, None, length, SpliceFFlags::empty())
}

/// splice(2) from a pipe into the socket.
fn from_pipe(end: &End, pipe: &OwnedFd, length: usize) -> Result<usize, Errno> {
    splice(pipe, None, end, None, length, SpliceFFlags::empty())
}

fn read(pipe: &OwnedFd, length: usize) -> String {
    let mut bytes = vec![0; length];
    let read = nix::unistd::read(pipe, &mut bytes).expect("a pipe with bytes in it");
    String::from_utf8_lossy(&bytes[..read]).into_owned()
}

#[test]
fn splice_takes_bytes_from_a_socket() {
    compare(&Manner::ALL, |Ends { app, peer, manner }| {
        let (out, into) = pipe().expect("a pipe");
        if manner == Manner::NonBlocking {
            let moved = app.note("moves", into_pipe(&app, &into, 100));
            assert_eq!(moved, Err(Errno::EAGAIN));
        }
        for words in ["abc", "defgh"] {
            assert_eq!(peer.send(words), Ok(words.len()));
            app.has_queued(words.len());
            let moved = app.note("moves", into_pipe(&app, &into, 100));
            assert_eq!(moved, Ok(words.len()));
            assert_eq!(app.note("has moved", read(&out, 100)), words);
            assert_eq!(app.send("answer"), Ok(6));
            peer.gets("answer");
        }
        peer.close();
        app.has(ENDED);
        let moved = app.note("moves", into_pipe(&app, &into, 100));
        assert_eq!(moved, Ok(0));
    });
}

#[test]
fn splice_waits_for_bytes_from_a_socket() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let (out, into) = pipe().expect("a pipe");
        let mover = app.unnoticed();
        let waiting =
            Blocked::in_call(nix::libc::SYS_splice, move || into_pipe(&mover, &into, 100));
        assert_eq!(peer.send("abc"), Ok(3));
        assert_eq!(app.note("moves", waiting.answer()), Ok(3));
        assert_eq!(app.note("has moved", read(&out, 100)), "abc");
    });
}

#[test]
fn splice_gives_bytes_to_a_socket() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let (out, into) = pipe().expect("a pipe");
        for words in ["abc", "defgh"] {
            nix::unistd::write(&into, words.as_bytes()).expect("room in the pipe");
            let moved = app.note("moves", from_pipe(&app, &out, 100));
            assert_eq!(moved, Ok(words.len()));
            peer.gets(words);
            assert_eq!(app.send("by send"), Ok(7));
            peer.gets("by send");
        }
    });
}

/// As much as does not fit, from the socket and back into it: what a proxy of
/// the application's own may do.
#[test]
fn splice_moves_plenty_both_ways() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let echo = {
            let app = app.unnoticed();
            Blocked::start(move || echo(&app, PLENTY))
        };
        let sending = {
            let peer = peer.unnoticed();
            Blocked::start(move || sends_polling(&peer, PLENTY))
        };
        peer.gets_pattern(PATTERN, PLENTY);
        sending.answer();
        assert_eq!(app.note("has echoed", echo.answer()), Ok(()));
    });
}

fn echo(end: &End, length: usize) -> Result<(), Errno> {
    let (out, into) = pipe()?;
    let mut done = 0;
    while done < length {
        let mut moved = into_pipe(end, &into, 64 * 1024)?;
        assert_ne!(moved, 0, "this is no end of a stream, after {done} bytes");
        done += moved;
        while moved > 0 {
            moved -= from_pipe(end, &out, moved)?;
        }
    }
    Ok(())
}

/// Sends a pattern through a socket that does not wait.
fn sends_polling(end: &End, length: usize) {
    let bytes = PATTERN.bytes(0, length);
    let mut sent = 0;
    while sent < length {
        end.poll(PollFlags::POLLOUT);
        match nix::unistd::write(end, &bytes[sent..]) {
            Ok(more) => sent += more,
            Err(Errno::EAGAIN) => {}
            Err(error) => panic!("cannot send: {error}"),
        }
    }
}

fn file(length: usize) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(&PATTERN.bytes(0, length)).expect("room");
    file.rewind().expect("a file");
    file
}

#[test]
fn sendfile_gives_a_file_to_a_socket() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        const LENGTH: usize = 10_000;
        let mut file = file(LENGTH);
        let sent = sendfile(&app, &file, None, LENGTH);
        assert_eq!(app.note("sends of a file", sent), Ok(LENGTH));
        peer.gets_pattern(PATTERN, LENGTH);
        let sent = sendfile(&app, &file, None, LENGTH);
        assert_eq!(app.note("sends of a file", sent), Ok(0));
        assert_eq!(app.send("by send"), Ok(7));
        peer.gets("by send");
        // The file is what it was.
        let mut bytes = Vec::new();
        file.rewind().expect("a file");
        file.read_to_end(&mut bytes).expect("a file");
        assert_eq!(PATTERN.check(0, &bytes), Ok(()));
    });
}

/// More than there is room for; the kernel gives the pages of the file away, and
/// nobody may see them changed.
#[test]
fn sendfile_gives_plenty_to_a_socket() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let sending = {
            let app = app.unnoticed();
            let file = file(PLENTY);
            Blocked::start(move || {
                let mut left = PLENTY;
                while left > 0 {
                    app.poll(PollFlags::POLLOUT);
                    match sendfile(&app, &file, None, left) {
                        Ok(sent) => left -= sent,
                        Err(Errno::EAGAIN) => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            })
        };
        peer.gets_pattern(PATTERN, PLENTY);
        assert_eq!(app.note("has sent it", sending.answer()), Ok(()));
    });
}
