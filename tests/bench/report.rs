//! What was measured, and how it is written down.

use std::fmt::Write;

use serde::Serialize;

use crate::{
    bars::{self, Verdict},
    machine::Machine,
    neighbours,
    stats::{Spread, ratios},
    world::Way,
};

/// Something that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Figure {
    /// What, in a few words.
    pub(crate) name: &'static str,
    /// In which unit.
    pub(crate) unit: &'static str,
    /// Digits behind the point.
    pub(crate) digits: usize,
}

/// A figure with this name and unit, and so many digits behind the point.
pub(crate) const fn figure(name: &'static str, unit: &'static str, digits: usize) -> Figure {
    Figure { name, unit, digits }
}

/// One thing that was measured in every round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// For example the way in which connections come to the proxy.
    pub(crate) name: &'static str,
    /// One number for each round.
    pub(crate) rounds: Vec<f64>,
}

/// A figure in all rows.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measure {
    #[serde(flatten)]
    pub(crate) figure: Figure,
    pub(crate) rows: Vec<Row>,
}

/// Figures that have their rows in common.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Setting {
    /// Such as the kind of proxy.
    pub(crate) name: &'static str,
    pub(crate) measures: Vec<Measure>,
}

impl Setting {
    /// The names of all rows, in the order in which they came.
    fn rows(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for row in self.measures.iter().flat_map(|measure| &measure.rows) {
            if !names.contains(&row.name) {
                names.push(row.name);
            }
        }
        names
    }
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// Where.
    pub(crate) machine: Machine,
    /// How long, how often.
    pub(crate) how: String,
    /// What the reader has to know.
    pub(crate) notes: Vec<String>,
    /// The figures.
    pub(crate) settings: Vec<Setting>,
}

impl Report {
    /// One without figures.
    pub(crate) fn new(machine: Machine, how: String) -> Self {
        Self {
            machine,
            how,
            notes: Vec::new(),
            settings: Vec::new(),
        }
    }

    /// Something that the reader has to know.
    pub(crate) fn note(&mut self, text: &str) {
        if !self.notes.iter().any(|note| note == text) {
            self.notes.push(text.to_owned());
        }
    }

    /// Takes in what one round gave.
    pub(crate) fn add(
        &mut self,
        setting: &'static str,
        figure: Figure,
        row: &'static str,
        value: f64,
    ) {
        let setting = entry(
            &mut self.settings,
            |s| s.name == setting,
            || Setting {
                name: setting,
                measures: Vec::new(),
            },
        );
        let measure = entry(
            &mut setting.measures,
            |m| m.figure == figure,
            || Measure {
                figure,
                rows: Vec::new(),
            },
        );
        let row = entry(
            &mut measure.rows,
            |r| r.name == row,
            || Row {
                name: row,
                rounds: Vec::new(),
            },
        );
        row.rounds.push(value);
    }

    /// The rounds of one row; empty when it was not measured.
    pub(crate) fn rounds(&self, setting: &str, figure: Figure, row: &str) -> &[f64] {
        let setting = self.settings.iter().find(|s| s.name == setting);
        let measure = setting.and_then(|s| s.measures.iter().find(|m| m.figure == figure));
        let row = measure.and_then(|m| m.rows.iter().find(|r| r.name == row));
        row.map_or(&[], |row| &row.rounds)
    }

    /// The tables.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        let mut line = |args: std::fmt::Arguments<'_>| {
            text.write_fmt(args)
                .expect("a String takes whatever is written to it");
        };
        line(format_args!("{}\n\n{}\n", self.machine, self.how));
        for note in &self.notes {
            line(format_args!("\n{note}\n"));
        }
        line(format_args!("\n## Against the bars\n\n{}", self.bars()));
        for setting in &self.settings {
            line(format_args!(
                "\n## {}\n\n{}",
                title(setting.name),
                medians(setting)
            ));
            for reference in REFERENCES {
                if let Some(table) = against(setting, reference) {
                    line(format_args!(
                        "\nAgainst {reference}, round by round:\n\n{table}"
                    ));
                }
            }
        }
        text
    }

    /// Everything, as JSON.
    pub(crate) fn json(&self) -> serde_json::Result<String> {
        #[derive(Serialize)]
        struct Whole<'a> {
            #[serde(flatten)]
            report: &'a Report,
            bars: Vec<Verdict>,
        }
        let bars = bars::verdicts(self);
        serde_json::to_string_pretty(&Whole { report: self, bars }).map(|text| text + "\n")
    }

    /// The tables, as a document of their own.
    pub(crate) fn document(&self) -> String {
        format!("{}{}", include_str!("document.md"), self.markdown())
    }

    fn bars(&self) -> String {
        let mut table = Table::new(["what", "bar", "measured", ""].map(str::to_owned).to_vec());
        for verdict in bars::verdicts(self) {
            let met = if verdict.met { "met" } else { "**missed**" };
            table.row(vec![
                verdict.what.to_owned(),
                verdict.bar,
                with_spread(verdict.measured, verdict.digits),
                met.to_owned(),
            ]);
        }
        table.text()
    }
}

/// What ratios are taken against.
const REFERENCES: [&str; 3] = [Way::IPTABLES_NFT, Way::EXPLICIT, neighbours::NO_AGENT];

fn title(name: &str) -> String {
    let mut letters = name.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

/// The item that `is_it`, which is put at the end when there is none.
fn entry<T>(items: &mut Vec<T>, is_it: impl Fn(&T) -> bool, make: impl FnOnce() -> T) -> &mut T {
    let place = items.iter().position(is_it).unwrap_or_else(|| {
        items.push(make());
        items.len() - 1
    });
    &mut items[place]
}

/// One line for each figure, one column for each row of it.
fn medians(setting: &Setting) -> String {
    let rows = setting.rows();
    let mut table = Table::with_names("", &rows);
    for Measure {
        figure,
        rows: measured,
    } in &setting.measures
    {
        let cells = rows.iter().map(|name| {
            let row = measured.iter().find(|row| row.name == *name);
            row.and_then(|row| Spread::of(&row.rounds))
                .map_or_else(nothing, |spread| number(spread.mid, figure.digits))
        });
        let name = format!("{}, {}", figure.name, figure.unit);
        table.row(std::iter::once(name).chain(cells).collect());
    }
    table.text()
}

/// The same as ratios; `None` when there is nothing to compare.
fn against(setting: &Setting, reference: &'static str) -> Option<String> {
    let mut rows = setting.rows();
    rows.retain(|name| *name != reference);
    let mut table = Table::with_names("", &rows);
    for Measure {
        figure,
        rows: measured,
    } in &setting.measures
    {
        let Some(to) = measured.iter().find(|row| row.name == reference) else {
            continue;
        };
        let cells = rows.iter().map(|name| {
            let row = measured.iter().find(|row| row.name == *name);
            row.and_then(|row| Spread::of(&ratios(&row.rounds, &to.rounds)))
                .map_or_else(nothing, |spread| with_spread(spread, 2))
        });
        table.row(
            std::iter::once(figure.name.to_owned())
                .chain(cells)
                .collect(),
        );
    }
    (!table.lines.is_empty() && !rows.is_empty()).then(|| table.text())
}

fn nothing() -> String {
    "–".to_owned()
}

fn number(value: f64, digits: usize) -> String {
    format!("{value:.digits$}")
}

fn with_spread(spread: Spread, digits: usize) -> String {
    let Spread { low, mid, high } = spread;
    if low == high {
        return number(mid, digits);
    }
    format!("{mid:.digits$} ({low:.digits$}–{high:.digits$})")
}

/// A table whose columns are as wide as what is in them.
struct Table {
    head: Vec<String>,
    lines: Vec<Vec<String>>,
}

impl Table {
    fn new(head: Vec<String>) -> Self {
        Self {
            head,
            lines: Vec::new(),
        }
    }

    fn with_names(first: &str, names: &[&str]) -> Self {
        let names = std::iter::once(first).chain(names.iter().copied());
        Self::new(names.map(str::to_owned).collect())
    }

    fn row(&mut self, cells: Vec<String>) {
        self.lines.push(cells);
    }

    fn text(&self) -> String {
        let all = || std::iter::once(&self.head).chain(&self.lines);
        let width = |column: usize| {
            let cells = all().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.head.len()).map(width).collect();
        let line = |cells: &[String]| {
            let cells = cells.iter().zip(&widths).enumerate();
            let padded = cells.map(|(column, (cell, &width))| {
                if column == 0 {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            });
            format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
        };
        let rule = widths.iter().enumerate().map(|(column, &width)| {
            let dashes = "-".repeat(width.max(2) - 1);
            if column == 0 {
                format!("-{dashes}")
            } else {
                format!("{dashes}:")
            }
        });
        let rule = line(&rule.collect::<Vec<_>>());
        let lines: String = self.lines.iter().map(|cells| line(cells)).collect();
        format!("{}{rule}{lines}", line(&self.head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATENCY: Figure = figure("request", "µs", 1);

    fn report() -> Report {
        let mut report = Report::new(Machine::example(), "2 rounds".to_owned());
        for (row, rounds) in [
            ("direct", [50.0, 52.0]),
            (Way::IPTABLES_NFT, [100.0, 104.0]),
        ] {
            for value in rounds {
                report.add("minimal proxy", LATENCY, row, value);
            }
        }
        report
    }

    #[test]
    fn rounds_come_together() {
        let report = report();
        let rounds = |row| report.rounds("minimal proxy", LATENCY, row);
        assert_eq!(rounds("direct"), [50.0, 52.0]);
        assert!(rounds("nftables").is_empty());
        assert!(report.rounds("two Envoys", LATENCY, "direct").is_empty());
    }

    #[test]
    fn medians_stand_beside_each_other() {
        let expected = "\
|             | direct | iptables-nft |
| ----------- | -----: | -----------: |
| request, µs |   51.0 |        102.0 |
";
        assert_eq!(medians(&report().settings[0]), expected);
    }

    #[test]
    fn ratios_are_against_the_reference_of_the_same_round() {
        let expected = "\
|         | direct |
| ------- | -----: |
| request |   0.50 |
";
        let table = against(&report().settings[0], Way::IPTABLES_NFT);
        assert_eq!(table.as_deref(), Some(expected));
        assert_eq!(against(&report().settings[0], Way::EXPLICIT), None);
    }

    #[test]
    fn what_differs_between_rounds_has_a_spread() {
        let spread = Spread::of(&[1.0, 2.0, 3.0]).expect("three numbers");
        assert_eq!(with_spread(spread, 1), "2.0 (1.5–2.5)");
    }

    #[test]
    fn the_whole_says_where_and_how() {
        let text = report().markdown();
        for part in ["2 rounds", "## Minimal proxy", "Against iptables-nft"] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
    }
}
