//! Hosts and VMs in memory, and the choice of a VM's owner among the records of several hosts.
//! Plain data: time comes in, locks are the caller's.
//!
//! # Whose record counts
//! A migrating VM is on two hosts. The record with the highest epoch wins; a side that may not run
//! (INCOMING, RELINQUISHED) never hides one that may. An epoch once seen for a VM's uid is never
//! undercut: a silent host's old record does not come back to life when the newer one is deleted.
//!
//! # Reports and answers cross
//! A report is composed before it arrives. What an agent answered to us meanwhile (a VM made or
//! deleted) holds for one interval against reports that do not know it yet.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, VmName, VmSpec, now},
    v1::{self, host::State as HostState, vm::State as VmState},
};

use super::{
    errors::{host_unreachable, no_such_host},
    placement::{Candidate, choose, has_backend},
};

struct VmEntry {
    vm: v1::Vm,
    /// When an agent's answer, not a report, brought it.
    answered: Option<Instant>,
    /// It was in the host's last report, so its memory is in the host's figure.
    counted: bool,
}

struct HostEntry {
    host: v1::Host,
    heard: Option<Instant>,
    reported: bool,
    vms: BTreeMap<String, VmEntry>,
    deleted: HashMap<String, (String, Instant)>,
}

impl HostEntry {
    fn new(host: v1::Host) -> Self {
        Self {
            host,
            heard: None,
            reported: false,
            vms: BTreeMap::new(),
            deleted: HashMap::new(),
        }
    }
}

struct Intent {
    host: String,
    memory_bytes: u64,
}

/// See the module.
pub(super) struct Table {
    hosts: BTreeMap<String, HostEntry>,
    /// Highest epoch seen of each uid.
    epochs: HashMap<String, u64>,
    /// VMs that are being created, by name.
    intents: HashMap<String, Intent>,
    interval: Duration,
    silence: Duration,
}

fn may_run(vm: &v1::Vm) -> bool {
    !matches!(vm.state(), VmState::Incoming | VmState::Relinquished)
}

impl Table {
    /// `silence`: a host not heard from for longer is unreachable.
    pub(super) fn new(interval: Duration, silence: Duration) -> Self {
        Self {
            hosts: BTreeMap::new(),
            epochs: HashMap::new(),
            intents: HashMap::new(),
            interval,
            silence,
        }
    }

    fn is_ready(&self, entry: &HostEntry, at: Instant) -> bool {
        entry
            .heard
            .is_some_and(|heard| at.saturating_duration_since(heard) <= self.silence)
    }

    fn show(&self, entry: &HostEntry, at: Instant) -> v1::Host {
        let mut host = entry.host.clone();
        let state = if self.is_ready(entry, at) {
            HostState::Ready
        } else {
            HostState::Unreachable
        };
        host.state = state.into();
        host.reported = entry.reported;
        host.vms = u32::try_from(entry.vms.len()).unwrap_or(u32::MAX);
        host
    }

    pub(super) fn remember(&mut self, name: &str, address: &str) {
        let host = v1::Host {
            name: name.to_owned(),
            address: address.to_owned(),
            ..Default::default()
        };
        self.hosts
            .entry(name.to_owned())
            .or_insert_with(|| HostEntry::new(host));
    }

    pub(super) fn register(&mut self, mut host: v1::Host, at: Instant) {
        host.last_seen_time = Some(now());
        let entry = self
            .hosts
            .entry(host.name.clone())
            .or_insert_with(|| HostEntry::new(v1::Host::default()));
        host.memory_used_bytes = entry.host.memory_used_bytes;
        entry.host = host;
        entry.heard = Some(at);
        entry.reported = false;
    }

    pub(super) fn report(
        &mut self,
        report: v1::ReportHostRequest,
        at: Instant,
    ) -> Result<(), ApiError> {
        let interval = self.interval;
        let stale = || {
            ApiError::new(
                Reason::StaleIncarnation,
                format!("{} is not registered with this incarnation", report.host),
            )
            .with("host", &report.host)
            .with("advice", "register again")
        };
        let entry = self.hosts.get_mut(&report.host).ok_or_else(stale)?;
        if entry.host.incarnation != report.incarnation || report.incarnation.is_empty() {
            return Err(stale());
        }
        entry.heard = Some(at);
        entry.host.last_seen_time = Some(now());
        entry.host.memory_used_bytes = report.memory_used_bytes;
        entry.reported = true;
        let recent = |since: Instant| at.saturating_duration_since(since) <= interval;
        entry.deleted.retain(|_, (_, since)| recent(*since));
        let mut vms = BTreeMap::new();
        for mut vm in report.vms {
            // Nothing unchecked reaches names, labels or pages.
            let Ok(name) = VmName::parse(&vm.name) else {
                tracing::warn!(host = %report.host, "a report names a VM that has no valid name");
                continue;
            };
            let name = name.to_string();
            if entry
                .deleted
                .get(&name)
                .is_some_and(|(uid, _)| *uid == vm.uid)
            {
                continue;
            }
            vm.name.clone_from(&name);
            vm.host.clone_from(&report.host);
            if may_run(&vm) {
                let epoch = self.epochs.entry(vm.uid.clone()).or_default();
                *epoch = vm.epoch.max(*epoch);
            }
            let entry = VmEntry {
                vm,
                answered: None,
                counted: true,
            };
            vms.insert(name, entry);
        }
        for (name, old) in std::mem::take(&mut entry.vms) {
            if old.answered.is_some_and(recent) {
                vms.entry(name).or_insert(old);
            }
        }
        entry.vms = vms;
        let alive: HashSet<&str> = self
            .hosts
            .values()
            .flat_map(|host| host.vms.values())
            .map(|entry| entry.vm.uid.as_str())
            .collect();
        self.epochs.retain(|uid, _| alive.contains(uid.as_str()));
        Ok(())
    }

    pub(super) fn hosts(&self, at: Instant) -> Vec<v1::Host> {
        self.hosts
            .values()
            .map(|entry| self.show(entry, at))
            .collect()
    }

    pub(super) fn host(&self, name: &str, at: Instant) -> Option<v1::Host> {
        self.hosts.get(name).map(|entry| self.show(entry, at))
    }

    pub(super) fn unreported(&self, at: Instant) -> Vec<String> {
        let fresh = |entry: &&HostEntry| !entry.reported && self.is_ready(entry, at);
        self.hosts
            .values()
            .filter(fresh)
            .map(|entry| entry.host.name.clone())
            .collect()
    }

    /// The better of two records of one VM name.
    fn rank(&self, entry: &HostEntry, vm: &v1::Vm, at: Instant) -> (bool, u64, bool) {
        (may_run(vm), vm.epoch, self.is_ready(entry, at))
    }

    fn undercut(&self, vm: &v1::Vm) -> bool {
        self.epochs
            .get(&vm.uid)
            .is_some_and(|epoch| may_run(vm) && vm.epoch < *epoch)
    }

    pub(super) fn vm(&self, name: &str, at: Instant) -> Option<v1::Vm> {
        let mut best: Option<(&HostEntry, &v1::Vm)> = None;
        for entry in self.hosts.values() {
            let Some(VmEntry { vm, .. }) = entry.vms.get(name) else {
                continue;
            };
            if self.undercut(vm) {
                continue;
            }
            let better = best.is_none_or(|(other, known)| {
                self.rank(entry, vm, at) > self.rank(other, known, at)
            });
            if better {
                best = Some((entry, vm));
            }
        }
        best.map(|(_, vm)| vm.clone())
    }

    pub(super) fn vms(&self, at: Instant) -> Vec<v1::Vm> {
        let names: BTreeSet<&String> = self
            .hosts
            .values()
            .flat_map(|entry| entry.vms.keys())
            .collect();
        names
            .into_iter()
            .filter_map(|name| self.vm(name, at))
            .collect()
    }

    pub(super) fn reserve(
        &mut self,
        vm: &VmName,
        spec: &VmSpec,
        wanted: Option<&HostName>,
        at: Instant,
    ) -> Result<String, ApiError> {
        let name = vm.to_string();
        let holder = self
            .hosts
            .values()
            .find(|entry| entry.vms.contains_key(&name))
            .map(|entry| entry.host.name.clone())
            .or_else(|| self.intents.get(&name).map(|intent| intent.host.clone()));
        if let Some(host) = holder {
            return Err(ApiError::new(
                Reason::VmExists,
                format!("{name} exists already, on {host}"),
            )
            .with("vm", &name)
            .with("host", host));
        }
        let host = match wanted {
            Some(wanted) => {
                let wanted = wanted.to_string();
                let entry = self
                    .hosts
                    .get(&wanted)
                    .ok_or_else(|| no_such_host(&wanted))?;
                if !self.is_ready(entry, at) {
                    return Err(host_unreachable(&wanted));
                }
                if !has_backend(&entry.host, spec.backend) {
                    let backend = spec
                        .backend
                        .map_or_else(|| "any".to_owned(), |kind| kind.to_string());
                    return Err(ApiError::new(
                        Reason::CapabilityMissing,
                        format!(
                            "{wanted} has no backend {backend}: {}",
                            entry.host.backend_message
                        ),
                    )
                    .with("host", wanted)
                    .with("capability", backend));
                }
                wanted
            }
            None => {
                let candidates: Vec<Candidate<'_>> = self
                    .hosts
                    .values()
                    .filter(|entry| self.is_ready(entry, at))
                    .map(|entry| Candidate {
                        host: &entry.host,
                        free: self.free(entry),
                    })
                    .collect();
                choose(&candidates, spec)?.name.clone()
            }
        };
        let intent = Intent {
            host: host.clone(),
            memory_bytes: spec.memory_bytes,
        };
        self.intents.insert(name, intent);
        Ok(host)
    }

    fn free(&self, entry: &HostEntry) -> u64 {
        let reserved: u64 = self
            .intents
            .values()
            .filter(|intent| intent.host == entry.host.name)
            .map(|intent| intent.memory_bytes)
            .sum();
        // Made since the last report: not in the host's figure yet.
        let uncounted: u64 = entry
            .vms
            .values()
            .filter(|known| !known.counted)
            .filter_map(|known| known.vm.spec.as_ref())
            .map(|spec| spec.memory_bytes)
            .sum();
        entry
            .host
            .memory_bytes
            .saturating_sub(entry.host.memory_used_bytes)
            .saturating_sub(reserved)
            .saturating_sub(uncounted)
    }

    pub(super) fn unreserve(&mut self, vm: &str) {
        self.intents.remove(vm);
    }

    pub(super) fn observe(&mut self, host: &str, mut vm: v1::Vm, at: Instant) {
        let Ok(name) = VmName::parse(&vm.name) else {
            return;
        };
        let Some(entry) = self.hosts.get_mut(host) else {
            return;
        };
        host.clone_into(&mut vm.host);
        if may_run(&vm) {
            let epoch = self.epochs.entry(vm.uid.clone()).or_default();
            *epoch = vm.epoch.max(*epoch);
        }
        let name = name.to_string();
        entry.deleted.remove(&name);
        let counted = entry.vms.get(&name).is_some_and(|known| known.counted);
        let answered = Some(at);
        let seen = VmEntry {
            vm,
            answered,
            counted,
        };
        entry.vms.insert(name, seen);
    }

    pub(super) fn forget(&mut self, host: &str, vm: &str, at: Instant) {
        if let Some(entry) = self.hosts.get_mut(host)
            && let Some(gone) = entry.vms.remove(vm)
        {
            entry.deleted.insert(vm.to_owned(), (gone.vm.uid, at));
        }
    }

    pub(super) fn raise_epoch(&mut self, uid: &str, epoch: u64) {
        let known = self.epochs.entry(uid.to_owned()).or_default();
        *known = epoch.max(*known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(1);

    fn table(at: Instant) -> Table {
        let mut table = Table::new(INTERVAL, INTERVAL * 3);
        for host in ["hosts/a", "hosts/b"] {
            let host = v1::Host {
                name: host.into(),
                incarnation: "1".into(),
                memory_bytes: 1 << 30,
                backends: vec![v1::Backend::Software.into()],
                ..Default::default()
            };
            table.register(host, at);
        }
        table
    }

    fn vm(epoch: u64, state: VmState) -> v1::Vm {
        v1::Vm {
            name: "vms/web".into(),
            uid: "u".into(),
            epoch,
            state: state.into(),
            ..Default::default()
        }
    }

    fn report(table: &mut Table, host: &str, vms: Vec<v1::Vm>, at: Instant) {
        let report = v1::ReportHostRequest {
            host: host.into(),
            incarnation: "1".into(),
            vms,
            ..Default::default()
        };
        table.report(report, at).unwrap();
    }

    #[test]
    fn sides_never_hide_the_owner_and_the_highest_epoch_wins() {
        let at = Instant::now();
        let mut table = table(at);
        report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
        report(&mut table, "hosts/b", vec![vm(2, VmState::Incoming)], at);
        assert_eq!(table.vm("vms/web", at).unwrap().host, "hosts/a");
        report(&mut table, "hosts/b", vec![vm(2, VmState::Running)], at);
        assert_eq!(table.vm("vms/web", at).unwrap().host, "hosts/b");
        // The source's last report comes late; then the VM is deleted at its new host.
        report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
        report(&mut table, "hosts/b", vec![], at);
        assert!(table.vm("vms/web", at).is_none());
        assert_eq!(table.vms(at).len(), 0);
    }

    #[test]
    fn three_missed_intervals_are_unreachable() {
        let at = Instant::now();
        let mut table = table(at);
        report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
        let state = |table: &Table, after: u32| {
            let host = table.host("hosts/a", at + INTERVAL * after).unwrap();
            host.state()
        };
        assert_eq!(state(&table, 3), HostState::Ready);
        assert_eq!(state(&table, 4), HostState::Unreachable);
        assert!(table.vm("vms/web", at + INTERVAL * 9).is_some());
    }

    #[test]
    fn another_incarnation_must_register_first() {
        let at = Instant::now();
        let mut table = table(at);
        table.remember("hosts/c", "127.0.0.1:1");
        for (host, incarnation) in [("hosts/a", "2"), ("hosts/c", ""), ("hosts/x", "1")] {
            let report = v1::ReportHostRequest {
                host: host.into(),
                incarnation: incarnation.into(),
                ..Default::default()
            };
            let error = table.report(report, at).unwrap_err();
            assert_eq!(error.reason, Reason::StaleIncarnation, "{host}");
        }
    }

    #[test]
    fn answers_hold_against_older_reports_for_one_interval() {
        let at = Instant::now();
        let mut table = table(at);
        table.observe("hosts/a", vm(1, VmState::Created), at);
        report(&mut table, "hosts/a", vec![], at);
        assert!(table.vm("vms/web", at).is_some());
        table.forget("hosts/a", "vms/web", at);
        report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], at);
        assert!(table.vm("vms/web", at).is_none());
        let later = at + INTERVAL * 2;
        report(&mut table, "hosts/a", vec![vm(1, VmState::Running)], later);
        assert!(table.vm("vms/web", later).is_some());
    }

    #[test]
    fn two_creates_of_one_name_do_not_both_pass() {
        let at = Instant::now();
        let mut table = table(at);
        let spec = VmSpec::from_message(&v1::VmSpec {
            memory_bytes: 600 << 20,
            vcpus: 1,
            ..Default::default()
        })
        .unwrap();
        let name = |id: &str| VmName::from_id(id).unwrap();
        assert_eq!(
            table.reserve(&name("one"), &spec, None, at).unwrap(),
            "hosts/a"
        );
        let twice = table.reserve(&name("one"), &spec, None, at).unwrap_err();
        assert_eq!(twice.reason, Reason::VmExists);
        // Reserved memory counts.
        assert_eq!(
            table.reserve(&name("two"), &spec, None, at).unwrap(),
            "hosts/b"
        );
        let full = table.reserve(&name("three"), &spec, None, at).unwrap_err();
        assert_eq!(full.reason, Reason::NoHost);
        table.unreserve("vms/one");
        table.reserve(&name("three"), &spec, None, at).unwrap();
    }
}
