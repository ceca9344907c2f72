//! Whether a VM could live on this host: ports, filled by the binary, since only the code of VM
//! processes knows backends, CPUs and guest memory; which backends there are now, and whether
//! memory can be watched.
//!
//! # Backends come and go
//! A module is loaded or unloaded, a device is passed in or its permissions change. So the agent
//! looks again: at every tick of one task, and before a VM is made, tried or announced
//! ([`Backends::fresh`]). A whole look makes a VM on KVM, which the kernel tells udev of. Where KVM
//! worked and the device's file is what it was, the task therefore looks whole only now and then.
//!
//! # Locking
//! `looked` is held over a whole look, by blocking threads alone, so that an older answer never
//! replaces a newer one. What was found is in a watch channel, whose lock is a leaf.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError,
    model::{BackendKind, VmSpec},
    v1,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Compares what a VM's source said of itself with this host. Takes nothing; may block on the
/// kernel.
pub type Admit =
    Arc<dyn Fn(&v1::PrepareIncomingRequest) -> Result<v1::ChosenVersions, ApiError> + Send + Sync>;

/// Compares what a new VM's memory is to be made of with this host. Takes nothing; may block on the
/// kernel.
pub type Fits = fn(&VmSpec) -> Result<(), ApiError>;

/// Backends of this host's VM processes, best first, and why KVM is not among them; asked again and
/// again. May block.
pub type Look = fn() -> (Vec<BackendKind>, Option<String>);

/// Whose file says cheaply that KVM may have come or gone.
const DEVICE: &str = "/dev/kvm";
/// Between two looks at that file.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long KVM is taken to work while its file stays as it is.
const GOOD: Duration = Duration::from_secs(30);
/// The same for a request: many VMs that are made at once need one look.
const FRESH: Duration = Duration::from_secs(1);

/// What works here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Best first.
    pub(super) kinds: Vec<BackendKind>,
    /// Why KVM is missing.
    pub(super) why_not_kvm: Option<String>,
    /// VMs on KVM can have dirty rings.
    pub(super) dirty_rings: bool,
    /// What the kernel can do for VMs whose memory is watched.
    pub(super) paging: v1::HostPaging,
}

impl Found {
    pub(super) fn has(&self, kind: BackendKind) -> bool {
        self.kinds.contains(&kind)
    }

    /// What a VM gets that asks for no backend. A format without a backend means the software
    /// backend: on KVM the kernel chooses.
    pub(super) fn choice(&self, spec: &v1::VmSpec) -> Option<BackendKind> {
        match spec.format() {
            v1::Format::Unspecified => self.kinds.first().copied(),
            _ => Some(BackendKind::Software),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Backends {
    look: Look,
    rings: fn() -> bool,
    paging: fn() -> v1::HostPaging,
    device: PathBuf,
    looked: Mutex<Option<(Instant, Option<Mark>)>>,
    found: watch::Sender<Found>,
}

/// What a device's file was; another one is another.
type Mark = [i64; 6];

fn mark(device: &Path) -> Option<Mark> {
    let file = std::fs::metadata(device).ok()?;
    Some([
        file.dev().cast_signed(),
        file.ino().cast_signed(),
        file.rdev().cast_signed(),
        file.mode().into(),
        file.ctime(),
        file.ctime_nsec(),
    ])
}

impl Backends {
    /// Nothing is known before the first [`Backends::fresh`].
    pub(super) fn new(
        look: Look,
        rings: fn() -> bool,
        paging: fn() -> v1::HostPaging,
    ) -> Arc<Self> {
        Self::by(look, rings, paging, DEVICE.into())
    }

    fn by(
        look: Look,
        rings: fn() -> bool,
        paging: fn() -> v1::HostPaging,
        device: PathBuf,
    ) -> Arc<Self> {
        Arc::new(Self {
            look,
            rings,
            paging,
            device,
            looked: Mutex::default(),
            found: watch::Sender::default(),
        })
    }

    /// As last found.
    pub(super) fn get(&self) -> Found {
        self.found.borrow().clone()
    }

    /// Says when something else is found.
    pub(super) fn changes(&self) -> watch::Receiver<Found> {
        self.found.subscribe()
    }

    /// As it is now, or was a moment ago.
    pub(super) async fn fresh(self: &Arc<Self>) -> Found {
        self.ask(FRESH).await;
        self.get()
    }

    /// Looks again and again until `stop`.
    pub(super) async fn keep(self: Arc<Self>, stop: CancellationToken) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            // To find that it cannot be opened costs next to nothing.
            let works = self.found.borrow().has(BackendKind::Kvm);
            self.ask(if works { GOOD } else { INTERVAL / 2 }).await;
        }
    }

    async fn ask(self: &Arc<Self>, good: Duration) {
        let me = Arc::clone(self);
        // It opens /dev/kvm: off the runtime's threads.
        if let Err(error) = tokio::task::spawn_blocking(move || me.look(good)).await
            && error.is_panic()
        {
            tracing::error!(%error, "looking for backends failed");
        }
    }

    /// Looks, unless that was done less than `good` ago and the device's file is as it was then.
    fn look(&self, good: Duration) {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let mark = mark(&self.device);
        if looked
            .as_ref()
            .is_some_and(|(at, was)| *was == mark && at.elapsed() < good)
        {
            return;
        }
        let first = looked.is_none();
        let (kinds, why_not_kvm) = (self.look)();
        let kvm = kinds.contains(&BackendKind::Kvm);
        let now = Found {
            kinds,
            why_not_kvm,
            // Without KVM nobody is asked: the answer may be kept for good.
            dirty_rings: kvm && (self.rings)(),
            paging: (self.paging)(),
        };
        *looked = Some((Instant::now(), mark));
        self.found.send_if_modified(|found| {
            let had = found.has(BackendKind::Kvm);
            match &now.why_not_kvm {
                _ if first || had == kvm => {}
                Some(why) if !kvm => tracing::warn!(why, "KVM does not work here any more"),
                _ => tracing::info!("KVM works here now"),
            }
            let news = *found != now;
            *found = now;
            news
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn what_worked_is_tried_again_when_its_file_changed_or_time_went_by() {
        static LOOKS: AtomicUsize = AtomicUsize::new(0);
        let folder = slat_test_dir::TestDir::new();
        let device = folder.path().join("kvm");
        let look: Look = || {
            LOOKS.fetch_add(1, Ordering::Relaxed);
            (vec![BackendKind::Kvm, BackendKind::Software], None)
        };
        let looks = || LOOKS.load(Ordering::Relaxed);
        let backends = Backends::by(look, || true, v1::HostPaging::default, device.clone());
        let mut changes = backends.changes();
        backends.look(GOOD);
        backends.look(GOOD);
        assert_eq!(looks(), 1);
        assert!(changes.borrow_and_update().dirty_rings);
        std::fs::write(&device, "").unwrap();
        backends.look(GOOD);
        assert_eq!(looks(), 2, "the file came");
        std::fs::remove_file(&device).unwrap();
        backends.look(GOOD);
        assert_eq!(looks(), 3, "the file went");
        backends.look(Duration::ZERO);
        assert_eq!(looks(), 4);
        assert!(!changes.has_changed().unwrap(), "found the same each time");
    }

    #[test]
    fn who_asks_for_no_backend_gets_the_best_unless_a_format_says_more() {
        let found = Found {
            kinds: vec![BackendKind::Kvm, BackendKind::Software],
            ..Found::default()
        };
        let mut spec = v1::VmSpec::default();
        assert_eq!(found.choice(&spec), Some(BackendKind::Kvm));
        assert_eq!(Found::default().choice(&spec), None);
        spec.set_format(v1::Format::Ept4);
        assert_eq!(found.choice(&spec), Some(BackendKind::Software));
    }
}
