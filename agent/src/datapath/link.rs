//! Links, which hang a program on a hook: made, pinned, and given another program in
//! one step. aya does the last for one of the types that are needed here.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::libc;

/// `BPF_OBJ_PIN`
const OBJ_PIN: libc::c_long = 6;
/// `BPF_OBJ_GET`
const OBJ_GET: libc::c_long = 7;
/// `BPF_OBJ_GET_INFO_BY_FD`
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
/// `BPF_LINK_CREATE`
const LINK_CREATE: libc::c_long = 28;
/// `BPF_LINK_UPDATE`
const LINK_UPDATE: libc::c_long = 29;

/// `union bpf_attr` for [`LINK_CREATE`], as far as it goes here.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    rest: [u64; 4],
}

/// `union bpf_attr` for [`LINK_UPDATE`].
#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// `union bpf_attr` for [`OBJ_PIN`] and [`OBJ_GET`].
#[repr(C)]
struct Object {
    /// The address of a string that ends with a zero.
    path: u64,
    descriptor: u32,
    flags: u32,
}

/// `union bpf_attr` for [`OBJ_GET_INFO_BY_FD`].
#[repr(C)]
struct GetInfo {
    descriptor: u32,
    length: u32,
    /// The address of an [`Info`].
    info: u64,
}

/// The start of `struct bpf_link_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    /// What it hangs on begins here: a 64-bit number for a cgroup, one of 32 bits
    /// for a namespace and an interface.
    target: [u32; 2],
    rest: [u64; 8],
}

/// What a program can be hung on.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    /// An open directory of cgroup v2.
    Cgroup(&'a File),
    /// An open network namespace.
    Netns(BorrowedFd<'a>),
    /// The index of an interface of the calling thread's namespace.
    Interface(u32),
}

impl Target<'_> {
    fn number(self) -> u32 {
        match self {
            Self::Cgroup(directory) => raw(directory.as_fd()),
            Self::Netns(netns) => raw(netns),
            Self::Interface(index) => index,
        }
    }

    /// What the kernel tells of a link that hangs on it.
    fn identity(self) -> Result<u64> {
        match self {
            Self::Cgroup(directory) => Ok(directory.metadata()?.ino()),
            Self::Netns(netns) => inode(netns),
            Self::Interface(index) => Ok(index.into()),
        }
    }
}

/// The number of a namespace's file.
pub(super) fn inode(netns: BorrowedFd<'_>) -> Result<u64> {
    let file = File::from(netns.try_clone_to_owned()?);
    Ok(file.metadata()?.ino())
}

/// A program on a hook. Dropping one that is not pinned takes it away; one that is
/// pinned stays until it is [detached](Self::detach).
#[derive(Debug)]
pub(super) struct Link {
    descriptor: OwnedFd,
    pin: Option<PathBuf>,
}

impl Link {
    /// Hangs a program on a hook; `attach_type` is the kernel's number of it. Others
    /// may hang there, too: it comes after them.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn create(
        program: BorrowedFd<'_>,
        target: Target<'_>,
        attach_type: u32,
    ) -> Result<Self> {
        let create = LinkCreate {
            program: raw(program),
            target: target.number(),
            attach_type,
            ..LinkCreate::default()
        };
        let done = bpf(LINK_CREATE, &create).context("the kernel does not take the link")?;
        Ok(Self {
            descriptor: descriptor(done),
            pin: None,
        })
    }

    /// Opens a pinned link; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub(super) fn open(pin: &Path) -> Result<Option<Self>> {
        let path = c_string(pin)?;
        let get = Object {
            path: path.as_ptr().addr() as u64,
            descriptor: 0,
            flags: 0,
        };
        match bpf(OBJ_GET, &get) {
            Ok(done) => Ok(Some(Self {
                descriptor: descriptor(done),
                pin: Some(pin.to_owned()),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot open the pinned link {}", pin.display()))
            }
        }
    }

    /// Pins it, in place of what is there.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn pin(&mut self, pin: &Path) -> Result<()> {
        // Aside first: a rename replaces a pin in one step.
        let aside = pin.with_file_name("pinning");
        let _ = fs::remove_file(&aside);
        let path = c_string(&aside)?;
        let attributes = Object {
            path: path.as_ptr().addr() as u64,
            descriptor: raw(self.descriptor.as_fd()),
            flags: 0,
        };
        bpf(OBJ_PIN, &attributes)
            .and_then(|_| fs::rename(&aside, pin))
            .with_context(|| format!("cannot pin a link at {}", pin.display()))?;
        self.pin = Some(pin.to_owned());
        Ok(())
    }

    /// Moves its pin.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn move_pin(&mut self, to: &Path) -> Result<()> {
        if let Some(from) = &self.pin {
            fs::rename(from, to)
                .with_context(|| format!("cannot move the pin {}", from.display()))?;
        }
        self.pin = Some(to.to_owned());
        Ok(())
    }

    /// Replaces its program: each event meets the old one or the new.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn update(&self, program: BorrowedFd<'_>) -> Result<()> {
        let update = LinkUpdate {
            link: raw(self.descriptor.as_fd()),
            program: raw(program),
            flags: 0,
            old_program: 0,
        };
        bpf(LINK_UPDATE, &update)
            .map(drop)
            .context("the kernel does not replace the program of a link")
    }

    /// Whether it hangs there.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub(super) fn hangs_on(&self, target: Target<'_>) -> Result<bool> {
        let info = self.info()?;
        let [low, high] = info.target;
        let found = match target {
            // The number as the kernel keeps it in memory.
            Target::Cgroup(_) => {
                let mut bytes = [0; 8];
                bytes[..4].copy_from_slice(&low.to_ne_bytes());
                bytes[4..].copy_from_slice(&high.to_ne_bytes());
                u64::from_ne_bytes(bytes)
            }
            Target::Netns(_) | Target::Interface(_) => low.into(),
        };
        Ok(found == target.identity()?)
    }

    /// The number of the namespace's file, or the index of the interface, that it
    /// hangs on; `None` when that is gone.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub(super) fn place(&self) -> Result<Option<u32>> {
        let [place, _] = self.info()?.target;
        Ok((place != 0).then_some(place))
    }

    /// The kernel's id of its program.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub(super) fn program(&self) -> Result<u32> {
        Ok(self.info()?.program)
    }

    fn info(&self) -> Result<Info> {
        let mut info = Info::default();
        let get = GetInfo {
            descriptor: raw(self.descriptor.as_fd()),
            length: size_of::<Info>() as u32,
            // Exposed, because the kernel writes there.
            info: (&raw mut info).expose_provenance() as u64,
        };
        bpf(OBJ_GET_INFO_BY_FD, &get).context("the kernel does not tell of a link")?;
        Ok(info)
    }

    /// Takes the program away, pinned or not.
    ///
    /// # Errors
    ///
    /// When the pin cannot be removed.
    pub(super) fn detach(self) -> Result<()> {
        let Some(pin) = &self.pin else {
            return Ok(());
        };
        fs::remove_file(pin).with_context(|| format!("cannot remove the pin {}", pin.display()))
    }
}

fn c_string(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .with_context(|| format!("{} is no path", path.display()))
}

/// A descriptor as the kernel wants it in attributes.
pub(super) fn raw(descriptor: BorrowedFd<'_>) -> u32 {
    descriptor.as_raw_fd().unsigned_abs()
}

/// A descriptor that [`bpf`] has just given.
pub(super) fn descriptor(number: i32) -> OwnedFd {
    // SAFETY: only called with the answer to a command that makes a descriptor for
    // this process, which nobody else knows.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// bpf(2). What the attributes point to has to outlive the call.
pub(super) fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes are those of the command, of that length; what they
    // point to is a string, or memory of the size that they name.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match i32::try_from(done) {
        Ok(done) if done >= 0 => Ok(done),
        _ => Err(io::Error::last_os_error()),
    }
}
