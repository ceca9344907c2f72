//! The machine with a pager beside it, on the real `/dev/kvm`; skipped where there is none, or no
//! userfaultfd that sees its faults.

mod agent;
mod ahead;
mod arming;
mod copies;
mod fake_pager;
mod refusals;
mod snapshots;
mod watched;

use std::{
    path::PathBuf,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use slat_proto::model::{BackendKind, MemstressPattern, MemstressSpec, Paging, VmSpec};

use self::fake_pager::FakePager;
use super::{super::paging::ServedPagers, *};

const PATIENCE: Duration = Duration::from_secs(60);

/// A machine that serves pagers, in a directory of its own.
struct Host {
    // Ends before the directory goes.
    _served: ServedPagers,
    machine: Arc<Machine>,
    dir: slat_test_dir::TestDir,
}

impl Host {
    fn new() -> Self {
        let dir = slat_test_dir::TestDir::new();
        let machine = Machine::new(
            VmDir::new(dir.path()),
            VmName::parse("web").unwrap(),
            HostName::parse("a").unwrap(),
        )
        .unwrap();
        let served = machine.serve_pagers(&dir.path().join(slat_paging::SOCKET));
        Self {
            _served: served.unwrap(),
            machine,
            dir,
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join(slat_paging::SOCKET)
    }

    fn pager(&self) -> FakePager {
        FakePager::connect(&self.socket())
    }

    /// One that brings only what is touched, until it is told otherwise.
    fn slow_pager(&self) -> FakePager {
        let seen = fake_pager::Seen::default();
        seen.stalls.store(true, Ordering::Relaxed);
        FakePager::connect_as(&self.socket(), Arc::new(seen))
    }

    fn counters(&self) -> v1::GuestCounters {
        let vm = self.machine.snapshot().unwrap();
        assert_eq!(vm.state_message, "");
        vm.guest_counters.expect("memstress counts")
    }

    /// Waits until the guest has written `more` pages than now.
    fn runs_on(&self, more: u64) {
        let goal = self.counters().pages_written + more;
        until("the guest to write", || {
            self.counters().pages_written >= goal
        });
    }

    fn paging(&self) -> Option<v1::PagingStatus> {
        self.machine.snapshot().unwrap().paging
    }

    /// Ends it; its guest has found no error.
    fn finish(self) {
        if self.machine.runs() {
            self.machine.pause().unwrap();
        }
        assert_eq!(self.counters().errors, 0);
        self.machine.delete().unwrap();
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waiting for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A writing guest on KVM.
fn spec(paging: Paging) -> VmSpec {
    VmSpec {
        memory_bytes: 16 << 20,
        vcpus: 2,
        backend: Some(BackendKind::Kvm),
        paging,
        guest: GuestSpec::Memstress(MemstressSpec {
            pattern: MemstressPattern::Random,
            ..MemstressSpec::default()
        }),
        ..fake::spec()
    }
}

/// Whether this host can page guests; says why not.
fn can_page() -> bool {
    let (kinds, why) = crate::backend::available();
    if !kinds.contains(&BackendKind::Kvm) {
        eprintln!("SKIPPED: {why:?}");
        return false;
    }
    match slat_paging::uffd::Uffd::offer() {
        Ok(offer) if offer.protect => true,
        Ok(_) => {
            eprintln!("SKIPPED: this kernel protects no shared memory");
            false
        }
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            false
        }
    }
}

macro_rules! need_paging {
    () => {
        if !can_page() {
            return;
        }
    };
}
use need_paging;
