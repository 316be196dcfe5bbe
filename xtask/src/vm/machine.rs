//! A virtual machine: QEMU, with a kernel and a file system in memory.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{emulator, kernel::Kernel};
use crate::arch::Arch;

/// What differs between kinds of machines.
struct Board {
    /// What QEMU emulates.
    machine: &'static [&'static str],
    /// What the kernel is told: where its console is, which is the first serial line, to end
    /// when it panics, and what else it needs.
    parameters: &'static str,
    /// The emulated processor.
    processor: &'static str,
    /// The second serial line, on QEMU's own input and output.
    second_line: &'static [&'static str],
    /// What the kernel calls that.
    second_line_name: &'static str,
}

/// A PC. An emulated timer, which the kernel is not to check, is too late on a busy machine.
const PC: Board = Board {
    machine: &[],
    parameters: "console=ttyS0 panic=-1 no_timer_check",
    processor: "max",
    second_line: &["-serial", "stdio"],
    second_line_name: "ttyS1",
};

/// QEMU's own arm64 machine. It has one serial line, the second is a card. The processor is
/// one of servers: `max` would sign and check pointers, which takes its time.
const VIRT: Board = Board {
    machine: &["-machine", "virt"],
    parameters: "console=ttyAMA0 panic=-1",
    processor: "neoverse-n1",
    second_line: &[
        "-chardev",
        "stdio,id=second",
        "-device",
        "pci-serial,chardev=second",
    ],
    second_line_name: "ttyS0",
};

impl Board {
    const fn of(arch: Arch) -> &'static Self {
        match arch {
            Arch::X86_64 => &PC,
            Arch::Aarch64 => &VIRT,
        }
    }
}

/// What the kernel of such a machine calls the line that [`Machine::run`] reads.
pub(super) const fn second_line(arch: Arch) -> &'static str {
    Board::of(arch).second_line_name
}

/// What it says of itself: to a file more than to somebody at a terminal.
const LOUD: &str = "loglevel=6";
const QUIET: &str = "quiet";

/// Between two looks at whether a machine has ended that has the terminal.
const PAUSE: Duration = Duration::from_millis(100);

/// Memory, in MiB: the file system is in it twice while it is unpacked.
const MEMORY: &str = "3072";

/// A machine that was not started yet.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Kernel,
    /// The file system.
    pub(super) image: &'a Path,
}

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// By itself.
    Itself,
    /// It was ended, because its time was over.
    TimeLimit,
}

impl Machine<'_> {
    /// Runs it to its end, at most for `limit`. Its console goes to the file
    /// `console`; each line that it writes to its second serial line is handed to
    /// `see`.
    pub(super) fn run(
        &self,
        console: &Path,
        limit: Duration,
        mut see: impl FnMut(&str),
    ) -> Result<End> {
        let mut child = self
            .command(LOUD, &format!("file:{}", console.display()))?
            .args(self.board().second_line)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start QEMU")?;
        let stdout = child.stdout.take().context("the pipe was just asked for")?;
        let guard = Guard(Arc::new(Mutex::new(child)));
        let timer = guard.end_after(limit);
        for line in BufReader::new(stdout).split(b'\n') {
            see(String::from_utf8_lossy(&line?).trim_end_matches('\r'));
        }
        let over = timer.is_over();
        drop(guard);
        Ok(if over { End::TimeLimit } else { End::Itself })
    }

    /// Runs it to its end, at most for `limit`, with this terminal as its console, of which the
    /// file `console` keeps a copy. Ctrl-C is for who is in there; Ctrl-A X ends it.
    pub(super) fn attached(&self, console: &Path, limit: Duration) -> Result<End> {
        let terminal = format!(
            "stdio,id=console,mux=on,signal=off,logfile={}",
            console.display()
        );
        let child = self
            .command(QUIET, "chardev:console")?
            .args(["-chardev", &terminal, "-mon", "chardev=console"])
            .spawn()
            .context("cannot start QEMU")?;
        let guard = Guard(Arc::new(Mutex::new(child)));
        let timer = guard.end_after(limit);
        while !guard.has_ended()? {
            thread::sleep(PAUSE);
        }
        if !timer.is_over() {
            return Ok(End::Itself);
        }
        // QEMU had no time to give the terminal back as it was.
        let _ = Command::new("stty").arg("sane").status();
        Ok(End::TimeLimit)
    }

    /// The command that starts it; its first serial line, which is its console, goes to
    /// `console`.
    fn command(&self, loudness: &str, console: &str) -> Result<Command> {
        let board = self.board();
        let mut command = emulator::command(self.kernel.arch)?;
        command
            .args(board.machine)
            .args(["-nodefaults", "-no-reboot", "-display", "none"])
            .args(["-smp", "2", "-m", MEMORY])
            .args(self.acceleration())
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(self.image)
            .args(["-append", &format!("{} {loudness}", board.parameters)])
            .args(["-serial", console]);
        Ok(command)
    }

    fn board(&self) -> &'static Board {
        Board::of(self.kernel.arch)
    }

    fn acceleration(&self) -> [&'static str; 4] {
        if self.kernel.arch == Arch::X86_64 && has_kvm() {
            ["-accel", "kvm", "-cpu", "host"]
        } else {
            ["-accel", "tcg,thread=multi", "-cpu", self.board().processor]
        }
    }
}

/// Whether KVM can be used: the processor has what it takes, which the device alone does not
/// tell, and the device is there, which it is not in most containers.
fn has_kvm() -> bool {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag| processor.split_whitespace().any(|word| word == flag);
    let device = || File::options().read(true).write(true).open("/dev/kvm");
    (has("vmx") || has("svm")) && device().is_ok()
}

/// A running QEMU, which is ended on drop.
struct Guard(Arc<Mutex<Child>>);

impl Guard {
    fn end_after(&self, limit: Duration) -> Timer {
        let child = Arc::clone(&self.0);
        let (stop, stopped) = mpsc::channel();
        let end = Instant::now() + limit;
        thread::spawn(move || {
            if stopped.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                kill(&child);
            }
        });
        Timer { end, _stop: stop }
    }

    fn has_ended(&self) -> Result<bool> {
        let mut child = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = child.try_wait().context("cannot wait for QEMU")?;
        Ok(ended.is_some())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        kill(&self.0);
    }
}

/// The wait for a time limit; it ends on drop.
struct Timer {
    end: Instant,
    _stop: mpsc::Sender<()>,
}

impl Timer {
    fn is_over(&self) -> bool {
        Instant::now() >= self.end
    }
}

/// Ends and reaps it; one that has ended stays as it is.
fn kill(child: &Mutex<Child>) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = child.kill();
    let _ = child.wait();
}
