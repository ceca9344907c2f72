//! The table behind one mutex, and a gRPC channel to each host's agent: what the rest of the server
//! asks of the fleet.
//!
//! # Locking
//! `table` is one `std` mutex, held for lookups and updates in memory only, never across `.await`.
//! `channels` is a map of its own whose values are cloned out; it is never touched while `table` is
//! locked. `saved` is a watch channel that only the writer's task sends to.
//!
//! What a call keeps for its duration ([`Reservation`], `deletion`) is given back when its guard is
//! dropped, under the lock of `table` again.

mod deletion;
mod fence;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dashmap::DashMap;
use slat_proto::{
    ApiError,
    model::{HostName, Labels, VmName, VmRef, VmSpec, duration_nanos},
    transport::{Link, TracedChannel, connect_by},
    v1,
};
use slat_trust::{Credentials, Expects, Kind};
use tokio::sync::{Notify, watch};

pub(crate) use self::fence::BeingFenced;
use super::{
    errors::{host_cordoned, host_unreachable, no_such_host, unreachable_because},
    table::Table,
};
use crate::clock::{Came, Clocks};

/// A host is unreachable when it missed this many reports, unless the server was told a time.
const MISSED_REPORTS: u32 = 3;

/// See the module.
pub(crate) struct Fleet {
    table: Mutex<Table>,
    channels: DashMap<String, (String, TracedChannel)>,
    credentials: Option<Credentials>,
    interval: Duration,
    /// Something is not saved yet.
    pub(super) changed: Notify,
    /// The generation that is on disk.
    pub(super) saved: watch::Sender<u64>,
    clocks: Clocks,
}

/// A VM and the host that owns it, which answers.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    pub(crate) vm: v1::Vm,
    pub(crate) host: v1::Host,
}

impl Fleet {
    /// `silence`: how long a host may be quiet; by default until it has missed a few reports.
    /// By `credentials` it calls agents; without, in the clear.
    pub(crate) fn new(
        interval: Duration,
        silence: Option<Duration>,
        credentials: Option<Credentials>,
    ) -> Arc<Self> {
        let silence = silence.unwrap_or(interval * MISSED_REPORTS);
        Arc::new(Self {
            table: Mutex::new(Table::new(interval, silence)),
            channels: DashMap::new(),
            credentials,
            interval,
            changed: Notify::new(),
            saved: watch::channel(0).0,
            clocks: Clocks::default(),
        })
    }

    /// A channel to a host's agent, and to nobody else, that connects when it is used.
    pub(super) fn channel_to(&self, host: &str, address: &str) -> Result<TracedChannel, ApiError> {
        let name = HostName::parse(host)?.id().to_owned();
        let link = Link::new(self.credentials.as_ref(), Expects::Named(Kind::Agent, name));
        Ok(connect_by(&address.parse()?, &link)?.relaying())
    }

    /// How often agents report.
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that can panic runs under this lock between two related writes.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the table, and wakes the writer when the store has to know.
    fn change<T>(&self, work: impl FnOnce(&mut Table) -> T) -> T {
        let (done, unsaved) = {
            let mut table = self.table();
            let done = work(&mut table);
            (done, !table.unsaved.is_empty())
        };
        if unsaved {
            self.changed.notify_one();
        }
        done
    }

    pub(super) fn set_channel(&self, host: &str, address: &str, channel: TracedChannel) {
        self.channels
            .insert(host.to_owned(), (address.to_owned(), channel));
    }

    /// Refuses an agent whose name is another's, or whose host is being deleted.
    ///
    /// # Errors
    /// HOST_NAME_TAKEN, HOST_DELETED.
    pub(crate) fn admit(&self, host: &v1::Host) -> Result<(), ApiError> {
        self.table().admit(host, Instant::now())
    }

    /// An agent that starts: its checked name and address. It is READY when it was called back.
    ///
    /// # Errors
    /// HOST_NAME_TAKEN, HOST_DELETED; BAD_PARAMETER when the address makes no URI.
    pub(crate) fn register(&self, host: v1::Host) -> Result<(), ApiError> {
        let (name, address) = (host.name.clone(), host.address.clone());
        let channel = self.channel_to(&name, &address)?;
        let same = self.change(|table| table.register(host, Instant::now()))?;
        let connected = self
            .channels
            .get(&name)
            .is_some_and(|known| known.0 == address);
        // Of an earlier start a connection may be left that nobody answers any more.
        if !(same && connected) {
            self.set_channel(&name, &address, channel);
        }
        Ok(())
    }

    /// What an agent sees. What comes back is for [`Clocks::answered`].
    ///
    /// # Errors
    /// STALE_INCARNATION, HOST_DELETED.
    pub(crate) fn report(
        &self,
        mut report: v1::ReportHostRequest,
    ) -> Result<Option<Came>, ApiError> {
        // A report that will be refused says nothing of the host's clock.
        self.table().may_report(&report)?;
        let came = self.clocks.came(&report);
        for vm in &mut report.vms {
            self.clocks.vm_from(&report.host, vm);
        }
        self.change(|table| table.report(report, Instant::now()))?;
        Ok(came)
    }

    /// The hosts' clocks.
    pub(crate) fn clocks(&self) -> &Clocks {
        &self.clocks
    }

    /// By how much a host's clock is ahead of the server's, as measured, in milliseconds.
    pub(crate) fn ahead_ms(&self, host: &str) -> i64 {
        let offset = self.clocks.offset(host);
        let nanos = offset.as_ref().map_or(0, duration_nanos);
        i64::try_from(nanos / 1_000_000).unwrap_or(0)
    }

    fn with_clock(&self, mut host: v1::Host) -> v1::Host {
        host.clock_offset = self.clocks.offset(&host.name);
        host
    }

    /// All hosts, by name.
    pub(crate) fn hosts(&self) -> Vec<v1::Host> {
        let hosts = self.table().hosts(Instant::now());
        hosts
            .into_iter()
            .map(|host| self.with_clock(host))
            .collect()
    }

    /// One host.
    pub(crate) fn host(&self, name: &str) -> Result<v1::Host, ApiError> {
        let host = self.table().host(name, Instant::now());
        host.map(|host| self.with_clock(host))
            .ok_or_else(|| no_such_host(name))
    }

    /// One host that answers.
    pub(crate) fn ready_host(&self, name: &str) -> Result<v1::Host, ApiError> {
        let host = self.host(name)?;
        if host.state() == v1::host::State::Ready {
            Ok(host)
        } else {
            Err(unreachable_because(&host))
        }
    }

    /// One host that answers and takes VMs.
    ///
    /// # Errors
    /// NO_SUCH_HOST, HOST_UNREACHABLE, HOST_CORDONED.
    pub(crate) fn open_host(&self, name: &str) -> Result<v1::Host, ApiError> {
        let host = self.ready_host(name)?;
        if host.cordoned {
            return Err(host_cordoned(name));
        }
        Ok(host)
    }

    /// Stops or begins to choose a host for VMs and migrations.
    ///
    /// # Errors
    /// NO_SUCH_HOST.
    pub(crate) fn cordon(&self, host: &str, cordoned: bool) -> Result<v1::Host, ApiError> {
        self.change(|table| table.cordon(host, cordoned))?;
        self.host(host)
    }

    /// All VMs as last seen, by name, then uid; each once, by the record that counts.
    pub(crate) fn vms(&self) -> Vec<v1::Vm> {
        self.table().vms(Instant::now())
    }

    /// Hosts whose VMs may be missing or stale: they do not answer, or have not reported since the
    /// server started.
    pub(crate) fn silent(&self) -> Vec<String> {
        self.table().silent(Instant::now())
    }

    /// Of these, hosts that have not reported.
    pub(crate) fn unreported(&self) -> Vec<String> {
        self.table().unreported()
    }

    /// Hosts whose agent registered and has not told its VMs yet.
    pub(crate) fn untold(&self) -> Vec<String> {
        self.table().untold(Instant::now())
    }

    /// Names that several VMs have.
    pub(crate) fn name_conflicts(&self) -> usize {
        self.table().counting(Instant::now()).conflicting_names()
    }

    /// The VM that is meant, as last seen, whether its host answers or not.
    ///
    /// # Errors
    /// NO_SUCH_VM, NAME_CONFLICT.
    pub(crate) fn find(&self, vm: &VmRef) -> Result<v1::Vm, ApiError> {
        if let Some(found) = self.table().vm(vm, Instant::now())? {
            return Ok(found);
        }
        let silent = self.silent();
        let mut error = vm.not_here();
        if !silent.is_empty() {
            error = error
                .with("unreachable", silent.join(","))
                .with("advice", "it may be on a host that does not answer");
        }
        Err(error)
    }

    /// A VM's owner.
    ///
    /// # Errors
    /// NO_SUCH_VM, NAME_CONFLICT, or HOST_UNREACHABLE when its host does not answer.
    pub(crate) fn owner(&self, vm: &VmRef) -> Result<Owner, ApiError> {
        let found = self.find(vm)?;
        let host = self
            .ready_host(&found.host)
            .map_err(|error| error.with("vm", &found.name).with("uid", &found.uid))?;
        Ok(Owner { vm: found, host })
    }

    /// The host of a VM's owner, whether it answers or not.
    pub(crate) fn home(&self, uid: &str) -> Option<String> {
        let table = self.table();
        let home = table.counting(Instant::now()).get(uid);
        home.map(|seen| seen.vm.host.clone())
    }

    /// An agent's answer as the fleet shows it.
    pub(crate) fn shown(&self, mut vm: v1::Vm) -> v1::Vm {
        let table = self.table();
        let vms = table.counting(Instant::now());
        vm.conflicts = vms.conflicts_of(&vm.name, &vm.uid);
        vm.last_seen_time = Some(slat_proto::model::now());
        vm.stale = false;
        vm
    }

    /// The way to a host's agent.
    ///
    /// # Errors
    /// NO_SUCH_HOST; HOST_UNREACHABLE: it has to register first.
    pub(crate) fn channel(&self, host: &str) -> Result<TracedChannel, ApiError> {
        let known = self.channels.get(host).map(|entry| entry.1.clone());
        known.ok_or_else(|| match self.host(host) {
            Ok(_) => host_unreachable(host),
            Err(error) => error,
        })
    }

    /// Chooses a host for a new VM, of those that have the labels `among`, and keeps its name and
    /// memory until the guard is dropped.
    ///
    /// # Errors
    /// VM_EXISTS, NO_SUCH_HOST, HOST_UNREACHABLE, HOST_CORDONED, CAPABILITY_MISSING, NO_HOST.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        vm: &VmName,
        spec: &VmSpec,
        host: Option<&HostName>,
        among: &Labels,
    ) -> Result<Reservation, ApiError> {
        let host = self
            .table()
            .reserve(vm, spec, host, among, Instant::now())?;
        Ok(Reservation {
            fleet: Arc::clone(self),
            vm: vm.to_string(),
            host,
        })
    }

    /// A VM as a host's agent just answered.
    pub(crate) fn observe(&self, host: &str, vm: v1::Vm) {
        self.change(|table| table.observe(host, vm, Instant::now()));
    }

    /// A lost VM of which nothing is left on any host is shown until it is deleted. It needs its
    /// host, uid and epoch.
    pub(crate) fn bury(&self, vm: v1::Vm) {
        self.change(|table| table.bury(vm));
    }

    /// A VM was handed over to a host that does not answer: it is shown there, as it was last seen,
    /// until that host reports. It needs its host, uid and epoch.
    pub(crate) fn expect(&self, vm: v1::Vm) {
        self.change(|table| table.expect(vm));
    }

    /// A VM that a host's agent just deleted, by uid.
    pub(crate) fn forget(&self, host: &str, uid: &str) {
        self.change(|table| table.forget(host, uid, Instant::now()));
    }

    /// A VM's epoch is at least this: older records are no owner's.
    pub(crate) fn raise_epoch(&self, uid: &str, epoch: u64) {
        self.change(|table| table.raise_epoch(uid, epoch));
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
        self.fleet.table().reservations.remove(&self.vm);
    }
}
