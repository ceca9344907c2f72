//! What is shown against what is true: the rules, each with its name. Pure.
//!
//! A rule speaks of a fleet at rest. Whoever asks repeats the question until the allowance for the
//! step is over; what is broken then is a disagreement. Of a host whose agent does not run nothing
//! new can be known: its VMs are as last seen, must be said to be so, and must not be missing.

mod rule;
mod times;

use std::collections::{BTreeMap, BTreeSet};

use slat_proto::{
    Reason,
    v1::{MigrationPhase as Phase, VmLocation, vm::State},
};

use super::{
    observe::{Moved, View, Views, VmRow},
    oracle::{Ledger, Standing, Truth},
};

pub use self::rule::{Broken, Rule};

/// Every rule that does not hold now.
#[must_use]
pub fn judge(truth: &Truth, views: &Views, ledger: &Ledger) -> Vec<Broken> {
    let mut broken = Vec::new();
    world(truth, ledger, &mut broken);
    vms(truth, views, ledger, &mut broken);
    names(views, &mut broken);
    hosts(truth, views, &mut broken);
    agree(views, &mut broken);
    migrations(truth, views, ledger, &mut broken);
    times::times(truth, views, ledger, &mut broken);
    broken.sort();
    broken
}

/// What needs no view.
fn world(truth: &Truth, ledger: &Ledger, broken: &mut Vec<Broken>) {
    for uid in truth.uids() {
        let running: Vec<_> = truth
            .of(uid)
            .filter(|record| record.standing == Standing::Owner && record.lives)
            .collect();
        if running.len() > 1 {
            broken.push(Broken::new(Rule::OneOwner, uid, format!("{running:?}")));
        }
        let errors: u64 = truth.of(uid).map(|record| record.errors).sum();
        if errors > 0 {
            let said = format!("{errors} stamps are wrong");
            broken.push(Broken::new(Rule::GuestMemory, uid, said));
        }
        // What is on a silent host goes when its agent is back.
        let left = truth.of(uid).filter(|record| truth.is_up(&record.host));
        let left: Vec<_> = left.collect();
        if ledger.deleted.contains(uid) && !left.is_empty() {
            broken.push(Broken::new(Rule::Gone, uid, format!("{left:?}")));
        }
    }
    let there = truth.uids();
    for (uid, name) in ledger.made.values() {
        // Also one whose process was killed: it is LOST until it is deleted.
        if !there.contains(uid.as_str()) {
            broken.push(Broken::new(
                Rule::Kept,
                uid,
                format!("{name} is on no disk"),
            ));
        }
    }
}

fn vms(truth: &Truth, views: &Views, ledger: &Ledger, broken: &mut Vec<Broken>) {
    let mut shown: BTreeMap<&str, Vec<&VmRow>> = BTreeMap::new();
    for row in &views.api.vms {
        shown.entry(&row.uid).or_default().push(row);
    }
    for (uid, rows) in &shown {
        if rows.len() > 1 {
            broken.push(Broken::new(Rule::ShownOnce, *uid, format!("{rows:?}")));
        }
        if truth.of(uid).next().is_none() && rows.iter().any(|row| truth.is_up(&row.host)) {
            let said = format!("on no disk, shown as {rows:?}");
            broken.push(Broken::new(Rule::NothingInvented, *uid, said));
        }
    }
    for uid in truth.uids() {
        let row = shown.get(uid).map(|rows| rows[0]);
        broken.extend(one(truth, ledger, uid, row));
    }
}

/// One VM that is on a disk.
fn one(truth: &Truth, ledger: &Ledger, uid: &str, row: Option<&VmRow>) -> Option<Broken> {
    let wrong = |rule, wanted: String| {
        let said = row.map_or_else(|| "not shown".to_owned(), |row| format!("shown as {row:?}"));
        Some(Broken::new(rule, uid, format!("{wanted}; {said}")))
    };
    let owner = truth.owner(uid);
    match owner {
        Some(owner) if truth.is_up(&owner.host) => {
            let (rule, state) = if owner.lives {
                (Rule::AliveIsShown, owner.state)
            } else {
                (Rule::DeadIsLost, Some(State::Lost))
            };
            let fits = |row: &VmRow| {
                let named = row.name == owner.name && row.host == owner.host;
                let is = state.is_none_or(|state| short(state) == row.state);
                named && is && row.epoch == owner.epoch && !row.stale
            };
            if row.is_some_and(fits) {
                return None;
            }
            let state = state.map_or("silent", short);
            let (host, epoch) = (&owner.host, owner.epoch);
            wrong(rule, format!("{state} on {host} at epoch {epoch}"))
        }
        Some(owner) => match row {
            None if ledger.shown.contains(uid) => {
                wrong(Rule::SilentIsStale, format!("on {}, silent", owner.host))
            }
            Some(row) if truth.is_up(&row.host) && may_run(&row.state) => wrong(
                Rule::SidesAreSides,
                format!("its owner is on {}, silent", owner.host),
            ),
            Some(row) if !truth.is_up(&row.host) && !row.stale => {
                wrong(Rule::SilentIsStale, format!("on {}, silent", owner.host))
            }
            _ => None,
        },
        None => {
            let told = |standing| {
                truth.of(uid).any(|record| {
                    record.lives && record.standing == standing && truth.is_up(&record.host)
                })
            };
            // Nobody owns it: a frozen copy that nobody got, or a destination in doubt.
            match row {
                Some(row) if truth.is_up(&row.host) && may_run(&row.state) => {
                    wrong(Rule::SidesAreSides, "nobody owns it".to_owned())
                }
                None if told(Standing::Source) => {
                    wrong(Rule::SidesAreSides, "a frozen copy is kept".to_owned())
                }
                _ => None,
            }
        }
    }
}

fn may_run(state: &str) -> bool {
    !matches!(state, "INCOMING" | "RELINQUISHED")
}

fn short(state: State) -> &'static str {
    let name = state.as_str_name();
    name.strip_prefix("STATE_").unwrap_or(name)
}

/// Rows of each name that a call by that name may mean: mere sides stand behind VMs.
fn claimants(view: &View) -> BTreeMap<&str, Vec<&VmRow>> {
    let mut names: BTreeMap<&str, Vec<&VmRow>> = BTreeMap::new();
    for row in &view.vms {
        names.entry(&row.name).or_default().push(row);
    }
    for rows in names.values_mut() {
        if rows.iter().any(|row| may_run(&row.state)) {
            rows.retain(|row| may_run(&row.state));
        }
    }
    names
}

fn names(views: &Views, broken: &mut Vec<Broken>) {
    for (name, rows) in claimants(&views.api) {
        let uids: BTreeSet<String> = rows.iter().map(|row| row.uid.clone()).collect();
        for row in rows {
            let mut others = uids.clone();
            others.remove(&row.uid);
            if row.conflicts != others {
                let said = format!("others of {name}: {others:?}; shown as {row:?}");
                broken.push(Broken::new(Rule::NamesConflict, &row.uid, said));
            }
        }
        let found = views.by_name.get(name);
        let conflict = Reason::NameConflict.as_str();
        let right = match found {
            Some(Ok(uid)) => uids.len() == 1 && uids.contains(uid),
            Some(Err(reason)) => uids.len() > 1 && reason == conflict,
            None => true,
        };
        if !right {
            let said = format!("{uids:?}; a call by name: {found:?}");
            broken.push(Broken::new(Rule::NamesConflict, name, said));
        }
    }
}

fn hosts(truth: &Truth, views: &Views, broken: &mut Vec<Broken>) {
    for (host, up) in &truth.hosts {
        let wanted = if *up { "READY" } else { "UNREACHABLE" };
        let state = views.api.hosts.get(host);
        if state.is_none_or(|state| state != wanted) {
            let said = format!("{wanted}; shown as {state:?}");
            broken.push(Broken::new(Rule::HostsAreTrue, host, said));
        }
        if views.silent.contains(host) == *up {
            let said = format!("{wanted}; called silent: {:?}", views.silent);
            broken.push(Broken::new(Rule::HostsAreTrue, host, said));
        }
    }
}

fn agree(views: &Views, broken: &mut Vec<Broken>) {
    for (who, view) in [("slat get", &views.cli), ("the page", &views.page)] {
        if *view != views.api {
            let said = format!("the API: {:?}; {who}: {view:?}", views.api);
            broken.push(Broken::new(Rule::ViewsAgree, who, said));
        }
    }
    let mut wanted: BTreeMap<String, usize> = BTreeMap::new();
    let states = ["created", "running", "paused", "incoming", "relinquished"];
    for state in states.into_iter().chain(["failed", "stopped", "lost"]) {
        let is = |row: &&VmRow| row.state.eq_ignore_ascii_case(state);
        let count = views.api.vms.iter().filter(is).count();
        wanted.insert(format!("slat_vms{{state=\"{state}\"}}"), count);
    }
    for state in ["ready", "unreachable"] {
        let is = |is: &&String| is.eq_ignore_ascii_case(state);
        let count = views.api.hosts.values().filter(is).count();
        wanted.insert(format!("slat_hosts{{state=\"{state}\"}}"), count);
    }
    let phases = ["pending", "preparing", "precopy_active", "switchover"];
    for phase in phases
        .into_iter()
        .chain(["committed", "cancelling", "in_doubt"])
    {
        let is = |is: &&String| is.eq_ignore_ascii_case(phase);
        let count = views.api.moving.values().filter(is).count();
        wanted.insert(
            format!("slat_migrations_active{{phase=\"{phase}\"}}"),
            count,
        );
    }
    let names = claimants(&views.api);
    let several = |rows: &&Vec<&VmRow>| rows.iter().any(|row| row.uid != rows[0].uid);
    let conflicts = names.values().filter(several).count();
    wanted.insert("slat_vm_name_conflicts".to_owned(), conflicts);
    let doubt = |moved: &&Moved| moved.phase == Phase::InDoubt;
    let doubts = views.migrations.iter().filter(doubt).count();
    wanted.insert("slat_migration_in_doubt".to_owned(), doubts);
    for (series, count) in wanted {
        let value = views.metrics.get(&series).copied();
        let right = value.map(|value| format!("{value}")) == Some(count.to_string());
        if !right {
            let said = format!("the API has {count}, /metrics {value:?}");
            broken.push(Broken::new(Rule::ViewsAgree, series, said));
        }
    }
}

/// Whether a migration is over.
#[must_use]
pub fn is_over(phase: Phase) -> bool {
    matches!(phase, Phase::Completed | Phase::Cancelled | Phase::Failed)
}

fn migrations(truth: &Truth, views: &Views, ledger: &Ledger, broken: &mut Vec<Broken>) {
    for asked in ledger.migrations.iter().filter(|asked| !asked.judged) {
        let found = views
            .migrations
            .iter()
            .find(|moved| moved.name == asked.name);
        let Some(moved) = found else {
            let said = "it was accepted, and is not listed";
            broken.push(Broken::new(Rule::MigrationEnds, &asked.name, said));
            continue;
        };
        let is_last = ledger
            .last_of(&asked.uid)
            .is_some_and(|last| last.name == asked.name);
        if !is_over(moved.phase) || !is_last || ledger.deleted.contains(&asked.uid) {
            continue;
        }
        let owner = truth.owner(&asked.uid);
        let is_at = |host: &str| owner.is_some_and(|owner| owner.host == host);
        let right = match moved.location {
            VmLocation::Source => is_at(&moved.source) && moved.phase != Phase::Completed,
            VmLocation::Destination => is_at(&moved.destination),
            VmLocation::Unknown | VmLocation::Lost => owner.is_none_or(|owner| !owner.lives),
            VmLocation::PausedBoth | VmLocation::Unspecified => false,
        };
        if !right {
            let said = format!("its owner is {owner:?}; told: {moved:?}");
            broken.push(Broken::new(Rule::MigrationTellsWhere, &asked.name, said));
        }
    }
}

#[cfg(test)]
mod tests;
