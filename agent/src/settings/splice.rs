use serde::{Deserialize, Serialize};
use shunt_abi::SpliceMode;

use super::Problem;

/// How far connections are to be spliced.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Splice {
    /// As far as it is safe.
    #[default]
    Auto,
    /// Not at all.
    Off,
    /// Into the sockets of the proxy.
    Proxy,
    /// Into those of the application as well.
    All,
}

impl Splice {
    /// Reads one of the four names.
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        clap::ValueEnum::from_str(text, false).map_err(|_unknown| Problem::Splice(text.to_owned()))
    }

    /// Its name, as it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Proxy => "proxy",
            Self::All => "all",
        }
    }

    /// What that means on a node that does no more than `node`.
    pub fn within(self, node: SpliceMode) -> SpliceMode {
        let asked = match self {
            Self::Auto => node,
            Self::Off => SpliceMode::Off,
            Self::Proxy => SpliceMode::Proxy,
            Self::All => SpliceMode::All,
        };
        asked.min(node)
    }
}

impl From<SpliceMode> for Splice {
    fn from(mode: SpliceMode) -> Self {
        match mode {
            SpliceMode::Off => Self::Off,
            SpliceMode::Proxy => Self::Proxy,
            SpliceMode::All => Self::All,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_only_lowers_what_the_node_does() {
        use SpliceMode::{All, Off, Proxy};
        let rows = [
            (Splice::Auto, [Off, Proxy, All]),
            (Splice::Off, [Off, Off, Off]),
            (Splice::Proxy, [Off, Proxy, Proxy]),
            (Splice::All, [Off, Proxy, All]),
        ];
        for (asked, expected) in rows {
            assert_eq!([Off, Proxy, All].map(|node| asked.within(node)), expected, "{asked:?}");
        }
    }

    #[test]
    fn the_names_are_read_and_others_are_not() {
        for splice in [Splice::Auto, Splice::Off, Splice::Proxy, Splice::All] {
            assert_eq!(Splice::parse(splice.name()), Ok(splice));
        }
        assert_eq!(Splice::parse("on"), Err(Problem::Splice("on".to_owned())));
    }
}
