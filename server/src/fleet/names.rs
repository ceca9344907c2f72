//! Names are labels: from records to VMs, one a uid, and from a name to the VM that is meant. Pure.
//!
//! Two VMs of one name are a conflict: both are shown, each names the others, and a call by name
//! alone means neither. A mere side of a migration (INCOMING, RELINQUISHED) conflicts with no VM;
//! it can be meant by uid or host.

use std::collections::BTreeMap;

use slat_proto::{ApiError, Reason, model::VmRef, v1};

use super::{
    epochs::Epochs,
    rank::{Seen, may_run},
};

/// The record that counts of each uid.
pub(super) struct Vms<'a>(BTreeMap<&'a str, Seen<'a>>);

fn claimants<'a>(mut named: Vec<Seen<'a>>) -> Vec<Seen<'a>> {
    if named.iter().any(|seen| may_run(seen.vm)) {
        named.retain(|seen| may_run(seen.vm));
    }
    named
}

fn conflict(seen: &Seen<'_>) -> v1::NameConflict {
    v1::NameConflict {
        uid: seen.vm.uid.clone(),
        host: seen.vm.host.clone(),
    }
}

impl<'a> Vms<'a> {
    pub(super) fn of(records: impl Iterator<Item = Seen<'a>>, epochs: &Epochs) -> Self {
        let mut best: BTreeMap<&str, Seen<'_>> = BTreeMap::new();
        for seen in records.filter(|seen| !epochs.undercut(seen.vm)) {
            best.entry(seen.vm.uid.as_str())
                .and_modify(|known| {
                    if seen.outranks(known) {
                        *known = seen;
                    }
                })
                .or_insert(seen);
        }
        Self(best)
    }

    pub(super) fn get(&self, uid: &str) -> Option<Seen<'a>> {
        self.0.get(uid).copied()
    }

    fn by_name(&self) -> BTreeMap<&'a str, Vec<Seen<'a>>> {
        let mut names: BTreeMap<&str, Vec<Seen<'_>>> = BTreeMap::new();
        for seen in self.0.values() {
            names.entry(&seen.vm.name).or_default().push(*seen);
        }
        names
    }

    /// By name, then uid: each with the other VMs that have its name.
    pub(super) fn list(&self) -> Vec<(Seen<'a>, Vec<v1::NameConflict>)> {
        let mut list = Vec::with_capacity(self.0.len());
        for (_, all) in self.by_name() {
            let rivals = claimants(all.clone());
            for seen in all {
                let mut conflicts = Vec::new();
                if rivals.iter().any(|rival| rival.vm.uid == seen.vm.uid) {
                    let others = rivals.iter().filter(|rival| rival.vm.uid != seen.vm.uid);
                    conflicts.extend(others.map(conflict));
                }
                list.push((seen, conflicts));
            }
        }
        list
    }

    /// Other VMs that have a VM's name.
    pub(super) fn conflicts_of(&self, name: &str, uid: &str) -> Vec<v1::NameConflict> {
        let named = self.0.values().filter(|seen| seen.vm.name == name);
        let rivals = claimants(named.copied().collect());
        if !rivals.iter().any(|rival| rival.vm.uid == uid) {
            return Vec::new();
        }
        let others = rivals.iter().filter(|rival| rival.vm.uid != uid);
        others.map(conflict).collect()
    }

    /// Names that several VMs have.
    pub(super) fn conflicting_names(&self) -> usize {
        self.by_name()
            .into_values()
            .filter(|all| claimants(all.clone()).len() > 1)
            .count()
    }

    /// The VM that is meant; `None` when there is no such one.
    ///
    /// # Errors
    /// NAME_CONFLICT when several could be meant.
    pub(super) fn resolve(&self, wanted: &VmRef) -> Result<Option<Seen<'a>>, ApiError> {
        if let Some(uid) = wanted.uid() {
            let found = self.get(uid);
            return Ok(found.filter(|seen| wanted.fits(&seen.vm.name, uid)));
        }
        let host = wanted.host().map(ToString::to_string);
        let named = self.0.values().filter(|seen| {
            wanted.fits(&seen.vm.name, &seen.vm.uid)
                && host.as_ref().is_none_or(|host| *host == seen.vm.host)
        });
        let rivals = claimants(named.copied().collect());
        match rivals.as_slice() {
            [] => Ok(None),
            [only] => Ok(Some(*only)),
            several => Err(name_conflict(wanted, several)),
        }
    }
}

fn name_conflict(wanted: &VmRef, rivals: &[Seen<'_>]) -> ApiError {
    let name = wanted.name().map(ToString::to_string).unwrap_or_default();
    let each: Vec<String> = rivals
        .iter()
        .map(|seen| {
            let state = seen.vm.state().as_str_name();
            let state = state.trim_start_matches("STATE_");
            format!("{} on {} ({state})", seen.vm.uid, seen.vm.host)
        })
        .collect();
    let join = |part: fn(&v1::Vm) -> &str| -> String {
        let parts: Vec<&str> = rivals.iter().map(|seen| part(seen.vm)).collect();
        parts.join(",")
    };
    ApiError::new(
        Reason::NameConflict,
        format!("{} VMs are named {name}: {}", rivals.len(), each.join(", ")),
    )
    .with("vm", name)
    .with("uids", join(|vm| &vm.uid))
    .with("hosts", join(|vm| &vm.host))
    .with("advice", "say which one you mean, by its uid or its host")
}
