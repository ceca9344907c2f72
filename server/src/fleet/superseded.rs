//! VMs that are another host's by now: their host shows them at an epoch below one that was seen.
//!
//! It happens when an operator takes a VM back, and its last owner, which was given up, is still
//! there or comes back: dead as a rule, alive in the worst case, and then the VM runs twice. No
//! list of VMs shows them, since the newer record counts. They are leftovers of their host: shown
//! there, and deleted by uid there, which touches no other host.
//!
//! A report may have been composed before its VM went elsewhere, so one report alone says nothing.
//! Plain data.

use std::collections::BTreeMap;

use slat_proto::v1::{self, leftover::Kind};

use super::{epochs::Epochs, rank::lives, records::Records};

/// So many reports in a row must show a VM below its epoch.
const REPORTS: u32 = 2;

/// Those of one host.
#[derive(Debug, Default)]
pub(super) struct Superseded(BTreeMap<String, u32>);

impl Superseded {
    /// Takes in what a report left in `records`.
    pub(super) fn report(&mut self, records: &Records, epochs: &Epochs) {
        let before = std::mem::take(&mut self.0);
        for record in records.iter().filter(|record| epochs.undercut(&record.vm)) {
            let vm = &record.vm;
            let times = before.get(&vm.uid).copied().unwrap_or(0).saturating_add(1);
            if times == REPORTS && lives(vm) {
                tracing::error!(host = %vm.host, vm = %vm.name, uid = %vm.uid, epoch = vm.epoch,
                    newer = epochs.of(&vm.uid), state = vm.state().as_str_name(),
                    "a VM that was taken over at a newer epoch is still there: it may run twice");
            }
            self.0.insert(vm.uid.clone(), times);
        }
    }

    /// Whether a record is a leftover.
    pub(super) fn has(&self, uid: &str) -> bool {
        self.0.get(uid).is_some_and(|times| *times >= REPORTS)
    }

    /// Drops what its agent just said is gone.
    pub(super) fn forget(&mut self, uid: &str) {
        self.0.remove(uid);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.values().filter(|times| **times >= REPORTS).count()
    }

    /// As they are listed.
    pub(super) fn list<'a>(
        &'a self,
        records: &'a Records,
        epochs: &'a Epochs,
    ) -> impl Iterator<Item = v1::Leftover> + 'a {
        let those = records.iter().filter(|record| self.has(&record.vm.uid));
        those.map(|record| leftover(&record.vm, epochs.of(&record.vm.uid)))
    }
}

fn leftover(vm: &v1::Vm, newer: u64) -> v1::Leftover {
    let state = vm.state().as_str_name().trim_start_matches("STATE_");
    let dead = vm.state() == v1::vm::State::Lost;
    let twice = if dead { "" } else { "; it may run twice" };
    v1::Leftover {
        host: vm.host.clone(),
        uid: vm.uid.clone(),
        vm: vm.name.clone(),
        kind: Kind::SupersededVm.into(),
        migration: String::new(),
        epoch: vm.epoch,
        pid: vm.pid,
        memory_bytes: vm.spec.as_ref().map_or(0, |spec| spec.memory_bytes),
        message: format!(
            "a VM ({state}) that was taken over elsewhere: it is at epoch {} here, and epoch {newer} was seen{twice}",
            vm.epoch
        ),
        adoptable: false,
        adopt_gives_up: String::new(),
        delete_gives_up: if dead {
            String::new()
        } else {
            format!(
                "what its guest did here since epoch {} began is in no newer copy of it",
                vm.epoch
            )
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use slat_proto::{model::now, v1::vm::State};

    use super::*;

    fn records(epoch: u64, state: State) -> Records {
        let mut records = Records::default();
        let vm = v1::Vm {
            name: "vms/web".into(),
            uid: "u".into(),
            epoch,
            state: state.into(),
            ..Default::default()
        };
        let second = Duration::from_secs(1);
        records.report("hosts/b", vec![vm], now(), Instant::now(), second);
        records
    }

    #[test]
    fn what_two_reports_show_below_its_epoch_is_a_leftover_until_it_is_gone() {
        let mut epochs = Epochs::default();
        epochs.raise("u", 3);
        let (old, mut superseded) = (records(2, State::Lost), Superseded::default());
        superseded.report(&old, &epochs);
        assert_eq!(superseded.len(), 0, "the report may have crossed");
        superseded.report(&old, &epochs);
        let listed: Vec<_> = superseded.list(&old, &epochs).collect();
        assert_eq!(listed.len(), 1);
        let left = &listed[0];
        assert_eq!((left.kind(), left.epoch), (Kind::SupersededVm, 2));
        assert!(left.delete_gives_up.is_empty() && !left.adoptable);
        assert!(!left.message.contains("twice"), "{}", left.message);
        superseded.report(&records(3, State::Running), &epochs);
        assert_eq!(superseded.len(), 0);
    }

    #[test]
    fn one_that_lives_gives_something_up_and_a_side_is_none() {
        let mut epochs = Epochs::default();
        epochs.raise("u", 3);
        let (old, mut superseded) = (records(2, State::Running), Superseded::default());
        superseded.report(&old, &epochs);
        superseded.report(&old, &epochs);
        let left = superseded.list(&old, &epochs).next().unwrap();
        assert!(!left.delete_gives_up.is_empty());
        assert!(left.message.contains("may run twice"), "{}", left.message);
        let side = records(2, State::Relinquished);
        superseded.report(&side, &epochs);
        superseded.report(&side, &epochs);
        assert_eq!(superseded.len(), 0);
    }
}
