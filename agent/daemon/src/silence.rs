//! A VM whose process does not answer, as its journal has it.
//!
//! What the process last said may be long past: it was stopped, or an agent found it silent and
//! knows no more than what was once written beside its journal. Its journal is the truth about who
//! may run the VM, so state, epoch and migration are the journal's; what was seen before adds what
//! never changes. Counters are left out: nobody knows them.
//!
//! | the journal says | shown as |
//! |---|---|
//! | it owns the VM | UNRESPONSIVE |
//! | it receives, or may have said READY, or gave up receiving | INCOMING |
//! | it gave the VM away | RELINQUISHED |
//! | it is over | nothing, or RELINQUISHED when it was so |
//! | nothing that can be read | as it was seen, and UNRESPONSIVE where it was seen to own the VM |

use slat_proto::{
    model::{HostName, MigrationName, VmName},
    v1::{self, vm::State},
};
use slat_record::{
    dir::VmDir,
    journal::{Journal, Ownership},
};

/// A silent process.
#[derive(Debug)]
pub(super) struct Silent<'a> {
    pub(super) name: &'a VmName,
    pub(super) host: &'a HostName,
    pub(super) pid: u32,
    /// What is wrong with it, and since when.
    pub(super) message: String,
}

/// What a silent VM is shown as.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Standing {
    pub(super) vm: Option<v1::Vm>,
    /// Its journal says that it owns its VM.
    pub(super) owns: bool,
}

impl Silent<'_> {
    /// Reads the journal; `seen` is the last that was known. Blocks on the disk.
    pub(super) fn standing(self, dir: &VmDir, seen: Option<&v1::Vm>) -> Standing {
        let journal = Journal::read(&dir.journal());
        let seen_state = seen.map_or(State::Unspecified, v1::Vm::state);
        let seen_epoch = seen.map_or(0, |vm| vm.epoch);
        let moves = |migration: &str| {
            MigrationName::parse(migration).map_or_else(|_| String::new(), |name| name.to_string())
        };
        let seen_migration = || seen.map_or_else(String::new, |vm| vm.migration.clone());
        let (state, epoch, migration) = match journal.as_ref().map(Option::as_ref) {
            Ok(Some(journal)) => match &journal.ownership {
                Ownership::Owner { epoch } => {
                    // What it was part of at an earlier epoch is past.
                    let same = *epoch == seen_epoch && seen_state != State::Incoming;
                    let migration = if same {
                        seen_migration()
                    } else {
                        String::new()
                    };
                    (State::Unresponsive, *epoch, migration)
                }
                Ownership::Incoming { migration, epoch } => {
                    (State::Incoming, *epoch, moves(migration))
                }
                // It shows its source's epoch until it owns the next.
                Ownership::Prepared { migration, epoch } => {
                    (State::Incoming, epoch.saturating_sub(1), moves(migration))
                }
                Ownership::Aborted { migration } => (State::Incoming, seen_epoch, moves(migration)),
                Ownership::Relinquished { migration, epoch } => {
                    (State::Relinquished, *epoch, moves(migration))
                }
                Ownership::Ended if seen_state == State::Relinquished => {
                    (State::Relinquished, seen_epoch, seen_migration())
                }
                Ownership::Ended => return Standing::default(),
            },
            Ok(None) => return Standing::default(),
            Err(_) if matches!(seen_state, State::Incoming | State::Relinquished) => {
                (seen_state, seen_epoch, seen_migration())
            }
            Err(_) => (State::Unresponsive, seen_epoch, seen_migration()),
        };
        let mut message = self.message;
        if let Err(error) = &journal {
            message.push_str("; ");
            message.push_str(&error.to_string());
        }
        let uid = match &journal {
            Ok(Some(journal)) => journal.uid.clone(),
            _ => seen.map_or_else(String::new, |vm| vm.uid.clone()),
        };
        let vm = v1::Vm {
            name: self.name.to_string(),
            uid,
            host: self.host.to_string(),
            state: state.into(),
            state_message: message,
            epoch,
            migration,
            pid: self.pid,
            mmu_stats: None,
            guest_counters: None,
            ..seen.cloned().unwrap_or_default()
        };
        Standing {
            vm: Some(vm),
            owns: state == State::Unresponsive && journal.is_ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slat_record::journal::Entry;

    /// What is shown after `entries`, when the VM was last seen in `state` at epoch 1.
    fn shown(entries: &[Entry], state: State) -> Option<(State, u64, String)> {
        let folder = slat_test_dir::TestDir::new();
        let dir = VmDir::new(folder.path());
        let mut journal = Journal::open(&dir.journal()).unwrap();
        for entry in entries {
            journal.append(entry).unwrap();
        }
        let seen = v1::Vm {
            uid: "u".into(),
            epoch: 1,
            state: state.into(),
            migration: "migrations/m".into(),
            ..Default::default()
        };
        let silent = Silent {
            name: &VmName::parse("web").unwrap(),
            host: &HostName::parse("a").unwrap(),
            pid: 7,
            message: "silent".into(),
        };
        let vm = silent.standing(&dir, Some(&seen)).vm?;
        assert_eq!((vm.uid.as_str(), vm.pid), ("u", 7));
        Some((vm.state(), vm.epoch, vm.migration))
    }

    #[test]
    fn the_journal_decides_and_not_what_was_once_seen() {
        let uid = || "u".to_owned();
        let migration = || "m".to_owned();
        let created = Entry::Created {
            vm: "web".into(),
            uid: uid(),
            epoch: 1,
        };
        let incoming = Entry::Incoming {
            vm: "web".into(),
            uid: uid(),
            migration: migration(),
            epoch: 1,
        };
        let prepared = Entry::Prepared {
            uid: uid(),
            migration: migration(),
            epoch: 2,
            grant: None,
        };
        let owned = Entry::Owned {
            uid: uid(),
            migration: migration(),
            epoch: 2,
        };
        let relinquished = Entry::Relinquished {
            uid: uid(),
            migration: migration(),
            epoch: 1,
            grant: None,
        };
        let ended = Entry::Ended { uid: uid() };
        let m = || "migrations/m".to_owned();
        let received = [incoming.clone(), prepared.clone(), owned];
        assert_eq!(
            shown(&received, State::Incoming),
            Some((State::Unresponsive, 2, String::new()))
        );
        assert_eq!(
            shown(std::slice::from_ref(&created), State::Running),
            Some((State::Unresponsive, 1, m()))
        );
        assert_eq!(
            shown(&[incoming, prepared], State::Incoming),
            Some((State::Incoming, 1, m()))
        );
        let given = [created, relinquished];
        assert_eq!(
            shown(&given, State::Running),
            Some((State::Relinquished, 1, m()))
        );
        let [created, relinquished] = given;
        assert_eq!(shown(&[created, relinquished, ended], State::Running), None);
        assert_eq!(shown(&[], State::Running), None);
    }
}
