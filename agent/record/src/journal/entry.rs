//! The entries of a journal.

use serde::{Deserialize, Serialize};

/// By which of the server's grants a step of a handover was taken.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantMark {
    /// Its id, in hexadecimal.
    pub id: String,
    /// SHA-256 of its canonical bytes, in hexadecimal.
    pub digest: String,
}

/// One entry. Migrations are given by their id, without the collection's prefix.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case", deny_unknown_fields)]
pub enum Entry {
    /// The VM was created here and owned from the start.
    Created {
        /// `{vm}`.
        vm: String,
        /// The VM's identity.
        uid: String,
        /// Epoch 1.
        epoch: u64,
    },
    /// The VM is to be received here; not owned.
    Incoming {
        /// `{vm}`.
        vm: String,
        /// The VM's identity.
        uid: String,
        /// `{migration}`.
        migration: String,
        /// The source's epoch.
        epoch: u64,
    },
    /// Everything has been received and verified. Not owned.
    Prepared {
        /// The VM's identity.
        uid: String,
        /// `{migration}`.
        migration: String,
        /// The epoch the VM would have here.
        epoch: u64,
        /// By which grant; an older program's journal does not say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        grant: Option<GrantMark>,
    },
    /// This process gave the VM away and may never run this epoch again.
    Relinquished {
        /// The VM's identity.
        uid: String,
        /// `{migration}`.
        migration: String,
        /// The epoch given up.
        epoch: u64,
        /// By which grant; an older program's journal does not say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        grant: Option<GrantMark>,
    },
    /// The VM is owned here from now on.
    Owned {
        /// The VM's identity.
        uid: String,
        /// `{migration}`.
        migration: String,
        /// Its epoch.
        epoch: u64,
    },
    /// The destination's side was given up; nothing is owned.
    Aborted {
        /// The VM's identity.
        uid: String,
        /// `{migration}`.
        migration: String,
    },
    /// An operator took the VM back at the process that had given it away, and said with it that no
    /// other process runs it. It is owned here from now on.
    Adopted {
        /// The VM's identity.
        uid: String,
        /// Its new epoch: above the one that the destination would have had.
        epoch: u64,
    },
    /// The VM was deleted, or the relinquished process was released.
    Ended {
        /// The VM's identity.
        uid: String,
    },
}

impl Entry {
    /// The identity of the VM it is about.
    #[must_use]
    pub fn uid(&self) -> &str {
        match self {
            Self::Created { uid, .. }
            | Self::Incoming { uid, .. }
            | Self::Prepared { uid, .. }
            | Self::Relinquished { uid, .. }
            | Self::Owned { uid, .. }
            | Self::Aborted { uid, .. }
            | Self::Adopted { uid, .. }
            | Self::Ended { uid } => uid,
        }
    }
}
