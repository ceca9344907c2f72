//! Questions to the pager that have no answer yet.
//!
//! A question that a dead pager did not answer is asked of the next one: all of them may be asked
//! twice. Those that only mean something to the pager that was asked fail with it.

use std::collections::BTreeMap;

use slat_paging::wire::{Answer, Ask, Problem, ProblemKind};

/// What came of a question.
pub(super) type Reply = Result<Answer, Problem>;

#[derive(Debug)]
struct Pending {
    ask: Ask,
    sent: bool,
    /// Nobody waits for the answer.
    alone: bool,
    reply: Option<Reply>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Asks {
    last: u64,
    pending: BTreeMap<u64, Pending>,
}

/// Whether a question dies with the pager that it was asked.
fn is_of_one_pager(ask: &Ask) -> bool {
    matches!(ask, Ask::Begin { .. } | Ask::Stop | Ask::EndSnapshot { .. })
}

impl Asks {
    /// A new question; `alone`: nobody waits for its answer.
    pub(super) fn put(&mut self, ask: Ask, alone: bool) -> u64 {
        let number = self.number();
        let pending = Pending {
            ask,
            sent: false,
            alone,
            reply: None,
        };
        self.pending.insert(number, pending);
        number
    }

    /// The number of a question whose answer nobody looks at.
    pub(super) fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// The next one that has to be sent; it counts as sent from now on.
    pub(super) fn next_unsent(&mut self) -> Option<(u64, Ask)> {
        let mut all = self.pending.iter_mut();
        let (number, pending) = all.find(|(_, pending)| !pending.sent)?;
        pending.sent = true;
        Some((*number, pending.ask.clone()))
    }

    /// An answer came. Of a question that nobody asked, or no more, it is nothing.
    pub(super) fn answer(&mut self, number: u64, reply: Reply) {
        let Some(pending) = self.pending.get_mut(&number) else {
            return;
        };
        if pending.alone {
            self.pending.remove(&number);
        } else if pending.reply.is_none() {
            pending.reply = Some(reply);
        }
    }

    /// The snapshot that a question begins for which somebody still waits.
    pub(super) fn begins(&self, number: u64) -> Option<u64> {
        match self.pending.get(&number)?.ask {
            Ask::Begin { snapshot } => Some(snapshot),
            _ => None,
        }
    }

    /// The answer, once.
    pub(super) fn take(&mut self, number: u64) -> Option<Reply> {
        let reply = self.pending.get_mut(&number)?.reply.take()?;
        self.pending.remove(&number);
        Some(reply)
    }

    /// Nobody waits for it any more.
    pub(super) fn forget(&mut self, number: u64) {
        self.pending.remove(&number);
    }

    /// The pager is gone.
    pub(super) fn pager_gone(&mut self) {
        self.pending
            .retain(|_, pending| !(pending.alone && is_of_one_pager(&pending.ask)));
        for pending in self.pending.values_mut() {
            if pending.reply.is_some() {
                continue;
            }
            if pending.sent && is_of_one_pager(&pending.ask) {
                pending.reply = Some(Err(Problem {
                    kind: ProblemKind::Stopping,
                    message: "it ended".to_owned(),
                }));
            } else {
                pending.sent = false;
            }
        }
    }
}

/// What a question asks a pager to do, for people.
pub(super) fn word(ask: &Ask) -> &'static str {
    match ask {
        Ask::Remove { .. } => "let go of a slot",
        Ask::Move { .. } => "move a slot",
        Ask::Arm { .. } => "prepare a snapshot",
        Ask::Begin { .. } => "begin a snapshot",
        Ask::Unmap { .. } => "take mappings away",
        Ask::Discard { .. } => "discard pages",
        Ask::Load { .. } | Ask::LoadAll => "bring pages",
        Ask::Protect { .. } => "protect pages",
        Ask::Age { .. } => "age pages",
        Ask::Mapped { .. } => "list mappings",
        Ask::Prefault { .. } => "map pages ahead",
        Ask::EndSnapshot { .. } => "end a snapshot",
        Ask::Retry => "try its source again",
        Ask::State => "say its state",
        Ask::Stop => "stop",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_pager_left_open_is_asked_again_and_what_was_only_its_own_fails() {
        let mut asks = Asks::default();
        let load = asks.put(Ask::LoadAll, false);
        let begin = asks.put(Ask::Begin { snapshot: 1 }, false);
        let stop = asks.put(Ask::Stop, true);
        while asks.next_unsent().is_some() {}
        assert_eq!((asks.begins(begin), asks.begins(load)), (Some(1), None));
        asks.pager_gone();
        assert_eq!(asks.next_unsent(), Some((load, Ask::LoadAll)));
        assert_eq!(asks.next_unsent(), None);
        let failed = asks.take(begin).unwrap().unwrap_err();
        assert_eq!(failed.kind, ProblemKind::Stopping);
        asks.answer(load, Ok(Answer::Done));
        asks.answer(stop, Ok(Answer::Done));
        asks.answer(99, Ok(Answer::Done));
        asks.pager_gone();
        assert_eq!(asks.take(load), Some(Ok(Answer::Done)), "an answer stays");
        assert!(asks.pending.is_empty());
    }

    #[test]
    fn an_answer_is_given_once() {
        let mut asks = Asks::default();
        let state = asks.put(Ask::State, false);
        assert_eq!(asks.take(state), None);
        asks.answer(state, Ok(Answer::Done));
        assert!(asks.take(state).is_some() && asks.take(state).is_none());
        let late = asks.put(Ask::State, false);
        asks.forget(late);
        asks.answer(late, Ok(Answer::Done));
        assert!(asks.pending.is_empty());
    }
}
