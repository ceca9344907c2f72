//! The fleet as its agents report it: hosts, the VMs on them, and the way to each agent.
//!
//! * [`table`] holds hosts and VMs and says which record of a VM is its owner's: plain data, no
//!   locks.
//! * [`Fleet`] is the table behind one mutex, and a gRPC channel to each host's agent.
//!
//! # Locking
//! `table` is one `std` mutex, held for lookups and updates in memory only, never across `.await`.
//! `channels` is a map of its own whose values are cloned out; it is never touched while `table` is
//! locked.

mod errors;
mod placement;
mod table;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dashmap::DashMap;
use slat_proto::{
    ApiError,
    model::{HostName, VmName, VmSpec},
    transport::{TracedChannel, connect},
    v1,
};

use self::{errors::no_such_host, table::Table};

pub(crate) use self::errors::host_unreachable;

/// A host is unreachable when it missed this many reports.
const MISSED_REPORTS: u32 = 3;

/// See the module.
pub(crate) struct Fleet {
    table: Mutex<Table>,
    channels: DashMap<String, (String, TracedChannel)>,
    interval: Duration,
}

/// A VM and the host that owns it, which answers.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    pub(crate) vm: v1::Vm,
    pub(crate) host: v1::Host,
}

impl Fleet {
    pub(crate) fn new(interval: Duration) -> Arc<Self> {
        Arc::new(Self {
            table: Mutex::new(Table::new(interval, interval * MISSED_REPORTS)),
            channels: DashMap::new(),
            interval,
        })
    }

    /// How often agents report.
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that can panic runs under this lock between two related writes.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_channel(&self, host: &str, address: &str) -> Result<(), ApiError> {
        let known = self
            .channels
            .get(host)
            .is_some_and(|entry| entry.0 == address);
        if !known {
            let channel = connect(&address.parse()?)?.relaying();
            self.channels
                .insert(host.to_owned(), (address.to_owned(), channel));
        }
        Ok(())
    }

    /// A host known from the store, not heard of yet.
    pub(crate) fn remember(&self, host: &str, address: &str) -> Result<(), ApiError> {
        HostName::parse(host)?;
        self.set_channel(host, address)?;
        self.table().remember(host, address);
        Ok(())
    }

    /// An agent that starts: its checked name and address.
    pub(crate) fn register(&self, host: v1::Host) -> Result<(), ApiError> {
        self.set_channel(&host.name, &host.address)?;
        self.table().register(host, Instant::now());
        Ok(())
    }

    /// What an agent sees.
    pub(crate) fn report(&self, report: v1::ReportHostRequest) -> Result<(), ApiError> {
        self.table().report(report, Instant::now())
    }

    /// All hosts, by name.
    pub(crate) fn hosts(&self) -> Vec<v1::Host> {
        self.table().hosts(Instant::now())
    }

    /// One host.
    pub(crate) fn host(&self, name: &str) -> Result<v1::Host, ApiError> {
        self.table()
            .host(name, Instant::now())
            .ok_or_else(|| no_such_host(name))
    }

    /// One host that answers.
    pub(crate) fn ready_host(&self, name: &str) -> Result<v1::Host, ApiError> {
        let host = self.host(name)?;
        if host.state() == v1::host::State::Ready {
            Ok(host)
        } else {
            Err(host_unreachable(name).with("last_seen", last_seen(&host)))
        }
    }

    /// All VMs as last seen, by name; each once, by its owner's record.
    pub(crate) fn vms(&self) -> Vec<v1::Vm> {
        self.table().vms(Instant::now())
    }

    /// Names of hosts that do not answer.
    pub(crate) fn unreachable(&self) -> Vec<String> {
        self.hosts()
            .into_iter()
            .filter(|host| host.state() != v1::host::State::Ready)
            .map(|host| host.name)
            .collect()
    }

    /// Hosts that registered and have not reported their VMs yet.
    pub(crate) fn unreported(&self) -> Vec<String> {
        self.table().unreported(Instant::now())
    }

    /// A VM's owner.
    ///
    /// # Errors
    /// NO_SUCH_VM, or HOST_UNREACHABLE when its host does not answer.
    pub(crate) fn owner(&self, vm: &VmName) -> Result<Owner, ApiError> {
        let name = vm.to_string();
        let found = self.table().vm(&name, Instant::now());
        let Some(found) = found else {
            let unreachable = self.unreachable();
            let mut error = ApiError::no_such_vm(vm);
            if !unreachable.is_empty() {
                error = error
                    .with("unreachable", unreachable.join(","))
                    .with("advice", "it may be on a host that does not answer");
            }
            return Err(error);
        };
        let host = self
            .ready_host(&found.host)
            .map_err(|error| error.with("vm", vm))?;
        Ok(Owner { vm: found, host })
    }

    /// The host of a VM's owner, whether it answers or not.
    pub(crate) fn home(&self, vm: &VmName) -> Option<String> {
        let found = self.table().vm(&vm.to_string(), Instant::now());
        found.map(|vm| vm.host)
    }

    /// The way to a host's agent.
    ///
    /// # Errors
    /// NO_SUCH_HOST.
    pub(crate) fn channel(&self, host: &str) -> Result<TracedChannel, ApiError> {
        self.channels
            .get(host)
            .map(|entry| entry.1.clone())
            .ok_or_else(|| no_such_host(host))
    }

    /// Chooses a host for a new VM and keeps its name and memory until the guard is dropped.
    ///
    /// # Errors
    /// VM_EXISTS, NO_SUCH_HOST, HOST_UNREACHABLE, CAPABILITY_MISSING, NO_HOST.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        vm: &VmName,
        spec: &VmSpec,
        host: Option<&HostName>,
    ) -> Result<Reservation, ApiError> {
        let host = self.table().reserve(vm, spec, host, Instant::now())?;
        Ok(Reservation {
            fleet: Arc::clone(self),
            vm: vm.to_string(),
            host,
        })
    }

    /// A VM as a host's agent just answered.
    pub(crate) fn observe(&self, host: &str, vm: v1::Vm) {
        self.table().observe(host, vm, Instant::now());
    }

    /// A VM that a host's agent just deleted.
    pub(crate) fn forget(&self, host: &str, vm: &str) {
        self.table().forget(host, vm, Instant::now());
    }

    /// A VM's epoch is at least this: older records are no owner's.
    pub(crate) fn raise_epoch(&self, uid: &str, epoch: u64) {
        self.table().raise_epoch(uid, epoch);
    }

    /// VMs by state, for the gauges.
    pub(crate) fn vm_states(&self) -> BTreeMap<&'static str, usize> {
        let mut states = BTreeMap::new();
        for vm in self.vms() {
            *states.entry(vm.state().as_str_name()).or_default() += 1;
        }
        states
    }
}

/// A name and memory kept for a VM that is being created.
pub(crate) struct Reservation {
    fleet: Arc<Fleet>,
    vm: String,
    host: String,
}

impl Reservation {
    /// Where it goes.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.fleet.table().unreserve(&self.vm);
    }
}

fn last_seen(host: &v1::Host) -> String {
    host.last_seen_time.map_or_else(
        || "not since the server started".to_owned(),
        |time| time.to_string(),
    )
}
