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
    /// Between proxies.
    Between,
    /// Into the sockets of the proxy, from those of the application, too.
    Proxy,
    /// Into those of the application as well.
    All,
}

impl Splice {
    /// Reads one of the names.
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        clap::ValueEnum::from_str(text, false).map_err(|_unknown| Problem::Splice(text.to_owned()))
    }

    /// Its name, as it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Between => "between",
            Self::Proxy => "proxy",
            Self::All => "all",
        }
    }

    /// What that means on a node that does no more than `node`.
    pub fn within(self, node: SpliceMode) -> SpliceMode {
        let asked = match self {
            Self::Auto => node,
            Self::Off => SpliceMode::Off,
            Self::Between => SpliceMode::Between,
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
            SpliceMode::Between => Self::Between,
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
        use SpliceMode::{All, Between, Off, Proxy};
        let rows = [
            (Splice::Auto, [Off, Between, Proxy, All]),
            (Splice::Off, [Off; 4]),
            (Splice::Between, [Off, Between, Between, Between]),
            (Splice::Proxy, [Off, Between, Proxy, Proxy]),
            (Splice::All, [Off, Between, Proxy, All]),
        ];
        for (asked, expected) in rows {
            let found = [Off, Between, Proxy, All].map(|node| asked.within(node));
            assert_eq!(found, expected, "{asked:?}");
        }
    }

    #[test]
    fn the_names_are_read_and_others_are_not() {
        for splice in <Splice as clap::ValueEnum>::value_variants() {
            assert_eq!(Splice::parse(splice.name()), Ok(*splice));
        }
        assert_eq!(Splice::parse("on"), Err(Problem::Splice("on".to_owned())));
    }
}
