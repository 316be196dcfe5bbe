//! Threads that sit in a system call.

use std::{
    fs,
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread::{self, JoinHandle},
};

use nix::{
    libc,
    sys::signal::Signal,
    unistd::{Pid, gettid},
};

use crate::deadline::{DEADLINE, wait_until};

/// Work on a thread of its own that is expected to wait in the kernel.
#[derive(Debug)]
pub struct Blocked<T> {
    id: Pid,
    answer: Receiver<T>,
    thread: JoinHandle<()>,
}

impl<T: Send + 'static> Blocked<T> {
    /// Starts `work`.
    ///
    /// # Panics
    ///
    /// When there is no thread to be had.
    pub fn start(work: impl FnOnce() -> T + Send + 'static) -> Self {
        let (report, reported) = mpsc::channel();
        let (done, answer) = mpsc::channel();
        let thread = thread::spawn(move || {
            report.send(gettid()).ok();
            done.send(work()).ok();
        });
        Self {
            id: reported.recv().expect("it reports first"),
            answer,
            thread,
        }
    }

    /// Starts `work`, and waits until it sleeps in the system call with this
    /// number. Where it does not, because it has ended before, this returns as
    /// well.
    ///
    /// # Panics
    ///
    /// When neither happens.
    pub fn in_call(call: libc::c_long, work: impl FnOnce() -> T + Send + 'static) -> Self {
        let blocked = Self::start(work);
        wait_until(&format!("a thread in system call {call}"), || {
            let seen = blocked.call();
            (blocked.thread.is_finished() || seen == Some(call))
                .then_some(())
                .ok_or_else(|| format!("{seen:?}"))
        });
        blocked
    }

    /// The number of the system call that it sleeps in.
    fn call(&self) -> Option<libc::c_long> {
        let text = fs::read_to_string(format!("/proc/self/task/{}/syscall", self.id)).ok()?;
        // `running` is none.
        text.split(' ').next()?.parse().ok()
    }

    /// Whether it has ended by now.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Sends the thread, and no other, a signal, and waits until it has taken it.
    ///
    /// # Panics
    ///
    /// When it has ended.
    pub fn signal(&self, signal: Signal) {
        // SAFETY: three numbers.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_tgkill,
                Pid::this().as_raw(),
                self.id.as_raw(),
                signal as i32,
            )
        };
        assert_eq!(sent, 0, "the thread has ended before it got a signal");
        wait_until("a thread to take a signal", || {
            if self.has_pending(signal) {
                Err("it is pending".to_owned())
            } else {
                Ok(())
            }
        });
    }

    fn has_pending(&self, signal: Signal) -> bool {
        let status = fs::read_to_string(format!("/proc/self/task/{}/status", self.id));
        // It has ended where there is none.
        let status = status.unwrap_or_default();
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
        let bits = pending.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
        bits.is_some_and(|bits| bits & (1 << (signal as i32 - 1)) != 0)
    }

    /// What its work gave.
    ///
    /// # Panics
    ///
    /// When it still waits after the deadline, or has panicked.
    pub fn answer(self) -> T {
        match self.answer.recv_timeout(DEADLINE) {
            Ok(answer) => {
                // What it had is dropped when this returns.
                self.thread.join().expect("it has answered");
                answer
            }
            Err(RecvTimeoutError::Timeout) => {
                panic!("a thread still waits in call {:?}", self.call())
            }
            Err(RecvTimeoutError::Disconnected) => match self.thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("it answers before it ends"),
            },
        }
    }
}
