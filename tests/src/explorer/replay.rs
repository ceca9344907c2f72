//! Journals of real runs, explained by the machines: could the protocol have written this?
//!
//! A journal is read with production's decoder and folded with production's rules. Beyond that, the
//! machines must be able to ask for its entries in that order. They are run over everything that
//! could have happened to them (every input, in every order): an entry is explained when, in one of
//! the states that can be reached, writing it is the next action.
//!
//! Journals of one fleet are then compared: an epoch is owned by one process at a time, and only
//! after another gave it away.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    hash::Hash,
    path::{Path, PathBuf},
};

use slat_record::journal::{Entry, contents};
use slat_vmm::handover::protocol::{
    Settled, Why, Written,
    destination::{self, Decision, Destination, Standing},
    source::{self, Source},
};

/// A machine with the actions that it has asked for and that are not carried out.
type Running<M, A> = (M, VecDeque<A>);

/// Every state that a machine can be in, given what it has written so far.
struct Possible<M, A>(HashSet<Running<M, A>>);

impl<M: Clone + Eq + Hash, A: Clone + Eq + Hash> Possible<M, A> {
    /// All that can follow without a journal being written.
    fn spread(&mut self, inputs: &[impl Fn(&mut M) -> Vec<A>], writes: impl Fn(&A) -> bool) {
        let mut work: Vec<Running<M, A>> = self.0.iter().cloned().collect();
        while let Some((machine, queue)) = work.pop() {
            let mut next = Vec::new();
            match queue.front() {
                Some(action) if writes(action) => {}
                Some(_) => {
                    let mut queue = queue.clone();
                    queue.pop_front();
                    next.push((machine.clone(), queue));
                }
                None => {}
            }
            // The queue of a machine that goes on being fed is bounded: what was asked for is
            // carried out before more than a few inputs have come.
            if queue.len() < 8 {
                for input in inputs {
                    let (mut machine, mut queue) = (machine.clone(), queue.clone());
                    queue.extend(input(&mut machine));
                    next.push((machine, queue));
                }
            }
            for state in next {
                if self.0.insert(state.clone()) {
                    work.push(state);
                }
            }
        }
    }

    /// Those whose next action is `action`, with it carried out and durable.
    fn write(&mut self, action: &A, feed: impl Fn(&mut M) -> Vec<A>) -> bool {
        self.0 = self
            .0
            .drain()
            .filter_map(|(mut machine, mut queue)| {
                (queue.pop_front().as_ref() == Some(action)).then(|| {
                    queue.extend(feed(&mut machine));
                    (machine, queue)
                })
            })
            .collect();
        !self.0.is_empty()
    }
}

type Feed<M, A> = Box<dyn Fn(&mut M) -> Vec<A>>;

fn source_inputs() -> Vec<Feed<Source, source::Action>> {
    use source::Input as I;
    let inputs = [
        I::Connected,
        I::SwitchoverDecided,
        I::StateSent,
        I::ReadyHeard,
        I::JournalSettled(Settled::Present),
        I::JournalSettled(Settled::Absent),
        I::ResumedHeard,
        I::Failed(Why::Fault),
        I::LinkLost,
        I::Cancel(Why::Cancelled),
        I::Cancel(Why::Elsewhere),
        I::Adopt,
    ];
    inputs
        .into_iter()
        .map(|input| Box::new(move |machine: &mut Source| machine.step(input)) as Feed<_, _>)
        .collect()
}

fn destination_inputs() -> Vec<Feed<Destination, destination::Action>> {
    use destination::Input as I;
    let inputs = [
        I::Populated,
        I::StateHeard,
        I::Checked,
        I::CommitHeard,
        I::AbortHeard,
        I::LinkLost,
        I::SourceSays(Standing::Relinquished),
        I::SourceSays(Standing::Ended),
        I::ControlSays(Decision::Commit),
        I::ControlSays(Decision::Abort),
        I::Tick,
        I::Failed(Why::Fault),
        I::Cancel(Why::Cancelled),
    ];
    inputs
        .into_iter()
        .map(|input| Box::new(move |machine: &mut Destination| machine.step(input)) as Feed<_, _>)
        .collect()
}

/// Whether the machines could have written these entries, in this order.
///
/// # Errors
/// The first entry that they could not have, in words.
pub fn explain(entries: &[Entry]) -> Result<(), String> {
    let mut arriving: Option<Possible<Destination, destination::Action>> = None;
    let mut leaving: Option<Possible<Source, source::Action>> = None;
    for (at, entry) in entries.iter().enumerate() {
        let unexplained = || format!("entry {}: {entry:?}", at + 1);
        let explained = match entry {
            Entry::Created { .. } => at == 0,
            Entry::Incoming { .. } => {
                arriving = Some(Possible(HashSet::from([(
                    Destination::new(),
                    VecDeque::new(),
                )])));
                at == 0
            }
            Entry::Prepared { .. } | Entry::Owned { .. } | Entry::Aborted { .. } => arriving
                .as_mut()
                .is_some_and(|possible| destination_writes(possible, entry)),
            Entry::Relinquished { .. } => {
                // A source begins anew with each migration.
                let possible =
                    leaving.insert(Possible(HashSet::from([(Source::new(), VecDeque::new())])));
                let (action, input) = (
                    source::Action::JournalRelinquished,
                    source::Input::Journalled(Written::Durable),
                );
                source_writes(possible, action, input)
            }
            Entry::Adopted { .. } => leaving.as_mut().is_some_and(|possible| {
                let (action, input) = (
                    source::Action::JournalAdopted,
                    source::Input::AdoptionWritten(Written::Durable),
                );
                source_writes(possible, action, input)
            }),
            Entry::Ended { .. } => true,
        };
        if !explained {
            return Err(unexplained());
        }
    }
    Ok(())
}

fn destination_writes(
    possible: &mut Possible<Destination, destination::Action>,
    entry: &Entry,
) -> bool {
    use destination::{Action as A, Input as I};
    let writes = |action: &A| {
        matches!(
            action,
            A::JournalPrepared | A::JournalOwned | A::JournalAborted
        )
    };
    possible.spread(&destination_inputs(), writes);
    let (action, input) = match entry {
        Entry::Prepared { .. } => (A::JournalPrepared, I::PreparedWritten(Written::Durable)),
        Entry::Owned { .. } => (A::JournalOwned, I::OwnedWritten(Written::Durable)),
        _ => (A::JournalAborted, I::AbortedWritten),
    };
    possible.write(&action, |machine| machine.step(input))
}

fn source_writes(
    possible: &mut Possible<Source, source::Action>,
    action: source::Action,
    input: source::Input,
) -> bool {
    use source::Action as A;
    let writes = |action: &A| matches!(action, A::JournalRelinquished | A::JournalAdopted);
    possible.spread(&source_inputs(), writes);
    possible.write(&action, |machine| machine.step(input))
}

/// A journal, and the directory it was written in: a rewritten one has the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Host and VM.
    pub place: String,
    /// The file.
    pub path: PathBuf,
}

/// Adds `path`, or every journal in it and in its folders.
///
/// # Errors
/// When a folder cannot be read.
pub fn collect(path: &Path, journals: &mut Vec<Kept>) -> std::io::Result<()> {
    if !path.is_dir() {
        journals.push(Kept {
            place: path.display().to_string(),
            path: path.to_owned(),
        });
        return Ok(());
    }
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        let is_journal = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("journal"));
        if path.is_dir() || is_journal {
            collect(&path, journals)?;
        }
    }
    Ok(())
}

/// Reads and explains every journal, and compares those of one VM. Returns how many there were.
///
/// # Errors
/// What cannot be explained, each with its file.
pub fn replay(journals: &[Kept]) -> Result<usize, String> {
    replay_with_fences(journals, &BTreeSet::new())
}

/// The same, where a fence may have decided for the destinations of these VMs, by their uids: then
/// no journal gave away what they own.
///
/// # Errors
/// As [`replay`].
pub fn replay_with_fences(journals: &[Kept], fenced: &BTreeSet<String>) -> Result<usize, String> {
    let mut faults = Vec::new();
    // By place and first entry: a journal that was settled is a new file with the same beginning.
    let mut read: BTreeMap<(&str, String), (&Path, Vec<Entry>)> = BTreeMap::new();
    for Kept { place, path } in journals {
        match contents(path) {
            Err(error) => faults.push(error.to_string()),
            Ok(contents) => {
                if let Err(fault) = explain(&contents.entries) {
                    faults.push(format!("{}: {fault}", path.display()));
                }
                let Some(first) = contents.entries.first() else {
                    continue;
                };
                let key = (place.as_str(), format!("{first:?}"));
                let known = read.get(&key).map_or(0, |(_, entries)| entries.len());
                if known < contents.entries.len() {
                    read.insert(key, (path, contents.entries));
                }
            }
        }
    }
    let count = read.len();
    let mut by_uid: BTreeMap<String, Vec<(&Path, Vec<Entry>)>> = BTreeMap::new();
    for (path, entries) in read.into_values() {
        let uid = entries.first().map_or("", Entry::uid).to_owned();
        by_uid.entry(uid).or_default().push((path, entries));
    }
    for (uid, journals) in &by_uid {
        faults.extend(compare(uid, journals, fenced.contains(uid)));
    }
    if faults.is_empty() {
        Ok(count)
    } else {
        Err(faults.join("\n"))
    }
}

/// One VM's journals: who owned which epoch, and who had given the one before away.
fn compare(uid: &str, journals: &[(&Path, Vec<Entry>)], fenced: bool) -> Vec<String> {
    let mut faults = Vec::new();
    let mut owned: BTreeMap<u64, &Path> = BTreeMap::new();
    let mut given: BTreeMap<(u64, &str), &Path> = BTreeMap::new();
    for (path, entries) in journals {
        for entry in entries {
            match entry {
                Entry::Created { epoch, .. }
                | Entry::Owned { epoch, .. }
                | Entry::Adopted { epoch, .. } => {
                    if let Some(other) = owned.insert(*epoch, path) {
                        faults.push(format!(
                            "{uid}: epoch {epoch} is owned by {} and {}",
                            other.display(),
                            path.display()
                        ));
                    }
                }
                Entry::Relinquished {
                    epoch, migration, ..
                } => drop(given.insert((*epoch, migration), path)),
                _ => {}
            }
        }
    }
    for (path, entries) in journals {
        for entry in entries {
            if let Entry::Owned {
                epoch, migration, ..
            } = entry
                && !fenced
                && !given.contains_key(&(epoch - 1, migration))
            {
                faults.push(format!(
                    "{uid}: {} owns epoch {epoch} by {migration}, and no journal gave epoch {} away by it",
                    path.display(),
                    epoch - 1
                ));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incoming() -> Entry {
        Entry::Incoming {
            vm: "v".into(),
            uid: "u".into(),
            migration: "m".into(),
            epoch: 1,
        }
    }

    fn prepared() -> Entry {
        Entry::Prepared {
            uid: "u".into(),
            migration: "m".into(),
            epoch: 2,
            grant: None,
        }
    }

    fn owned() -> Entry {
        Entry::Owned {
            uid: "u".into(),
            migration: "m".into(),
            epoch: 2,
        }
    }

    fn created() -> Entry {
        Entry::Created {
            vm: "v".into(),
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

    fn adopted() -> Entry {
        Entry::Adopted {
            uid: "u".into(),
            epoch: 3,
        }
    }

    #[test]
    fn what_the_machines_write_is_explained() {
        explain(&[incoming(), prepared(), owned()]).unwrap();
        explain(&[created(), relinquished()]).unwrap();
        let aborted = Entry::Aborted {
            uid: "u".into(),
            migration: "m".into(),
        };
        explain(&[created(), relinquished(), adopted()]).unwrap();
        explain(&[incoming(), aborted.clone()]).unwrap();
        explain(&[incoming(), prepared(), aborted]).unwrap();
    }

    #[test]
    fn what_they_never_write_is_not() {
        assert!(explain(&[incoming(), owned()]).is_err());
        assert!(explain(&[incoming(), prepared(), prepared()]).is_err());
        assert!(explain(&[created(), prepared()]).is_err());
        assert!(explain(&[created(), adopted()]).is_err());
        assert!(explain(&[created(), relinquished(), adopted(), adopted()]).is_err());
    }

    #[test]
    fn an_epoch_that_nobody_gave_away_is_not_owned() {
        let dir = slat_test_dir::TestDir::new();
        let write = |name: &str, entries: &[Entry]| {
            let path = dir.path().join(name);
            let mut journal = slat_record::journal::Journal::open(&path).unwrap();
            for entry in entries {
                journal.append(entry).unwrap();
            }
            Kept {
                place: name.to_owned(),
                path,
            }
        };
        let arrived = write("there", &[incoming(), prepared(), owned()]);
        let kept = write("kept", &[created()]);
        let gave = write("gave", &[created(), relinquished()]);
        assert_eq!(replay(&[arrived.clone(), gave.clone()]).unwrap(), 2);
        let fault = replay(&[arrived.clone(), kept]).unwrap_err();
        assert!(fault.contains("no journal gave epoch 1 away"), "{fault}");
        let mut again = arrived.clone();
        assert_eq!(
            replay(&[arrived.clone(), again.clone(), gave.clone()]).unwrap(),
            2
        );
        // An operator's order does not make two owners of one epoch.
        let back = write("back", &[created(), relinquished(), adopted()]);
        assert_eq!(replay(&[arrived.clone(), back.clone()]).unwrap(), 2);
        let mut twin = back.clone();
        twin.place = "twin".to_owned();
        let twice = replay(&[arrived.clone(), back, twin]).unwrap_err();
        assert!(twice.contains("epoch 3 is owned by"), "{twice}");
        again.place = "elsewhere".to_owned();
        let twice = replay(&[arrived, again, gave]).unwrap_err();
        assert!(twice.contains("epoch 2 is owned by"), "{twice}");
    }
}
