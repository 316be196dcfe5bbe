//! What of two answers must be equal.

use std::{
    fmt::{self, Display},
    net::SocketAddr,
};

use shunt_tests::{Answer, Outcome, Source};

use super::probes::Question;

/// What both sides of a connection saw, without what is chance.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    outcome: SeenOutcome,
    peername: Option<SocketAddr>,
    sockname: Option<SocketAddr>,
}

#[derive(Debug, PartialEq, Eq)]
enum SeenOutcome {
    Answered {
        place: String,
        listener: u16,
        peer: SocketAddr,
        destination: SocketAddr,
        knows_destination: bool,
    },
    Otherwise(Outcome),
}

impl Seen {
    pub(crate) fn new(question: &Question, answer: &Answer) -> Self {
        // A port that the kernel gave out is another one each time.
        let comparable = |addr: SocketAddr| match question.probe.source {
            Source::Port(_) => addr,
            Source::Unbound | Source::Addr(_) | Source::AddrLatePort(_) => {
                SocketAddr::new(addr.ip(), 0)
            }
        };
        let outcome = match &answer.outcome {
            Outcome::Answered(greeting) => SeenOutcome::Answered {
                place: greeting.place.clone(),
                listener: greeting.listener,
                peer: comparable(greeting.peer),
                destination: greeting.destination(),
                knows_destination: greeting.knows_destination(),
            },
            Outcome::Refused | Outcome::Closed | Outcome::Silent | Outcome::Failed(_) => {
                SeenOutcome::Otherwise(answer.outcome.clone())
            }
        };
        Self {
            outcome,
            peername: answer.peername,
            sockname: answer.sockname.map(comparable),
        }
    }
}

impl Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            SeenOutcome::Answered {
                place,
                listener,
                peer,
                destination,
                knows_destination,
            } => {
                write!(f, "{place}:{listener} sees {peer}, asked for {destination}")?;
                if !knows_destination {
                    f.write_str(" (not told by SO_ORIGINAL_DST)")?;
                }
            }
            SeenOutcome::Otherwise(outcome) => write!(f, "{outcome}")?,
        }
        for (what, addr) in [
            ("getpeername", self.peername),
            ("getsockname", self.sockname),
        ] {
            if let Some(addr) = addr {
                write!(f, "; {what} {addr}")?;
            }
        }
        Ok(())
    }
}

/// Something that is not as it should be.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) question: Question,
    /// In one sentence or several.
    text: String,
}

impl Fault {
    pub(crate) fn new(question: &Question, text: String) -> Self {
        Self {
            question: *question,
            text,
        }
    }

    /// What is said of it.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The difference of two answers, where there is one.
    pub(crate) fn difference(question: &Question, (one, other): &(Answer, Answer)) -> Option<Self> {
        let (one, other) = (Seen::new(question, one), Seen::new(question, other));
        (one != other).then(|| Self::new(question, format!("  rules: {one}\n  other: {other}")))
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.question, self.text)
    }
}

impl Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            class,
            version,
            from,
            probe,
        } = self;
        write!(f, "{class:?}, {version:?}: in {from:?} {probe}")
    }
}
