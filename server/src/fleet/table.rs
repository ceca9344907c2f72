//! Hosts and VMs in memory: what agents report and answer goes in, what the fleet shows comes out.
//! Plain data: time comes in, locks are the caller's.
//!
//! * [`HostEntry`]: a host, the contact with its agent, its records by uid, its leftovers.
//! * A VM is the record that counts among the records of its uid: `rank`, `epochs`.
//! * A name is resolved by `names`; a new VM is placed by `placing`.
//! * A host that is being deleted is marked, and its agent refused: `deletions`. So is a start of
//!   an agent that was fenced: `fences`.
//! * What the store has to know is collected in `unsaved`.
//!
//! It begins with what the store has ([`Table::restore_host`] and what follows): hosts and VMs as
//! last seen, stale until their agents report. A record goes when its host reports without it, when
//! its VM is deleted, or with its host.

mod deletions;
mod fences;

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{VmRef, now},
    v1,
};

use self::deletions::Deletions;
use super::{
    contact::{Contact, Turn},
    epochs::Epochs,
    errors::{host_name_taken, no_such_host},
    fenced::fenced_words,
    names::Vms,
    rank::{Seen, may_run},
    records::Records,
    reservations::Reservations,
    superseded::Superseded,
    unsaved::Unsaved,
};

/// Leftovers kept of one host.
const LEFTOVERS: usize = 1000;
/// Characters kept of what a host says is wrong with it.
const TROUBLE: usize = 500;
/// Pools of pages kept of one host: some sizes of each of a thousand nodes.
const POOLS: usize = 4096;

pub(super) struct HostEntry {
    /// As its agent registered it; its standing is `contact`'s to say.
    pub(super) host: v1::Host,
    pub(super) contact: Contact,
    pub(super) records: Records,
    pub(super) leftovers: Vec<v1::Leftover>,
    pub(super) superseded: Superseded,
    /// Of the agent that registered last, in this life of the server or an earlier one.
    pub(super) last_incarnation: String,
    /// Its last fence is on disk.
    fence_stored: bool,
    /// It was said that some of its VMs cannot be kept.
    warned: bool,
}

impl HostEntry {
    fn new(host: v1::Host, contact: Contact) -> Self {
        Self {
            host,
            contact,
            records: Records::default(),
            leftovers: Vec::new(),
            superseded: Superseded::default(),
            last_incarnation: String::new(),
            fence_stored: true,
            warned: false,
        }
    }

    /// As its agent listed them.
    pub(super) fn keep_leftovers(&mut self, leftovers: Vec<v1::Leftover>) {
        let fit = leftovers.into_iter();
        let fit = fit.filter(|left| slat_proto::model::is_uid(&left.uid));
        let here = fit.take(LEFTOVERS).map(|left| v1::Leftover {
            host: self.host.name.clone(),
            ..left
        });
        self.leftovers = here.collect();
    }
}

/// See the module.
pub(super) struct Table {
    pub(super) hosts: BTreeMap<String, HostEntry>,
    pub(super) epochs: Epochs,
    pub(super) reservations: Reservations,
    pub(super) deletions: Deletions,
    /// Hosts that are being fenced.
    fencing: HashSet<String>,
    pub(super) unsaved: Unsaved,
    interval: Duration,
    pub(super) silence: Duration,
}

/// Texts that are an agent's to bound, and not believed.
fn bounded(trust: v1::HostTrust) -> v1::HostTrust {
    let cut = |text: String| text.chars().take(TROUBLE).collect();
    v1::HostTrust {
        identity: cut(trust.identity),
        message: cut(trust.message),
        ..trust
    }
}

fn stale_incarnation(host: &str) -> ApiError {
    ApiError::new(
        Reason::StaleIncarnation,
        format!("{host} is not registered with this incarnation"),
    )
    .with("host", host)
    .with("advice", "register again")
}

impl Table {
    /// `silence`: a host not heard from for longer is unreachable.
    pub(super) fn new(interval: Duration, silence: Duration) -> Self {
        Self {
            hosts: BTreeMap::new(),
            epochs: Epochs::default(),
            reservations: Reservations::default(),
            deletions: Deletions::default(),
            fencing: HashSet::new(),
            unsaved: Unsaved::default(),
            interval,
            silence,
        }
    }

    pub(super) fn is_ready(&self, entry: &HostEntry, at: Instant) -> bool {
        !entry.is_fenced() && entry.contact.ready(at, self.silence)
    }

    fn show(&self, entry: &HostEntry, at: Instant) -> v1::Host {
        let mut host = entry.host.clone();
        entry.contact.show(&mut host, at, self.silence);
        if entry.is_fenced() {
            let words = host
                .fence
                .as_ref()
                .map(|fence| fenced_words(&host.name, fence));
            host.state = v1::host::State::Unreachable.into();
            host.incarnation.clone_from(&entry.last_incarnation);
            host.state_message = words.unwrap_or_default();
        }
        host.vms = u32::try_from(entry.records.len()).unwrap_or(u32::MAX);
        let leftovers = entry.leftovers.len() + entry.superseded.len();
        host.leftovers = u32::try_from(leftovers).unwrap_or(u32::MAX);
        host
    }

    /// A host that the store knows.
    pub(super) fn restore_host(&mut self, mut host: v1::Host, at: Instant) {
        // Its agent has to register again.
        let last_incarnation = std::mem::take(&mut host.incarnation);
        let name = host.name.clone();
        let mut entry = HostEntry::new(host, Contact::known(at));
        entry.last_incarnation = last_incarnation;
        self.hosts.entry(name).or_insert(entry);
    }

    /// A record that the store has of a host it knows.
    pub(super) fn restore_vm(&mut self, mut vm: v1::Vm) {
        if let Some(entry) = self.hosts.get_mut(&vm.host) {
            // A host is heard from more often than its VMs change.
            let of_host = entry.host.last_seen_time;
            let later = of_host.filter(|host| {
                let key = |time: &prost_types::Timestamp| (time.seconds, time.nanos);
                vm.last_seen_time.is_none_or(|vm| key(host) > key(&vm))
            });
            if later.is_some() {
                vm.last_seen_time = later;
            }
            entry.records.restore(vm);
        }
    }

    /// Refuses an agent whose name is another's, whose host is being deleted, or whose start was
    /// fenced. Of a second agent the log says so once an episode.
    ///
    /// # Errors
    /// HOST_NAME_TAKEN, HOST_DELETED, HOST_FENCED.
    pub(super) fn admit(&mut self, host: &v1::Host, at: Instant) -> Result<(), ApiError> {
        self.deletions.refuse(&host.name)?;
        self.refuse_fenced(&host.name, &host.incarnation)?;
        let silence = self.silence;
        let Some(entry) = self.hosts.get_mut(&host.name) else {
            return Ok(());
        };
        let known = &entry.host;
        let holds = entry.contact.holds_name(at, silence);
        let other = if host.uid.is_empty() || known.uid.is_empty() {
            // An agent that has no uid is known by its address.
            holds && known.address != host.address
        } else {
            // One that is silent may still have its VMs, and they would be hidden.
            known.uid != host.uid && (holds || !entry.records.is_empty())
        };
        if !other {
            return Ok(());
        }
        let reports = entry.contact.reports(at, silence);
        if entry.contact.contend(&host.address, &host.uid, at) {
            tracing::warn!(
                host = %host.name, holder = %known.address, holder_uid = %known.uid,
                contender = %host.address, contender_uid = %host.uid,
                "a second agent registers under a host's name and is refused"
            );
        }
        Err(host_name_taken(known, reports))
    }

    /// An agent that starts, or starts anew. Whether it is the same start as before.
    ///
    /// # Errors
    /// HOST_NAME_TAKEN, HOST_DELETED.
    pub(super) fn register(&mut self, mut host: v1::Host, at: Instant) -> Result<bool, ApiError> {
        self.admit(&host, at)?;
        host.last_seen_time = Some(now());
        let entry = self
            .hosts
            .entry(host.name.clone())
            .or_insert_with(|| HostEntry::new(v1::Host::default(), Contact::default()));
        let known = &entry.host;
        let same = known.incarnation == host.incarnation && known.address == host.address;
        if !known.uid.is_empty() && known.uid != host.uid {
            tracing::warn!(host = %host.name, was = %known.uid, now = %host.uid, "a host's name has another agent");
        }
        entry.contact.register(same, at);
        let same_agent = host.uid == known.uid && !host.uid.is_empty();
        if !same_agent {
            // Nobody else holds the name now.
            entry.contact.settled();
        }
        entry.warned &= same;
        host.memory_used_bytes = known.memory_used_bytes;
        host.cordoned = known.cordoned;
        // The server's own to say.
        host.fence.clone_from(&known.fence);
        entry.last_incarnation.clone_from(&host.incarnation);
        host.clock_offset = known.clock_offset;
        if let Some(huge) = &mut host.huge_pages {
            huge.pools.truncate(POOLS);
        }
        host.trust = host.trust.map(bounded);
        entry.host = host;
        let name = entry.host.name.clone();
        self.unsaved.host(&name);
        Ok(same)
    }

    /// Refuses a report of a host that is being deleted, that is not registered so, or whose start
    /// was fenced.
    ///
    /// # Errors
    /// STALE_INCARNATION, HOST_DELETED, HOST_FENCED.
    pub(super) fn may_report(&self, report: &v1::ReportHostRequest) -> Result<(), ApiError> {
        self.deletions.refuse(&report.host)?;
        self.refuse_fenced(&report.host, &report.incarnation)?;
        let known = self.hosts.get(&report.host);
        let registered = known.is_some_and(|entry| entry.host.incarnation == report.incarnation);
        if !registered || report.incarnation.is_empty() {
            return Err(stale_incarnation(&report.host));
        }
        Ok(())
    }

    /// What an agent sees.
    ///
    /// # Errors
    /// As [`Table::may_report`].
    pub(super) fn report(
        &mut self,
        report: v1::ReportHostRequest,
        at: Instant,
    ) -> Result<(), ApiError> {
        self.may_report(&report)?;
        let entry = self
            .hosts
            .get_mut(&report.host)
            .ok_or_else(|| stale_incarnation(&report.host))?;
        let seen = now();
        entry.contact.report(at);
        entry.host.last_seen_time = Some(seen);
        entry.host.memory_used_bytes = report.memory_used_bytes;
        if let Some(mut reported) = report.huge_pages {
            reported.pools.truncate(POOLS);
            entry.host.huge_pages = Some(reported);
        }
        if let Some(trust) = report.trust {
            entry.host.trust = Some(bounded(trust));
        }
        entry.contact.trouble = report.state_message.chars().take(TROUBLE).collect();
        entry.keep_leftovers(report.leftovers);
        let records = &mut entry.records;
        let (changed, unfit) = records.report(&report.host, report.vms, seen, at, self.interval);
        if unfit > 0 && !entry.warned {
            entry.warned = true;
            tracing::warn!(host = %report.host, unfit, "a report has VMs without a valid name or uid");
        }
        for record in entry.records.iter().filter(|record| may_run(&record.vm)) {
            if self.epochs.raise(&record.vm.uid, record.vm.epoch) {
                self.unsaved.epoch(&record.vm.uid);
            }
        }
        entry.superseded.report(&entry.records, &self.epochs);
        if !changed.is_empty() {
            for uid in changed {
                self.unsaved.vm(&report.host, uid);
            }
            self.prune_epochs();
        }
        Ok(())
    }

    fn prune_epochs(&mut self) {
        let alive: HashSet<&str> = self
            .hosts
            .values()
            .flat_map(|entry| {
                let leftovers = entry.leftovers.iter().map(|left| left.uid.as_str());
                let records = entry.records.iter().map(|record| record.vm.uid.as_str());
                leftovers.chain(records)
            })
            .collect();
        for uid in self.epochs.prune(&alive) {
            self.unsaved.epoch(&uid);
        }
    }

    /// How calling a host's agent back went, as that incarnation.
    pub(super) fn called(&mut self, host: &str, incarnation: &str, result: Result<(), String>) {
        let Some(entry) = self.hosts.get_mut(host) else {
            return;
        };
        if entry.host.incarnation != incarnation {
            return;
        }
        let why = result.as_ref().err().cloned().unwrap_or_default();
        let address = &entry.host.address;
        match entry.contact.called(result) {
            Turn::Same => {}
            Turn::Reached => tracing::info!(%host, %address, "a host's agent can be called"),
            Turn::Lost => {
                tracing::warn!(%host, %address, %why, "a host's agent reports and cannot be called");
            }
        }
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

    /// Hosts that report, with their addresses and incarnations: those worth calling back.
    pub(super) fn reporting(&self, at: Instant) -> Vec<v1::Host> {
        self.hosts
            .values()
            .filter(|entry| !entry.is_fenced() && entry.contact.reports(at, self.silence))
            .map(|entry| self.show(entry, at))
            .collect()
    }

    /// Stops or begins to choose a host for VMs.
    ///
    /// # Errors
    /// NO_SUCH_HOST.
    pub(super) fn cordon(&mut self, host: &str, cordoned: bool) -> Result<(), ApiError> {
        let entry = self.hosts.get_mut(host).ok_or_else(|| no_such_host(host))?;
        if entry.host.cordoned != cordoned {
            entry.host.cordoned = cordoned;
            self.unsaved.host(host);
        }
        Ok(())
    }

    /// Forgets a host with everything on it.
    pub(super) fn remove_host(&mut self, host: &str) {
        let Some(entry) = self.hosts.remove(host) else {
            return;
        };
        self.unsaved.host(host);
        for record in entry.records.iter() {
            self.unsaved.vm(host, record.vm.uid.clone());
        }
        self.prune_epochs();
    }

    /// Hosts that were heard from lately are stored with that time.
    pub(super) fn stamp(&mut self, at: Instant) {
        let heard: Vec<String> = self
            .hosts
            .iter()
            .filter(|(_, entry)| entry.contact.reports(at, self.silence))
            .map(|(name, _)| name.clone())
            .collect();
        for host in heard {
            self.unsaved.host(&host);
        }
    }

    fn seen(&self, at: Instant) -> impl Iterator<Item = Seen<'_>> {
        self.hosts.values().flat_map(move |entry| {
            let ready = self.is_ready(entry, at);
            entry.records.iter().map(move |record| Seen {
                vm: &record.vm,
                ready,
            })
        })
    }

    /// The VMs there are.
    pub(super) fn counting(&self, at: Instant) -> Vms<'_> {
        Vms::of(self.seen(at), &self.epochs)
    }

    /// A record as the fleet shows it. It is stale when its host does not answer, or has not
    /// reported since the server started.
    fn show_vm(&self, seen: Seen<'_>, conflicts: Vec<v1::NameConflict>) -> v1::Vm {
        let mut vm = seen.vm.clone();
        let entry = self.hosts.get(&vm.host);
        let reported = entry.is_some_and(|entry| entry.contact.reported);
        vm.stale = !vm.kept_by_server && (!seen.ready || !reported);
        vm.conflicts = conflicts;
        vm
    }

    /// The VM that is meant.
    ///
    /// # Errors
    /// NAME_CONFLICT.
    pub(super) fn vm(&self, wanted: &VmRef, at: Instant) -> Result<Option<v1::Vm>, ApiError> {
        let vms = self.counting(at);
        let found = vms.resolve(wanted)?;
        Ok(found.map(|seen| {
            let conflicts = vms.conflicts_of(&seen.vm.name, &seen.vm.uid);
            self.show_vm(seen, conflicts)
        }))
    }

    pub(super) fn vms(&self, at: Instant) -> Vec<v1::Vm> {
        self.counting(at)
            .list()
            .into_iter()
            .map(|(seen, conflicts)| self.show_vm(seen, conflicts))
            .collect()
    }

    /// Keeps what an agent just answered. What it is as the fleet shows it.
    pub(super) fn observe(&mut self, host: &str, vm: v1::Vm, at: Instant) {
        let Some(entry) = self.hosts.get_mut(host) else {
            return;
        };
        let claims = may_run(&vm).then(|| (vm.uid.clone(), vm.epoch));
        if let Some(uid) = entry.records.observe(host, vm, now(), at) {
            self.unsaved.vm(host, uid);
        }
        if let Some((uid, epoch)) = claims
            && entry.records.get(&uid).is_some()
        {
            self.raise_epoch(&uid, epoch);
        }
    }

    /// Keeps a lost VM of which nothing is left on any host: see [`Records::bury`].
    pub(super) fn bury(&mut self, vm: v1::Vm) {
        if let Some(entry) = self.hosts.get_mut(&vm.host) {
            let (host, uid, epoch) = (vm.host.clone(), vm.uid.clone(), vm.epoch);
            entry.records.bury(vm);
            self.unsaved.vm(&host, uid.clone());
            self.raise_epoch(&uid, epoch);
        }
    }

    /// Keeps a VM that its host has by another's word: see [`Records::expect`].
    pub(super) fn expect(&mut self, vm: v1::Vm) {
        self.raise_epoch(&vm.uid, vm.epoch);
        if let Some(entry) = self.hosts.get_mut(&vm.host) {
            let (host, uid) = (vm.host.clone(), vm.uid.clone());
            if entry.records.expect(vm) {
                self.unsaved.vm(&host, uid);
            }
        }
    }

    pub(super) fn forget(&mut self, host: &str, uid: &str, at: Instant) {
        if let Some(entry) = self.hosts.get_mut(host)
            && entry.records.forget(uid, at)
        {
            self.unsaved.vm(host, uid.to_owned());
            self.prune_epochs();
        }
    }

    pub(super) fn raise_epoch(&mut self, uid: &str, epoch: u64) {
        if self.epochs.raise(uid, epoch) {
            self.unsaved.epoch(uid);
        }
    }

    /// Hosts that do not answer, or have not reported since the server started.
    pub(super) fn silent(&self, at: Instant) -> Vec<String> {
        self.hosts
            .values()
            .filter(|entry| !self.is_ready(entry, at) || !entry.contact.reported)
            .map(|entry| entry.host.name.clone())
            .collect()
    }

    /// Of these, those that have not reported.
    pub(super) fn unreported(&self) -> Vec<String> {
        self.hosts
            .values()
            .filter(|entry| !entry.contact.reported)
            .map(|entry| entry.host.name.clone())
            .collect()
    }

    /// Hosts that registered and have not told their VMs yet.
    pub(super) fn untold(&self, at: Instant) -> Vec<String> {
        self.hosts
            .values()
            .filter(|entry| !entry.contact.told && self.is_ready(entry, at))
            .map(|entry| entry.host.name.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests;
