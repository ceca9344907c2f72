//! What the VM's processes counted, added up over its life.
//!
//! Second-stage counters belong to a process, and each migration begins a new one, so the last
//! figures seen of every process are kept and summed. Both agents are asked all the time, not only
//! the one where the server says the VM is: the most interesting faults and flushes fall into the
//! migration itself.
//!
//! Locking: one std mutex around the [`Tally`], taken for a moment, never across an await. The
//! looking task belongs to the [`Observer`] and ends with it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use slat_proto::v1;
use tokio::task::JoinHandle;

use crate::client::Client;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// An agent that takes longer is asked again at the next look.
const ANSWER: Duration = Duration::from_secs(2);

/// Last figures of every process the VM has had.
#[derive(Debug, Default)]
pub(super) struct Tally {
    processes: HashMap<(String, u32), v1::MmuStats>,
}

/// Sums over the VM's life; `None` where no process offered the figure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    /// Requests for a flush of all vCPUs.
    pub(super) requests: Option<u64>,
    /// Those that reached a vCPU.
    pub(super) flushes: Option<u64>,
    /// Second-stage faults.
    pub(super) faults: Option<u64>,
}

impl Tally {
    /// Notes what a VM shows now.
    pub(super) fn note(&mut self, vm: &v1::Vm) {
        if let Some(stats) = &vm.mmu_stats
            && vm.pid != 0
        {
            self.processes
                .insert((vm.host.clone(), vm.pid), stats.clone());
        }
    }

    /// Adds everything up.
    pub(super) fn sums(&self) -> Sums {
        let sum = |field: fn(&v1::MmuStats) -> Option<u64>| {
            self.processes
                .values()
                .filter_map(field)
                .fold(None, |sum: Option<u64>, value| {
                    Some(sum.unwrap_or(0).saturating_add(value))
                })
        };
        Sums {
            requests: sum(|stats| stats.remote_tlb_flush_requests),
            flushes: sum(|stats| stats.remote_tlb_flushes),
            faults: sum(|stats| stats.faults_taken),
        }
    }
}

/// Looks at the VM until dropped.
#[derive(Debug)]
pub(super) struct Observer {
    tally: Arc<Mutex<Tally>>,
    task: JoinHandle<()>,
}

impl Observer {
    /// Begins to look through these agents.
    pub(super) fn start(clients: Vec<Client>, vm: String) -> Self {
        let tally = Arc::new(Mutex::new(Tally::default()));
        let seen = Arc::clone(&tally);
        let task = tokio::spawn(async move {
            loop {
                for client in &clients {
                    let mut vms = client.vms();
                    let look = vms.get_vm(v1::GetVmRequest {
                        name: vm.clone(),
                        ..Default::default()
                    });
                    // The VM is on one of the hosts only; the other says so.
                    if let Ok(Ok(vm)) = tokio::time::timeout(ANSWER, look).await {
                        note(&seen, vm.get_ref());
                    }
                }
                tokio::time::sleep(LOOK).await;
            }
        });
        Self { tally, task }
    }

    /// Notes what was seen elsewhere.
    pub(super) fn note(&self, vm: &v1::Vm) {
        note(&self.tally, vm);
    }

    /// Sums so far.
    pub(super) fn sums(&self) -> Sums {
        self.tally
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .sums()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn note(tally: &Mutex<Tally>, vm: &v1::Vm) {
    tally
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .note(vm);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(host: &str, pid: u32, faults: Option<u64>) -> v1::Vm {
        v1::Vm {
            host: host.into(),
            pid,
            mmu_stats: Some(v1::MmuStats {
                faults_taken: faults,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn each_process_counts_once_with_its_last_figures() {
        let mut tally = Tally::default();
        assert_eq!(tally.sums(), Sums::default());
        tally.note(&vm("hosts/a", 10, Some(5)));
        tally.note(&vm("hosts/a", 10, Some(7)));
        tally.note(&vm("hosts/b", 10, Some(100)));
        tally.note(&vm("hosts/b", 0, Some(1000)));
        assert_eq!(tally.sums().faults, Some(107));
        assert_eq!(tally.sums().flushes, None, "never offered is not 0");
    }
}
