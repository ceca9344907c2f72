//! CPU time and memory of VM processes, for `/metrics`: read from `/proc` by one task, so that a
//! scrape measures nothing.
//!
//! # Locking
//! One leaf mutex over the last figures, held to replace or copy them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use slat_proto::v1::{self, vm::State};

use super::supervisor::Supervisor;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(5);

/// One VM process's use of its host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Used {
    /// User and system time since it began, seconds.
    pub(super) cpu_seconds: f64,
    /// Bytes; guest memory that is populated counts.
    pub(super) resident_bytes: u64,
}

/// The last figures, by the VM's name.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage(Arc<Mutex<BTreeMap<String, Used>>>);

impl Usage {
    fn last(&self) -> MutexGuard<'_, BTreeMap<String, Used>> {
        // It is replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As last seen.
    pub(super) fn get(&self) -> BTreeMap<String, Used> {
        self.last().clone()
    }

    /// Looks at every VM process again and again; its owner ends it.
    pub(super) async fn keep(self, supervisor: Arc<Supervisor>) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = supervisor.stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let vms = supervisor.snapshots();
            // Files of /proc do not wait for a disk, but for the kernel's locks.
            let looked = tokio::task::spawn_blocking(move || look(&vms)).await;
            if let Ok(looked) = looked {
                *self.last() = looked;
            }
        }
    }
}

fn look(vms: &[v1::Vm]) -> BTreeMap<String, Used> {
    let living = |vm: &&v1::Vm| vm.pid != 0 && vm.state() != State::Lost;
    vms.iter()
        .filter(living)
        .filter_map(|vm| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", vm.pid)).ok()?;
            Some((vm.name.clone(), parse(&stat)?))
        })
        .collect()
}

/// Of `/proc/PID/stat`: its fields 14, 15 and 24. The name, the second, may hold anything.
fn parse(stat: &str) -> Option<Used> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let ticks = number(14)?.checked_add(number(15)?)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    // To a hundredth of a second, as the kernel counts.
    let millis = ticks.checked_mul(1000)? / per_second;
    Some(Used {
        cpu_seconds: Duration::from_millis(millis).as_secs_f64(),
        resident_bytes: number(24)?.checked_mul(page)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 100 999 \
                    77 18446744073709551615 0";
        let used = parse(stat).unwrap();
        let per_second = rustix::param::clock_ticks_per_second();
        assert_eq!(
            (used.cpu_seconds * 1000.0).round() as u64,
            300_000 / per_second
        );
        assert_eq!(used.resident_bytes, 77 * rustix::param::page_size() as u64);
        assert_eq!(parse("42 (a) S 1"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn this_process_uses_memory_and_a_lost_vm_none() {
        let vm = |state: State, pid| v1::Vm {
            name: "vms/a".into(),
            pid,
            state: state.into(),
            ..Default::default()
        };
        let own = std::process::id();
        let used = look(&[vm(State::Running, own)]);
        assert!(used["vms/a"].resident_bytes > 0);
        assert!(look(&[vm(State::Lost, own), vm(State::Running, 0)]).is_empty());
    }
}
