//! One host's records of VMs, by uid: what its agent reported last, and what it answered since.
//! Plain data; time comes in.
//!
//! # Reports and answers cross
//! A report is composed before it arrives. What an agent answered to us meanwhile (a VM made or
//! deleted) holds for one interval against reports that do not know it yet.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use slat_proto::{
    model::{VmName, is_uid},
    v1,
};

use super::rank::{Seen, may_run};

/// One VM, or one side of a migration, at one host.
#[derive(Clone, Debug)]
pub(super) struct VmRecord {
    /// With its host and the time it was seen.
    pub(super) vm: v1::Vm,
    /// When an agent's answer, not a report, brought it.
    answered: Option<Instant>,
    /// It was in the host's last report, so its memory is in the host's figure.
    pub(super) counted: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Records {
    vms: BTreeMap<String, VmRecord>,
    deleted: HashMap<String, Instant>,
}

/// What is stored of a record: whether two are the same to the store.
fn same_to_store(a: &v1::Vm, b: &v1::Vm) -> bool {
    (&a.name, a.epoch, a.state, &a.spec, &a.create_time)
        == (&b.name, b.epoch, b.state, &b.spec, &b.create_time)
}

/// A VM as an agent shows it, made fit to be kept: nothing unchecked reaches names, labels or
/// pages. `None` when it has no name or no identity.
fn checked(host: &str, seen: prost_types::Timestamp, mut vm: v1::Vm) -> Option<v1::Vm> {
    if !is_uid(&vm.uid) {
        return None;
    }
    vm.name = VmName::parse(&vm.name).ok()?.to_string();
    host.clone_into(&mut vm.host);
    vm.last_seen_time = Some(seen);
    // The server's own to say.
    vm.conflicts.clear();
    vm.stale = false;
    vm.kept_by_server = false;
    Some(vm)
}

impl Records {
    pub(super) fn iter(&self) -> impl Iterator<Item = &VmRecord> {
        self.vms.values()
    }

    pub(super) fn get(&self, uid: &str) -> Option<&v1::Vm> {
        self.vms.get(uid).map(|record| &record.vm)
    }

    pub(super) fn len(&self) -> usize {
        self.vms.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }

    /// As it was when the server stopped.
    pub(super) fn restore(&mut self, vm: v1::Vm) {
        let record = VmRecord {
            vm,
            answered: None,
            counted: true,
        };
        self.vms.insert(record.vm.uid.clone(), record);
    }

    /// Takes a report in. Answers with the uids that the store does not have so yet, and with the
    /// number of VMs that could not be kept.
    pub(super) fn report(
        &mut self,
        host: &str,
        vms: Vec<v1::Vm>,
        seen: prost_types::Timestamp,
        at: Instant,
        interval: Duration,
    ) -> (Vec<String>, usize) {
        let recent = |since: Instant| at.saturating_duration_since(since) <= interval;
        self.deleted.retain(|_, since| recent(*since));
        let reported = vms.len();
        let mut new: BTreeMap<String, VmRecord> = BTreeMap::new();
        let mut kept = 0;
        for vm in vms.into_iter().filter_map(|vm| checked(host, seen, vm)) {
            kept += 1;
            if self.deleted.contains_key(&vm.uid) {
                continue;
            }
            let seen = |vm| Seen { vm, ready: true };
            // A VM that came back to a host which still has its old side.
            let hidden = new
                .get(&vm.uid)
                .is_some_and(|other| !seen(&vm).outranks(&seen(&other.vm)));
            if !hidden {
                let record = VmRecord {
                    vm,
                    answered: None,
                    counted: true,
                };
                new.insert(record.vm.uid.clone(), record);
            }
        }
        let old = std::mem::take(&mut self.vms);
        let mut changed: Vec<String> = Vec::new();
        for (uid, record) in &new {
            let same = old
                .get(uid)
                .is_some_and(|known| same_to_store(&known.vm, &record.vm));
            if !same {
                changed.push(uid.clone());
            }
        }
        for (uid, record) in old {
            if new.contains_key(&uid) {
                continue;
            }
            if record.vm.kept_by_server || record.answered.is_some_and(recent) {
                new.insert(uid, record);
            } else {
                changed.push(uid);
            }
        }
        self.vms = new;
        (changed, reported - kept)
    }

    /// Keeps what the agent just answered. The uid, when the store does not have it so yet.
    pub(super) fn observe(
        &mut self,
        host: &str,
        vm: v1::Vm,
        seen: prost_types::Timestamp,
        at: Instant,
    ) -> Option<String> {
        let vm = checked(host, seen, vm)?;
        let uid = vm.uid.clone();
        self.deleted.remove(&uid);
        let known = self.vms.get(&uid);
        let same = known.is_some_and(|known| same_to_store(&known.vm, &vm));
        let counted = known.is_some_and(|known| known.counted);
        let record = VmRecord {
            vm,
            answered: Some(at),
            counted,
        };
        self.vms.insert(uid.clone(), record);
        (!same).then_some(uid)
    }

    /// Keeps a lost VM of which its host has nothing, whatever the host reports, until it is
    /// deleted or comes back.
    pub(super) fn bury(&mut self, vm: v1::Vm) {
        self.deleted.remove(&vm.uid);
        let record = VmRecord {
            vm: v1::Vm {
                kept_by_server: true,
                ..vm
            },
            answered: None,
            counted: true,
        };
        self.vms.insert(record.vm.uid.clone(), record);
    }

    /// Keeps a VM that must be here although its host has not said so, until the host reports. It
    /// takes the place of its side, which is all that the host had said. Whether that is news.
    pub(super) fn expect(&mut self, vm: v1::Vm) -> bool {
        let known = self.get(&vm.uid);
        let newer = known.is_some_and(|known| may_run(known) && known.epoch >= vm.epoch);
        if newer || self.deleted.contains_key(&vm.uid) {
            return false;
        }
        let record = VmRecord {
            vm,
            answered: None,
            counted: false,
        };
        self.vms.insert(record.vm.uid.clone(), record);
        true
    }

    /// Nothing here runs any more: what might have is LOST, and says why, until its host reports
    /// again. The uids of what changed by that. Sides stay as they were: their journals say what
    /// they are.
    pub(super) fn end(&mut self, why: &str) -> Vec<String> {
        let ran = |record: &&mut VmRecord| may_run(&record.vm) && !record.vm.kept_by_server;
        let lost = v1::vm::State::Lost;
        let mut ended = Vec::new();
        for record in self.vms.values_mut().filter(ran) {
            if record.vm.state() != lost {
                record.vm.state = lost.into();
                why.clone_into(&mut record.vm.state_message);
                record.vm.pid = 0;
                ended.push(record.vm.uid.clone());
            }
        }
        ended
    }

    /// Drops what the agent just said is gone. Whether there was such a record.
    pub(super) fn forget(&mut self, uid: &str, at: Instant) -> bool {
        if self.vms.remove(uid).is_none() {
            return false;
        }
        self.deleted.insert(uid.to_owned(), at);
        true
    }
}
