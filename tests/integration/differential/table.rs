//! The settings that are always compared: each row of the contract alone, and
//! every two of them together.

use shunt_tests::Stack;

use super::{
    row::Row,
    setting::{Mesh, Setting},
};

/// How many rows a setting of the pairs changes at most: more of them hide each
/// other.
const TOGETHER: usize = 5;

/// All of them, each once.
pub(crate) fn settings() -> Vec<Setting> {
    let mut all = Vec::new();
    for setting in [base(), alone(), pairs()].concat() {
        if !all.contains(&setting) {
            all.push(setting);
        }
    }
    all
}

/// The presets, in pods of each kind.
pub(crate) fn base() -> Vec<Setting> {
    let mut settings = vec![Setting::bare()];
    for mesh in [Mesh::Istio, Mesh::Linkerd, Mesh::Kuma] {
        for (stack, dual_stack) in [
            (Stack::Dual, true),
            (Stack::Dual, false),
            (Stack::V6, false),
            (Stack::V4, false),
        ] {
            settings.push(Setting {
                stack,
                dual_stack,
                ..Setting::of(mesh)
            });
        }
    }
    for stack in [Stack::V4, Stack::V6] {
        settings.push(Setting {
            stack,
            ..Setting::of(Mesh::Istio)
        });
    }
    settings
}

/// Each value of each row, all else being as Istio's injector has it.
fn alone() -> Vec<Setting> {
    let changes = Row::ALL.iter().flat_map(|row| row.changes());
    let settings = changes.map(|change| Setting::of(Mesh::Istio).with(change));
    settings.collect()
}

/// Settings in which every two rows that can be together are changed at once.
fn pairs() -> Vec<Setting> {
    let mut missing: Vec<(Row, Row)> = every_two().collect();
    let mut settings = Vec::new();
    while let Some(&(first, second)) = missing.first() {
        let mut rows = vec![first, second];
        while rows.len() < TOGETHER
            && let Some(row) = most_useful(&rows, &missing)
        {
            rows.push(row);
        }
        missing.retain(|(a, b)| !(rows.contains(a) && rows.contains(b)));
        rows.sort_by_key(|row| Row::ALL.iter().position(|other| other == row));
        settings.push(Setting::of(Mesh::Istio).with(|setting| {
            for row in rows {
                row.changes()[0](setting);
            }
        }));
    }
    settings
}

/// Every two rows that can be set at the same time.
fn every_two() -> impl Iterator<Item = (Row, Row)> {
    let after = |index: usize| Row::ALL[index + 1..].iter();
    Row::ALL
        .iter()
        .enumerate()
        .flat_map(move |(index, &first)| after(index).map(move |&second| (first, second)))
        .filter(|(first, second)| !first.excludes(*second))
}

/// The row that makes most missing pairs with `rows`, if it makes any.
fn most_useful(rows: &[Row], missing: &[(Row, Row)]) -> Option<Row> {
    let pairs_with = |row: Row| {
        let of_row = |pair: &&(Row, Row)| {
            (pair.0 == row && rows.contains(&pair.1)) || (pair.1 == row && rows.contains(&pair.0))
        };
        missing.iter().filter(of_row).count()
    };
    let fits = |row: &&Row| !rows.contains(row) && !rows.iter().any(|other| row.excludes(*other));
    let candidates = Row::ALL.iter().filter(fits).copied();
    let best = candidates.rev().max_by_key(|&row| pairs_with(row))?;
    (pairs_with(best) > 0).then_some(best)
}

#[test]
fn the_table_has_every_row_alone_and_in_pairs() {
    let settings: Vec<_> = settings()
        .into_iter()
        .filter(|setting| setting.mesh == Some(Mesh::Istio) && setting.stack == Stack::Dual)
        .collect();
    let set = |setting: &Setting| -> Vec<Row> {
        let rows = Row::ALL.into_iter();
        rows.filter(|row| row.is_set(setting)).collect()
    };
    for row in Row::ALL {
        assert!(settings.iter().any(|s| set(s) == [row]), "{row:?} alone");
    }
    for (first, second) in every_two() {
        let both = |s: &Setting| first.is_set(s) && second.is_set(s);
        assert!(settings.iter().any(both), "{first:?} with {second:?}");
    }
}
