use std::{collections::BTreeMap, fmt};

use super::Field;

/// Where a setting was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// On the command line.
    Flag,
    /// In the environment variable of this name.
    Env(String),
    /// In the pod annotation of this name.
    Annotation(String),
    /// At this place of the pod's manifest.
    Manifest(String),
}

/// A setting as it was written, not yet understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Which setting.
    pub field: Field,
    /// Where.
    pub origin: Origin,
    /// The value.
    pub text: String,
}

/// As it stands in an error, in the form in which it was written.
impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = Excerpt(&self.text);
        match &self.origin {
            Origin::Flag if self.field.is_switch() => write!(f, "{}={text}", self.field.flag()),
            Origin::Flag => write!(f, "{} {text}", self.field.flag()),
            Origin::Env(name) => write!(f, "{name}={text}"),
            Origin::Annotation(name) => write!(f, "annotation {name}: {text}"),
            Origin::Manifest(place) => write!(f, "{place}: {text}"),
        }
    }
}

/// Text from outside, fit to stand in one line of an error: nothing in it
/// reaches the terminal as a control character, and a long list is cut.
pub(super) struct Excerpt<'a>(pub(super) &'a str);

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 80;
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(LONGEST) {
            write!(f, "{}", c.escape_debug())?;
        }
        if chars.next().is_some() {
            f.write_str("…")?;
        }
        Ok(())
    }
}

/// Everything that was written for one pod: each setting once, the last
/// [`extend`](Extend::extend) wins.
#[derive(Clone, Debug, Default)]
pub struct Inputs(BTreeMap<Field, Written>);

impl Inputs {
    /// What was written for `field`.
    pub fn get(&self, field: Field) -> Option<&Written> {
        self.0.get(&field)
    }
}

impl Extend<Written> for Inputs {
    fn extend<T: IntoIterator<Item = Written>>(&mut self, written: T) {
        self.0
            .extend(written.into_iter().map(|one| (one.field, one)));
    }
}

impl FromIterator<Written> for Inputs {
    fn from_iter<T: IntoIterator<Item = Written>>(written: T) -> Self {
        let mut inputs = Self::default();
        inputs.extend(written);
        inputs
    }
}
