//! What a page may ask for: filters, order and a slice of a long list. Everything has a bound;
//! unknown words mean the default, so that an old link shows something.

use serde::Deserialize;
use slat_proto::v1;

use super::snapshot::Snapshot;
use crate::history::{Rate, Rates};

/// Rows of one answer.
const MAX_ROWS: usize = 200;
const ROWS: usize = 50;

/// Of VMs, hosts or migrations.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Select {
    /// Part of a name, the beginning of a uid.
    q: String,
    /// A state or phase, e.g. `RUNNING`.
    state: String,
    /// Only those with such a mark, e.g. `conflict`; `any`: with one at all.
    mark: String,
    /// `vms/{vm}` or `hosts/{host}` they belong to.
    of: String,
    /// `name`, `memory`, or a rate.
    sort: String,
    offset: usize,
    limit: usize,
}

/// A slice of what matched.
pub(super) struct Slice<T> {
    pub(super) rows: Vec<T>,
    /// How many match.
    pub(super) matched: usize,
    pub(super) offset: usize,
}

impl Select {
    fn slice<T>(&self, found: Vec<T>) -> Slice<T> {
        let limit = match self.limit {
            0 => ROWS,
            limit => limit.min(MAX_ROWS),
        };
        let matched = found.len();
        // Past the end: the last slice there is.
        let offset = if self.offset >= matched {
            matched.saturating_sub(1) / limit * limit
        } else {
            self.offset
        };
        Slice {
            rows: found.into_iter().skip(offset).take(limit).collect(),
            matched,
            offset,
        }
    }

    fn has(&self, marks: &[&'static str]) -> bool {
        match self.mark.as_str() {
            "" => true,
            "any" => !marks.is_empty(),
            mark => marks.contains(&mark),
        }
    }

    fn finds(&self, names: &[&str], uid: &str) -> bool {
        let q = self.q.trim().to_lowercase();
        q.is_empty()
            || names.iter().any(|name| id(name).contains(&q))
            || (q.len() >= 4 && uid.starts_with(&q))
    }

    fn is_state(&self, name: &str) -> bool {
        self.state.is_empty() || name == self.state
    }

    pub(super) fn vms<'a>(&self, snapshot: &'a Snapshot) -> Slice<&'a v1::Vm> {
        let mut found: Vec<&v1::Vm> = snapshot
            .vms
            .iter()
            .filter(|vm| self.finds(&[&vm.name, &vm.host], &vm.uid))
            .filter(|vm| self.is_state(word(vm.state().as_str_name(), "STATE_")))
            .filter(|vm| self.of.is_empty() || vm.host == self.of)
            .filter(|vm| self.has(&vm_marks(vm, snapshot)))
            .collect();
        let rates = |vm: &&v1::Vm| snapshot.rates.get(key(vm)).copied().unwrap_or_default();
        let memory = |vm: &&v1::Vm| vm.spec.as_ref().map_or(0, |spec| spec.memory_bytes);
        if self.sort == "memory" {
            found.sort_by_key(|vm| std::cmp::Reverse(memory(vm)));
        } else {
            self.by_rate(&mut found, rates);
        }
        self.slice(found)
    }

    pub(super) fn hosts<'a>(&self, snapshot: &'a Snapshot) -> Slice<&'a v1::Host> {
        let mut found: Vec<&v1::Host> = snapshot
            .hosts
            .values()
            .filter(|host| self.finds(&[&host.name, &host.address], &host.uid))
            .filter(|host| self.is_state(word(host.state().as_str_name(), "STATE_")))
            .filter(|host| self.of.is_empty() || host.name == self.of)
            .filter(|host| self.has(&host_marks(host)))
            .collect();
        let rates = |host: &&v1::Host| snapshot.rates.get(&host.name).copied().unwrap_or_default();
        if self.sort == "memory" {
            found.sort_by_key(|host| std::cmp::Reverse(host.memory_used_bytes));
        } else {
            self.by_rate(&mut found, rates);
        }
        self.slice(found)
    }

    /// Running ones first, the longest running on top; then the others, the newest first.
    pub(super) fn migrations<'a>(&self, snapshot: &'a Snapshot) -> Slice<&'a v1::Migration> {
        let found = snapshot
            .running
            .iter()
            .chain(snapshot.ended.iter())
            .filter(|migration| {
                let names = [
                    migration.name.as_str(),
                    &migration.vm,
                    &migration.source,
                    &migration.destination,
                ];
                self.finds(&names, &migration.vm_uid)
            })
            .filter(|migration| {
                let phase = word(migration.phase().as_str_name(), "MIGRATION_PHASE_");
                match self.state.as_str() {
                    "RUNNING" => !crate::phase::has_ended(migration.phase()),
                    _ => self.is_state(phase),
                }
            })
            .filter(|migration| {
                let ends = [&migration.vm, &migration.source, &migration.destination];
                self.of.is_empty() || ends.contains(&&self.of)
            })
            .collect();
        self.slice(found)
    }

    /// By the rate that is asked for, the highest first; what offers none comes last.
    fn by_rate<T>(&self, found: &mut [T], rates: impl Fn(&T) -> Rates) {
        let Some(rate) = Rate::parse(&self.sort) else {
            return;
        };
        let of = |one: &T| rates(one)[rate as usize].unwrap_or(-1.0);
        found.sort_by(|a, b| of(b).total_cmp(&of(a)));
    }
}

/// `vms/web` as `web`.
fn id(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, id)| id)
}

/// Under which its rates are kept.
pub(super) fn key(vm: &v1::Vm) -> &str {
    if vm.uid.is_empty() { &vm.name } else { &vm.uid }
}

/// `STATE_READY` as `READY`.
pub(super) fn word(name: &'static str, prefix: &str) -> &'static str {
    name.strip_prefix(prefix).unwrap_or(name)
}

/// A clock that is off by more than this makes times hard to read.
const CLOCK: i64 = 2;

/// What an operator should know of a host before using it.
pub(super) fn host_marks(host: &v1::Host) -> Vec<&'static str> {
    let ready = host.state() == v1::host::State::Ready;
    let clock = host
        .clock_offset
        .as_ref()
        .map_or(0, |offset| offset.seconds);
    // Of the start of its agent that was heard of last.
    let fence = host.fence.as_ref();
    let fenced = fence.is_some_and(|fence| fence.incarnation == host.incarnation);
    [
        ("unreachable", !ready),
        ("fenced", !ready && fenced),
        ("unreported", !ready && !host.reported),
        ("contended", !host.contender.is_empty()),
        (
            "trouble",
            ready && host.contender.is_empty() && !host.state_message.is_empty(),
        ),
        ("cordoned", host.cordoned),
        ("leftovers", host.leftovers > 0),
        ("clock", clock.abs() >= CLOCK),
    ]
    .into_iter()
    .filter_map(|(mark, has)| has.then_some(mark))
    .collect()
}

/// Whether a migration is of that VM, rather than of another of its name.
pub(super) fn moves(migration: &v1::Migration, vm: &v1::Vm) -> bool {
    migration.vm == vm.name && (migration.vm_uid.is_empty() || migration.vm_uid == vm.uid)
}

/// What an operator should know of a VM before doing anything to it.
pub(super) fn vm_marks(vm: &v1::Vm, snapshot: &Snapshot) -> Vec<&'static str> {
    use v1::vm::State;
    let host = snapshot.hosts.get(&vm.host);
    let silent = host.is_some_and(|host| host.state() != v1::host::State::Ready);
    let migrates = || snapshot.running.iter().any(|running| moves(running, vm));
    let errors = vm
        .guest_counters
        .as_ref()
        .is_some_and(|guest| guest.errors > 0);
    // A pager that died is replaced at once; what lasts is a source that failed.
    let waits = vm.paging.as_ref().is_some_and(|paging| {
        paging.state() != v1::paging_status::State::Serving && vm.state() != State::Lost
    });
    [
        ("conflict", !vm.conflicts.is_empty()),
        ("stale", vm.stale || silent),
        ("lost", vm.state() == State::Lost),
        ("unresponsive", vm.state() == State::Unresponsive),
        ("failed", vm.state() == State::Failed),
        ("frozen", vm.state() == State::Relinquished && !migrates()),
        ("errors", errors),
        ("waits", waits),
        ("watched", vm.paging.is_some()),
    ]
    .into_iter()
    .filter_map(|(mark, has)| has.then_some(mark))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_bounded_and_never_past_the_end() {
        let select = |offset, limit| Select {
            offset,
            limit,
            ..Select::default()
        };
        let all: Vec<usize> = (0..1234).collect();
        let slice = select(0, 100_000).slice(all.clone());
        assert_eq!((slice.rows.len(), slice.matched), (MAX_ROWS, 1234));
        let slice = select(99_999, 50).slice(all.clone());
        assert_eq!((slice.offset, slice.rows[0]), (1200, 1200));
        assert_eq!(select(5, 0).slice(all).rows.len(), ROWS);
        assert!(select(5, 0).slice(Vec::<u8>::new()).rows.is_empty());
    }

    #[test]
    fn a_migration_of_its_twin_does_not_hide_that_a_vm_is_frozen() {
        let running = v1::Migration {
            vm: "vms/web".into(),
            vm_uid: "u".into(),
            ..Default::default()
        };
        let snapshot = Snapshot {
            hosts: Default::default(),
            vms: Vec::new(),
            rates: Default::default(),
            running: vec![running],
            ended: Default::default(),
            error: None,
        };
        let frozen = |uid: &str| {
            let vm = v1::Vm {
                name: "vms/web".into(),
                uid: uid.into(),
                state: v1::vm::State::Relinquished.into(),
                ..Default::default()
            };
            vm_marks(&vm, &snapshot).contains(&"frozen")
        };
        assert!(!frozen("u"));
        assert!(frozen("v"));
    }

    #[test]
    fn a_search_finds_parts_of_names_and_the_beginning_of_a_uid() {
        let select = |q: &str| Select {
            q: q.into(),
            ..Select::default()
        };
        let finds = |q| select(q).finds(&["vms/web-1", "hosts/rack7"], "0198-ab");
        assert!(finds("") && finds("eb-") && finds(" Rack7") && finds("0198"));
        // Every name begins with its collection.
        assert!(!finds("vms/") && !finds("019x") && !finds("ab"));
    }
}
