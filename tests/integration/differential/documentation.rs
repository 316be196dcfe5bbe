//! `docs/verified.md`, which says what has been compared, and on which kernels.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    path::{Path, PathBuf},
};

use super::{
    probes::{Class, Version},
    setting::{Deviation, Setting},
};
use shunt_tests::Stack;

/// Set to anything, it has the file written instead of compared.
const UPDATE: &str = "SHUNT_UPDATE_DOCS";

/// What was found about a class of connections under a setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// The forms of addresses in which both sides were equal.
    pub(crate) equal: BTreeSet<Version>,
    /// Why some of them are not compared with the rules.
    pub(crate) deviation: Option<Deviation>,
}

/// One line of the table.
pub(crate) struct Line {
    pub(crate) setting: Setting,
    pub(crate) cells: BTreeMap<Class, Cell>,
}

/// Compares the committed file with what was found, or writes it.
pub(crate) fn check(lines: &[Line]) {
    let committed = std::fs::read_to_string(path()).unwrap_or_default();
    let known = kernels_of(&committed);
    let known_of = |row: &str| known.get(row).cloned().unwrap_or_default();
    if std::env::var_os(UPDATE).is_some() {
        let this = this_kernel();
        let text = render(lines, |row| {
            let mut kernels = known_of(row);
            kernels.insert(this);
            kernels
        });
        std::fs::write(path(), text).expect("the repository is ours");
        return;
    }
    // This kernel is not one of them before somebody says so: nothing else in the
    // file depends on it.
    let found = render(lines, known_of);
    let lines_of = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (old, new) = (lines_of(&committed), lines_of(&found));
    assert!(
        committed == found,
        "docs/verified.md is not what the tests have found; `{UPDATE}=1 cargo xtask test \
         every_setting` writes it anew\n- {}\n+ {}",
        old.difference(&new)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n- "),
        new.difference(&old)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n+ "),
    );
}

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/verified.md")
}

/// A kernel, as (major, minor): patch levels come and go.
type Kernel = (u32, u32);

/// The rows of a file's table without their last column, and the kernels which
/// that names.
fn kernels_of(text: &str) -> BTreeMap<String, BTreeSet<Kernel>> {
    let rows = text.lines().filter_map(|line| {
        let (row, kernels) = line.strip_suffix(" |")?.rsplit_once("| ")?;
        let kernels = kernels.split(", ").filter_map(version).collect();
        Some((format!("{row}|"), kernels))
    });
    rows.collect()
}

/// The kernel that runs.
fn this_kernel() -> Kernel {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    version(&release).unwrap_or_else(|| panic!("no version: {release}"))
}

/// `6.18.44-anything` is 6.18.
fn version(text: &str) -> Option<Kernel> {
    let mut numbers = text.trim().split(['.', '-', '+']);
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?))
}

/// The file; `kernels` tells those on which a row was found so.
fn render(lines: &[Line], kernels: impl Fn(&str) -> BTreeSet<Kernel>) -> String {
    let mut text = format!(
        "# What is verified\n\
         \n\
         <!-- Written by the tests: {UPDATE}=1 cargo xtask test every_setting -->\n\
         \n\
         A pod with the real rules of Istio and an enrolled one are asked the same; who\n\
         answers, the original destination, the peer that each side sees, `getpeername()` and\n\
         `getsockname()` are equal, and `shunt explain` says the same as the kernel did. Each\n\
         line of the table is a setting, each column a class of connections, and the cell says\n\
         in which form of addresses they were compared: `4` IPv4, `6` IPv6, `m` IPv4-mapped\n\
         addresses on an IPv6 socket. The last column has the kernels on which that was found.\n\
         A test fails when it finds something else than what stands here.\n\
         \n\
         ## Classes of connections\n\
         \n",
    );
    let mut put = |line: std::fmt::Arguments<'_>| {
        writeln!(text, "{line}").expect("a String takes everything");
    };
    for (number, class) in Class::ALL.iter().enumerate() {
        put(format_args!("{}. {}", number + 1, class.describe()));
    }
    put(format_args!("\n## Deviations\n"));
    put(format_args!(
        "Marked in the table; there `explain` is compared with the kernel, the rules are not.\n"
    ));
    for deviation in Deviation::ALL {
        put(format_args!("- `{}` {}", mark(deviation), deviation.why()));
    }
    put(format_args!("\n## Settings\n"));
    put(format_args!(
        "Pods have addresses of IPv4 (`4`), IPv6 (`6`), or both, IPv4 first (`46`). A cell with \
         `–` has\nno such connection: the pod has no such address, or no machine behind it.\n"
    ));
    let numbers: Vec<_> = (1..=Class::ALL.len()).map(|n| n.to_string()).collect();
    put(format_args!(
        "| settings | pod | {} | Linux |",
        numbers.join(" | ")
    ));
    put(format_args!(
        "|---|---|{}---|",
        "---|".repeat(Class::ALL.len())
    ));
    for line in lines {
        let cells = Class::ALL.map(|class| cell(line.cells.get(&class)));
        let stack = match line.setting.stack {
            Stack::V4 => "4",
            Stack::V6 => "6",
            Stack::Dual => "46",
        };
        let flags = match line.setting.to_string() {
            none if none.is_empty() => "none".to_owned(),
            flags => format!("`{flags}`"),
        };
        let row = format!("| {flags} | {stack} | {} |", cells.join(" | "));
        let kernels = kernels(&row).into_iter();
        let kernels: Vec<_> = kernels
            .map(|(major, minor)| format!("{major}.{minor}"))
            .collect();
        put(format_args!("{row} {} |", kernels.join(", ")));
    }
    text
}

fn cell(cell: Option<&Cell>) -> String {
    let Some(cell) = cell else {
        return "–".to_owned();
    };
    let equal = cell.equal.iter().map(|version| match version {
        Version::V4 => '4',
        Version::V6 => '6',
        Version::Mapped => 'm',
    });
    equal.chain(cell.deviation.map(mark)).collect()
}

/// The letter of a deviation.
fn mark(deviation: Deviation) -> char {
    match deviation {
        Deviation::VirtualInterface => 'k',
    }
}

#[test]
fn kernels_are_kept_without_their_patch_level() {
    assert_eq!(version("6.18.44-fc-v669\n"), Some((6, 18)));
    assert_eq!(version("7.0-rc1"), Some((7, 0)));
    let line = Line {
        setting: Setting::bare(),
        cells: BTreeMap::new(),
    };
    let kernels = BTreeSet::from([(6, 1), (6, 18)]);
    let text = render(&[line], |_| kernels.clone());
    let row = text.lines().last().expect("it has a table");
    assert!(row.ends_with("| 6.1, 6.18 |"), "{row}");
    let row = row.trim_end_matches(" 6.1, 6.18 |");
    assert_eq!(kernels_of(&text).get(row), Some(&kernels));
}
