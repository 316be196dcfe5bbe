//! Where programs are hung, and how those of the next agent take their places.
//!
//! An agent that is to leave everything in force pins its links in a directory,
//! `links`. The next one finds them there and gives each its own program. Where the
//! maps of connections cannot be taken over, it puts the directory aside first, as
//! `former_N`: what follows a connection then hangs there twice, each with its own
//! maps, until the connections that the former programs began have been accepted.
//! What begins connections is moved over, so that there is but one of it.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use shunt_abi::NetnsCookie;

use super::link::{Link, Target};
use crate::bpffs::{FORMER, LINKS, remove_dir, remove_file};

/// The links of this agent.
pub(super) struct Links {
    /// The pins; `None` for an agent that takes everything with it.
    pinned: Option<Pinned>,
}

struct Pinned {
    root: PathBuf,
    dir: PathBuf,
}

/// A program, and the hook that it is for.
pub(super) struct Place<'a> {
    /// The name of the pin.
    pub(super) name: String,
    /// What has the hook.
    pub(super) target: Target<'a>,
    /// The kernel's number of the hook.
    pub(super) attach_type: u32,
    /// Whether connections begin here.
    pub(super) is_entry: bool,
}

impl Links {
    /// Links that go with the agent.
    pub(super) const fn held() -> Self {
        Self { pinned: None }
    }

    /// Links that are pinned below `root`, which is on a bpffs.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made.
    pub(super) fn pinned(root: &Path) -> Result<Self> {
        let dir = root.join(LINKS);
        make_dir(&dir)?;
        Ok(Self {
            pinned: Some(Pinned {
                root: root.to_owned(),
                dir,
            }),
        })
    }

    /// Whether they stay when the agent ends.
    pub(super) const fn stay(&self) -> bool {
        self.pinned.is_some()
    }

    /// Hangs a program on its hook: in the place of that of a former agent, or as a
    /// new link.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; then what was there is there as before.
    pub(super) fn hang(&self, place: &Place<'_>, program: BorrowedFd<'_>) -> Result<Link> {
        let create = || Link::create(program, place.target, place.attach_type);
        let Some(pinned) = &self.pinned else {
            return create();
        };
        let pin = pinned.dir.join(&place.name);
        if let Some(link) = usable(&pin, place.target)? {
            link.update(program)?;
            return Ok(link);
        }
        if place.is_entry {
            for dir in former(&pinned.root)? {
                if let Some(mut link) = usable(&dir.join(&place.name), place.target)? {
                    link.update(program)?;
                    link.move_pin(&pin)?;
                    return Ok(link);
                }
            }
        }
        let mut link = create()?;
        link.pin(&pin)?;
        Ok(link)
    }

    /// Leaves the program of a namespace as it is, which cannot be reached. `false`
    /// when the namespace is gone, or there is none.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn keep(&self, cookie: NetnsCookie) -> Result<bool> {
        let Some(pinned) = &self.pinned else {
            return Ok(false);
        };
        let name = lookup_name(cookie);
        let pin = pinned.dir.join(&name);
        let mut places = vec![pin.clone()];
        places.extend(former(&pinned.root)?.iter().map(|dir| dir.join(&name)));
        for place in places {
            let Some(mut link) = Link::open(&place)? else {
                continue;
            };
            if link.place()?.is_some() {
                link.move_pin(&pin)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The number of the file of the namespace whose program is pinned; `None` when
    /// it is gone, or none is.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn netns_inode(&self, cookie: NetnsCookie) -> Result<Option<u32>> {
        let Some(pinned) = &self.pinned else {
            return Ok(None);
        };
        let mut dirs = vec![pinned.dir.clone()];
        dirs.extend(former(&pinned.root)?);
        for dir in dirs {
            if let Some(link) = Link::open(&dir.join(lookup_name(cookie)))?
                && let Some(inode) = link.place()?
            {
                return Ok(Some(inode));
            }
        }
        Ok(None)
    }

    /// Removes the pins that belong to none of these namespaces, nor to the node,
    /// and those whose namespace or interface is gone.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read, or a pin not removed.
    pub(super) fn sweep(
        &self,
        of_node: &BTreeSet<&str>,
        namespaces: &BTreeSet<NetnsCookie>,
    ) -> Result<()> {
        let Some(pinned) = &self.pinned else {
            return Ok(());
        };
        for name in names(&pinned.dir)? {
            let is_wanted = of_node.contains(name.as_str())
                || cookie_in(&name).is_some_and(|cookie| namespaces.contains(&cookie));
            let pin = pinned.dir.join(&name);
            let hangs = Link::open(&pin)?.is_some_and(|link| matches!(link.place(), Ok(Some(_))));
            if !is_wanted || !hangs {
                remove_file(&pin)?;
            }
        }
        Ok(())
    }

    /// Whether programs of a former agent hang beside those of this one.
    pub(super) fn has_former(&self) -> bool {
        let former = self.pinned.as_ref().map(|pinned| former(&pinned.root));
        matches!(former, Some(Ok(dirs)) if !dirs.is_empty())
    }

    /// Takes the programs of former agents away that hang beside those of this one.
    ///
    /// # Errors
    ///
    /// When a pin cannot be removed.
    pub(super) fn retire(&self) -> Result<()> {
        match &self.pinned {
            Some(pinned) => former(&pinned.root)?
                .iter()
                .try_for_each(|dir| remove_dir(dir)),
            None => Ok(()),
        }
    }
}

/// The pins of a namespace's inbound program.
pub(super) fn lookup_name(cookie: NetnsCookie) -> String {
    format!("lookup_{cookie}")
}

/// The pin of a program on an interface of a namespace.
pub(super) fn interface_name(program: &str, cookie: NetnsCookie, index: u32) -> String {
    format!("{program}_{cookie}_{index}")
}

/// The namespace that a pin is of: `lookup_COOKIE`, or `PROGRAM_COOKIE_INDEX`.
fn cookie_in(name: &str) -> Option<NetnsCookie> {
    if let Some(cookie) = name.strip_prefix("lookup_") {
        return cookie.parse().ok();
    }
    name.rsplit('_').nth(1)?.parse().ok()
}

/// A pinned link that hangs where it is wanted.
fn usable(pin: &Path, target: Target<'_>) -> Result<Option<Link>> {
    match Link::open(pin)? {
        Some(link) if link.hangs_on(target)? => Ok(Some(link)),
        Some(_) | None => Ok(None),
    }
}

/// Puts the links below `root` aside, if there are any.
///
/// # Errors
///
/// When the directory cannot be moved.
pub(super) fn put_aside(root: &Path) -> Result<()> {
    let dir = root.join(LINKS);
    if names(&dir)?.is_empty() {
        return Ok(());
    }
    let aside = (0..u32::MAX)
        .map(|number| root.join(format!("{FORMER}{number}")))
        .find(|aside| !aside.exists())
        .context("there is no name left for a directory")?;
    fs::rename(&dir, &aside).with_context(|| format!("cannot put {} aside", dir.display()))
}

/// The ids of the programs of the node that are pinned below `root`.
///
/// # Errors
///
/// When one cannot be looked at.
pub(super) fn programs(root: &Path) -> Result<Vec<u32>> {
    let dir = root.join(LINKS);
    let mut programs = Vec::new();
    for hook in &super::hooks::HOOKS {
        if let Some(link) = Link::open(&dir.join(hook.program))? {
            programs.push(link.program()?);
        }
    }
    Ok(programs)
}

/// Takes everything away that hangs by a pin below `root`: first what others go on with,
/// the last of it first, so that nothing is begun that nobody follows.
///
/// # Errors
///
/// When a pin cannot be removed.
pub(super) fn detach_all(root: &Path) -> Result<()> {
    let mut dirs = vec![root.join(LINKS)];
    dirs.extend(former(root)?);
    for dir in &dirs {
        for hook in super::hooks::HOOKS
            .iter()
            .rev()
            .filter(|hook| hook.is_entry)
        {
            remove_file(&dir.join(hook.program))?;
        }
    }
    dirs.iter().try_for_each(|dir| remove_dir(dir))
}

/// The directories of former agents, the latest first.
fn former(root: &Path) -> Result<Vec<PathBuf>> {
    let mut numbers: Vec<u32> = names(root)?
        .iter()
        .filter_map(|name| name.strip_prefix(FORMER)?.parse().ok())
        .collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let dirs = numbers
        .iter()
        .map(|number| root.join(format!("{FORMER}{number}")));
    Ok(dirs.collect())
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.with_context(|| format!("cannot list {}", dir.display()))?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names
        .collect::<io::Result<_>>()
        .with_context(|| format!("cannot list {}", dir.display()))
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make the directory {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_says_whose_it_is() {
        assert_eq!(cookie_in(&lookup_name(4526)), Some(4526));
        let name = interface_name("shunt_arrives", 4526, 12);
        assert_eq!(cookie_in(&name), Some(4526));
        assert_eq!(cookie_in("shunt_sock_ops"), None);
        assert_eq!(cookie_in("pinning"), None);
    }

    #[test]
    fn former_directories_are_listed_from_the_latest() {
        let root = tempfile::tempdir().expect("a directory");
        for name in ["former_0", "former_2", "former_10", "links", "PODS"] {
            fs::create_dir(root.path().join(name)).expect("a new directory");
        }
        let found = former(root.path()).expect("it can be listed");
        let names: Vec<_> = found.iter().filter_map(|dir| dir.file_name()).collect();
        assert_eq!(names, ["former_10", "former_2", "former_0"]);
    }
}
