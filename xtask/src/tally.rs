//! What Rust's test runner counted.

use std::{fmt, ops::AddAssign};

/// Tests that passed and failed, and those that did not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// Marked with `#[ignore]`.
    pub(crate) ignored: u64,
    /// Not of the names that were asked for.
    pub(crate) filtered: u64,
}

impl Tally {
    /// From a line `test result: ok. 5 passed; 0 failed; …` of the test runner;
    /// `None` for any other line.
    pub(crate) fn from_line(line: &str) -> Option<Self> {
        let counts = line.strip_prefix("test result: ")?;
        let (_verdict, counts) = counts.split_once(". ")?;
        let count = |word: &str| {
            let mut parts = counts.split(';').map(str::trim);
            parts.find_map(|part| part.strip_suffix(word)?.trim_end().parse().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            ignored: count("ignored")?,
            filtered: count("filtered out")?,
        })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.filtered += other.filtered;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runners_line_is_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 2 ignored; 0 measured; 7 filtered out; finished in 0.01s";
        assert_eq!(
            Tally::from_line(line),
            Some(Tally {
                passed: 12,
                failed: 3,
                ignored: 2,
                filtered: 7,
            })
        );
        let line = "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(Tally::from_line(line), Some(Tally::default()));
    }

    #[test]
    fn other_lines_are_not() {
        for line in [
            "",
            "test result: ok",
            "test result: ok. none",
            "test result: ok. 1 passed; 0 failed",
            "running 5 tests",
            "test tally::tests::other_lines_are_not ... ok",
            "  test result: ok. 1 passed; 0 failed",
        ] {
            assert_eq!(Tally::from_line(line), None, "{line}");
        }
    }

    #[test]
    fn sums_add_up() {
        let mut sum = Tally::default();
        sum += Tally {
            passed: 2,
            failed: 1,
            ..Tally::default()
        };
        sum += Tally {
            passed: 3,
            failed: 0,
            ..Tally::default()
        };
        assert_eq!(sum.to_string(), "5 passed, 1 failed");
    }
}
