use crate::Endpoint;

/// How many questions that wait for an answer one socket remembers.
pub const QUESTION_SLOTS: usize = if cfg!(feature = "other-layout") { 4 } else { 8 };

/// How long a question is waited for when another one follows, in nanoseconds.
/// Resolvers retry after a second or more.
pub const PATIENCE: u64 = 900_000_000;

/// Value of the socket storage `QUESTIONS`: the servers that an unconnected UDP
/// socket asked, in order.
///
/// Every answer comes from the proxy, and nothing that a program sees of it
/// tells which question it answers. It is taken for one of the server that was
/// asked first of those still waiting: right for one server, and for several
/// that are asked the same at once (as musl does) as good as any order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Questions {
    /// When the last one was asked, in nanoseconds since the node started.
    pub asked_at: u64,
    /// How many were asked.
    pub asked: u32,
    /// How many were answered; never more than asked.
    pub answered: u32,
    /// The servers, the n-th at n modulo [`QUESTION_SLOTS`].
    pub servers: [Endpoint; QUESTION_SLOTS],
}

impl Questions {
    /// None yet: zeros, as the kernel makes a socket's storage.
    pub const NONE: Self = Self {
        asked_at: 0,
        asked: 0,
        answered: 0,
        servers: [Endpoint::new(crate::Addr { words: [0; 4] }, 0); QUESTION_SLOTS],
    };

    /// Remembers a question, asked `now` (nanoseconds since the node started).
    /// Those that have waited for longer than [`PATIENCE`] will hardly be
    /// answered: this one is the retry. The oldest is forgotten when there are
    /// too many.
    #[inline(always)]
    pub const fn ask(&mut self, server: Endpoint, now: u64) {
        if now.wrapping_sub(self.asked_at) > PATIENCE {
            self.answered = self.asked;
        }
        self.asked_at = now;
        self.servers[self.asked as usize % QUESTION_SLOTS] = server;
        self.asked = self.asked.wrapping_add(1);
        if self.asked.wrapping_sub(self.answered) > QUESTION_SLOTS as u32 {
            self.answered = self.asked.wrapping_sub(QUESTION_SLOTS as u32);
        }
    }

    /// The server that the next answer comes from, `None` when none is waited
    /// for.
    #[inline(always)]
    pub const fn answer(&mut self) -> Option<Endpoint> {
        if self.answered == self.asked {
            return None;
        }
        let server = self.servers[self.answered as usize % QUESTION_SLOTS];
        self.answered = self.answered.wrapping_add(1);
        Some(server)
    }

    /// The server that was asked last: for an answer too many, one that was sent
    /// twice or looked at with `MSG_PEEK`.
    #[inline(always)]
    pub const fn last(&self) -> Endpoint {
        self.servers[self.asked.wrapping_sub(1) as usize % QUESTION_SLOTS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Addr;

    fn server(n: u16) -> Endpoint {
        Endpoint::new(Addr::LOOPBACK4, n)
    }

    #[test]
    fn answers_come_in_the_order_of_the_questions() {
        let mut questions = Questions::NONE;
        questions.ask(server(1), 0);
        questions.ask(server(2), 0);
        assert_eq!(questions.answer(), Some(server(1)));
        questions.ask(server(3), 0);
        assert_eq!(questions.answer(), Some(server(2)));
        assert_eq!(questions.answer(), Some(server(3)));
        assert_eq!(questions.answer(), None);
        assert_eq!(questions.last(), server(3));
    }

    #[test]
    fn a_retry_takes_the_place_of_the_question_that_was_lost() {
        let mut questions = Questions::NONE;
        questions.ask(server(1), 5);
        questions.ask(server(2), 5 + PATIENCE + 1);
        assert_eq!(questions.answer(), Some(server(2)));
    }

    #[test]
    fn too_many_questions_lose_the_oldest() {
        let mut questions = Questions::NONE;
        for n in 0..20 {
            questions.ask(server(n), 0);
        }
        for n in 12..20 {
            assert_eq!(questions.answer(), Some(server(n)));
        }
        assert_eq!(questions.last(), server(19));
    }
}
