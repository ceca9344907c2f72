//! What the entries of a journal add up to. Pure: no I/O.
//!
//! The only transitions are those of the handover, and the operator's order to take a VM back;
//! anything else is refused when it is appended and when it is read.

use super::{Entry, JournalError};

/// What a journal says about ownership.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ownership {
    /// This process may run the epoch.
    Owner {
        /// Current epoch.
        epoch: u64,
    },
    /// Receiving; never owned.
    Incoming {
        /// `{migration}`.
        migration: String,
        /// The source's epoch.
        epoch: u64,
    },
    /// READY may have been said. Only the source's journal says what happens.
    Prepared {
        /// `{migration}`.
        migration: String,
        /// The epoch the VM would have here.
        epoch: u64,
    },
    /// Given away.
    Relinquished {
        /// `{migration}`.
        migration: String,
        /// The epoch given up.
        epoch: u64,
    },
    /// The destination's side was given up.
    Aborted {
        /// `{migration}`.
        migration: String,
    },
    /// Deleted or released.
    Ended,
}

/// The state that a journal's entries add up to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct JournalState {
    /// `{vm}`.
    pub vm: String,
    /// The VM's identity.
    pub uid: String,
    /// Who may run it.
    pub ownership: Ownership,
    /// The migration that brought it here, when one did.
    pub arrived_by: Option<String>,
}

impl JournalState {
    /// The state after `entry`.
    ///
    /// # Errors
    /// `Order` when it cannot come next, or is about another VM.
    pub(super) fn after(state: Option<&Self>, entry: &Entry) -> Result<Self, JournalError> {
        let next = match state {
            None => first(entry),
            Some(state) if state.uid != entry.uid() => None,
            Some(state) => follow(&state.ownership, entry).map(|ownership| Self {
                ownership,
                ..state.clone()
            }),
        };
        next.ok_or_else(|| JournalError::Order {
            entry: format!("{entry:?}"),
            state: format!("{state:?}"),
        })
    }

    /// The state that `entries` add up to; `None` when there are none.
    ///
    /// # Errors
    /// `Order`.
    pub fn of<'a>(
        entries: impl IntoIterator<Item = &'a Entry>,
    ) -> Result<Option<Self>, JournalError> {
        let mut state = None;
        for entry in entries {
            state = Some(Self::after(state.as_ref(), entry)?);
        }
        Ok(state)
    }
}

fn first(entry: &Entry) -> Option<JournalState> {
    match entry {
        Entry::Created { vm, uid, epoch } => Some(JournalState {
            vm: vm.clone(),
            uid: uid.clone(),
            ownership: Ownership::Owner { epoch: *epoch },
            arrived_by: None,
        }),
        Entry::Incoming {
            vm,
            uid,
            migration,
            epoch,
        } => Some(JournalState {
            vm: vm.clone(),
            uid: uid.clone(),
            ownership: Ownership::Incoming {
                migration: migration.clone(),
                epoch: *epoch,
            },
            arrived_by: Some(migration.clone()),
        }),
        _ => None,
    }
}

fn follow(now: &Ownership, entry: &Entry) -> Option<Ownership> {
    match (now, entry) {
        (
            Ownership::Owner { epoch },
            Entry::Relinquished {
                migration,
                epoch: given,
                ..
            },
        ) if epoch == given => Some(Ownership::Relinquished {
            migration: migration.clone(),
            epoch: *epoch,
        }),
        (
            Ownership::Incoming { migration, epoch },
            Entry::Prepared {
                migration: of,
                epoch: next,
                ..
            },
        ) if migration == of && Some(*next) == epoch.checked_add(1) => Some(Ownership::Prepared {
            migration: migration.clone(),
            epoch: *next,
        }),
        (
            Ownership::Prepared { migration, epoch },
            Entry::Owned {
                migration: of,
                epoch: next,
                ..
            },
        ) if migration == of && epoch == next => Some(Ownership::Owner { epoch: *epoch }),
        (
            Ownership::Incoming { migration, .. } | Ownership::Prepared { migration, .. },
            Entry::Aborted { migration: of, .. },
        ) if migration == of => Some(Ownership::Aborted {
            migration: migration.clone(),
        }),
        // The destination would have had the epoch after the one given away: never that one.
        (
            Ownership::Relinquished { epoch, .. },
            Entry::Adopted {
                epoch: next_epoch, ..
            },
        ) if epoch
            .checked_add(1)
            .is_some_and(|theirs| theirs < *next_epoch) =>
        {
            Some(Ownership::Owner { epoch: *next_epoch })
        }
        (_, Entry::Ended { .. }) => Some(Ownership::Ended),
        _ => None,
    }
}
