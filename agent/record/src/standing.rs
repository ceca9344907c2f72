//! How a side of a migration stands once its process is dead: decided by its journal, never
//! guessed.
//!
//! Pure: what is on disk goes in, an answer comes out. The agent answers with it for its dead
//! processes, a destination in doubt decides by it, and the model checker explores it.
//!
//! # Rules
//! * A source has given its VM away exactly when its journal says RELINQUISHED for that migration,
//!   or its side was ever seen so; and no ADOPTED comes after: then an operator took it back, and
//!   whoever is still in doubt must not have it.
//! * A destination has the VM exactly when its journal says OWNED for that migration.
//! * Memory died with the process. Every other side that had not ended by itself has failed. At a
//!   destination that says nothing about the source: that one answers from its own journal.

use crate::journal::{Entry, JournalState, Ownership};

/// What a side's record on disk last said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recorded {
    /// It went on.
    Running,
    /// Source: RELINQUISHED was told.
    Relinquished,
    /// It ended with the handover.
    Completed,
    /// It ended without.
    Ended,
}

/// How a dead source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceStands {
    /// It gave the VM away; whether the destination has it, this side does not know.
    Relinquished,
    /// It gave the VM away and heard that the destination has it.
    Completed,
    /// It had ended by itself, as its record says.
    Ended,
    /// It gave the VM away, and an operator took it back.
    Adopted,
    /// It ended its VM in mid-migration, because it was told to.
    Stopped,
    /// It died before the end.
    Died {
        /// It owned the VM, whose memory died with it.
        vm_lost: bool,
    },
}

/// How a dead destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationStands {
    /// It owned the VM.
    Completed,
    /// It had ended by itself, as its record says.
    Ended,
    /// It died while it received.
    Died {
        /// PREPARED is in its journal: the source may have handed the VM over.
        prepared: bool,
    },
}

/// The source's side of `migration`; `None` when neither journal nor record knows of it.
#[must_use]
pub fn source(
    state: Option<&JournalState>,
    entries: &[Entry],
    recorded: Option<Recorded>,
    migration: &str,
) -> Option<SourceStands> {
    let relinquished = entries
        .iter()
        .any(|entry| matches!(entry, Entry::Relinquished { migration: of, .. } if of == migration));
    if adopted(entries, migration) {
        return Some(SourceStands::Adopted);
    }
    match recorded {
        Some(Recorded::Completed) => Some(SourceStands::Completed),
        Some(Recorded::Relinquished) => Some(SourceStands::Relinquished),
        _ if relinquished => Some(SourceStands::Relinquished),
        Some(Recorded::Ended) => Some(SourceStands::Ended),
        Some(Recorded::Running) if ended_as_owner(entries) => Some(SourceStands::Stopped),
        Some(Recorded::Running) => Some(SourceStands::Died {
            vm_lost: lost_epoch(state, false).is_some(),
        }),
        None => None,
    }
}

/// Whether the journal's last word is that the VM was ended where it was owned.
fn ended_as_owner(entries: &[Entry]) -> bool {
    matches!(
        entries,
        [
            ..,
            Entry::Created { .. } | Entry::Owned { .. } | Entry::Adopted { .. },
            Entry::Ended { .. }
        ]
    )
}

/// Whether an operator took the VM back after it was given away by `migration`.
#[must_use]
pub fn adopted(entries: &[Entry], migration: &str) -> bool {
    entries.windows(2).any(|pair| {
        matches!(pair, [Entry::Relinquished { migration: of, .. }, Entry::Adopted { .. }] if of == migration)
    })
}

/// The destination's side of `migration`; `None` when neither journal nor record knows of it.
#[must_use]
pub fn destination(
    entries: &[Entry],
    recorded: Option<Recorded>,
    migration: &str,
) -> Option<DestinationStands> {
    let has = |test: &dyn Fn(&Entry) -> bool| entries.iter().any(test);
    if has(&|entry| matches!(entry, Entry::Owned { migration: of, .. } if of == migration)) {
        return Some(DestinationStands::Completed);
    }
    let aborted =
        has(&|entry| matches!(entry, Entry::Aborted { migration: of, .. } if of == migration));
    let prepared =
        has(&|entry| matches!(entry, Entry::Prepared { migration: of, .. } if of == migration));
    let incoming =
        has(&|entry| matches!(entry, Entry::Incoming { migration: of, .. } if of == migration));
    match recorded {
        Some(Recorded::Ended) => Some(DestinationStands::Ended),
        None if !(incoming || prepared || aborted) => None,
        _ => Some(DestinationStands::Died {
            prepared: prepared && !aborted,
        }),
    }
}

/// The epoch that a dead process owned: that VM is lost. `given_away`: a side of it was seen to
/// have given the VM away, although the journal does not say so.
#[must_use]
pub fn lost_epoch(state: Option<&JournalState>, given_away: bool) -> Option<u64> {
    match state?.ownership {
        Ownership::Owner { epoch } if !given_away => Some(epoch),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(entries: &[Entry]) -> Option<JournalState> {
        JournalState::of(entries).unwrap()
    }

    fn created() -> Entry {
        Entry::Created {
            vm: "a".into(),
            uid: "u".into(),
            epoch: 1,
        }
    }

    fn relinquished() -> Entry {
        Entry::Relinquished {
            uid: "u".into(),
            migration: "m".into(),
            epoch: 1,
            grant: None,
        }
    }

    #[test]
    fn a_source_has_given_its_vm_away_when_its_journal_says_so() {
        let kept = [created()];
        let state = journal(&kept);
        let ask = |recorded| source(state.as_ref(), &kept, recorded, "m");
        assert_eq!(ask(None), None);
        assert_eq!(
            ask(Some(Recorded::Running)),
            Some(SourceStands::Died { vm_lost: true })
        );
        assert_eq!(ask(Some(Recorded::Ended)), Some(SourceStands::Ended));
        assert_eq!(
            ask(Some(Recorded::Relinquished)),
            Some(SourceStands::Relinquished)
        );

        let given = [created(), relinquished()];
        let state = journal(&given);
        for recorded in [None, Some(Recorded::Running), Some(Recorded::Ended)] {
            let stands = source(state.as_ref(), &given, recorded, "m");
            assert_eq!(stands, Some(SourceStands::Relinquished), "{recorded:?}");
        }
        assert_eq!(
            source(state.as_ref(), &given, Some(Recorded::Running), "other"),
            Some(SourceStands::Died { vm_lost: false })
        );
        assert_eq!(lost_epoch(state.as_ref(), false), None);
    }

    #[test]
    fn a_source_that_was_told_to_end_its_vm_has_none_to_go_on_with() {
        let ended = || Entry::Ended { uid: "u".into() };
        let stopped = [created(), ended()];
        let state = journal(&stopped);
        let ask = |recorded| source(state.as_ref(), &stopped, recorded, "m");
        assert_eq!(ask(Some(Recorded::Running)), Some(SourceStands::Stopped));
        // It had failed before, and what was ended afterwards is not its matter.
        assert_eq!(ask(Some(Recorded::Ended)), Some(SourceStands::Ended));
        let released = [created(), relinquished(), ended()];
        let state = journal(&released);
        assert_eq!(
            source(state.as_ref(), &released, Some(Recorded::Running), "other"),
            Some(SourceStands::Died { vm_lost: false })
        );
    }

    #[test]
    fn a_source_that_took_its_vm_back_answers_that_it_kept_it() {
        let adopted = Entry::Adopted {
            uid: "u".into(),
            epoch: 3,
        };
        let entries = [created(), relinquished(), adopted];
        let state = journal(&entries);
        for recorded in [None, Some(Recorded::Relinquished), Some(Recorded::Ended)] {
            let stands = source(state.as_ref(), &entries, recorded, "m");
            assert_eq!(stands, Some(SourceStands::Adopted), "{recorded:?}");
        }
        assert_eq!(lost_epoch(state.as_ref(), false), Some(3));
    }

    #[test]
    fn a_destination_has_the_vm_when_its_journal_says_so() {
        let incoming = Entry::Incoming {
            vm: "a".into(),
            uid: "u".into(),
            migration: "m".into(),
            epoch: 1,
        };
        let prepared = Entry::Prepared {
            uid: "u".into(),
            migration: "m".into(),
            epoch: 2,
            grant: None,
        };
        let owned = Entry::Owned {
            uid: "u".into(),
            migration: "m".into(),
            epoch: 2,
        };
        let aborted = Entry::Aborted {
            uid: "u".into(),
            migration: "m".into(),
        };
        let ask = |entries: &[Entry]| destination(entries, None, "m");
        let died = |prepared| Some(DestinationStands::Died { prepared });
        assert_eq!(ask(&[]), None);
        assert_eq!(ask(std::slice::from_ref(&incoming)), died(false));
        assert_eq!(ask(&[incoming.clone(), prepared.clone()]), died(true));
        assert_eq!(
            ask(&[incoming.clone(), prepared.clone(), aborted]),
            died(false)
        );
        assert_eq!(
            ask(&[incoming, prepared, owned]),
            Some(DestinationStands::Completed)
        );
    }
}
