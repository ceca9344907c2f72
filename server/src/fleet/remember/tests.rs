//! Remembering with a disk that fails and one that hangs.

use std::sync::Mutex;

use tokio::sync::watch;

use super::*;
use crate::store::{FleetStore, ListQuery, Prune, Store, StoredMigration};

/// A store whose writes fail until told otherwise, or wait at a gate.
#[derive(Clone)]
struct Disk {
    full: watch::Sender<bool>,
    gate: Arc<Mutex<()>>,
    tried: watch::Sender<usize>,
    written: watch::Sender<Vec<SeenChanges>>,
}

impl FleetStore for Disk {
    fn put_seen(&self, changes: &SeenChanges) -> Result<(), StoreError> {
        self.tried.send_modify(|tried| *tried += 1);
        let _open = self.gate.lock().unwrap();
        if *self.full.borrow() {
            return Err(StoreError::Transaction {
                operation: "write",
                source: "the disk is full".into(),
            });
        }
        self.written
            .send_modify(|written| written.push(changes.clone()));
        Ok(())
    }

    fn seen(&self) -> Result<SeenFleet, StoreError> {
        Ok(SeenFleet::default())
    }
}

impl Store for Disk {
    fn put_migration(&self, _: &StoredMigration) -> Result<(), StoreError> {
        Ok(())
    }

    fn migration(&self, _: &str) -> Result<Option<StoredMigration>, StoreError> {
        Ok(None)
    }

    fn migrations(&self, _: &ListQuery) -> Result<Vec<StoredMigration>, StoreError> {
        Ok(Vec::new())
    }

    fn open_migrations(&self) -> Result<Vec<StoredMigration>, StoreError> {
        Ok(Vec::new())
    }

    fn prune_migrations(&self, _: &Prune) -> Result<usize, StoreError> {
        Ok(0)
    }

    fn put_host(&self, _: &str, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    fn probe(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// A fleet with host a, its writer and its disk.
struct Rig {
    fleet: Arc<Fleet>,
    disk: Disk,
    stop: CancellationToken,
    writer: tokio::task::JoinHandle<()>,
}

impl Rig {
    fn start() -> Self {
        let fleet = Fleet::new(Duration::from_secs(1), None, None);
        let disk = Disk {
            full: watch::channel(false).0,
            gate: Arc::default(),
            tried: watch::channel(0).0,
            written: watch::channel(Vec::new()).0,
        };
        let stop = CancellationToken::new();
        let store = BlockingStore::new(disk.clone());
        let writer = tokio::spawn(remember(Arc::clone(&fleet), store, stop.clone()));
        let host = v1::Host {
            name: "hosts/a".into(),
            address: "127.0.0.1:1".into(),
            incarnation: "1".into(),
            ..Default::default()
        };
        fleet.register(host).unwrap();
        Self {
            fleet,
            disk,
            stop,
            writer,
        }
    }

    fn report(&self, epoch: u64) {
        let vm = v1::Vm {
            name: "vms/web".into(),
            uid: "u".into(),
            epoch,
            state: v1::vm::State::Running.into(),
            ..Default::default()
        };
        let report = v1::ReportHostRequest {
            host: "hosts/a".into(),
            incarnation: "1".into(),
            vms: vec![vm],
            ..Default::default()
        };
        self.fleet.report(report).unwrap();
    }

    /// The epoch of the VM as it is on disk.
    fn on_disk(&self) -> Option<u64> {
        let written = self.disk.written.borrow();
        let vms = written.iter().flat_map(|changes| &changes.vms);
        vms.last().and_then(|(_, vm)| Some(vm.as_ref()?.epoch))
    }

    async fn tried_again(&self) {
        let mut tried = self.disk.tried.subscribe();
        let now = *tried.borrow_and_update();
        let again = tried.wait_for(|tried| *tried > now);
        timeout(Duration::from_secs(20), again)
            .await
            .unwrap()
            .unwrap();
    }

    async fn end(self) {
        self.stop.cancel();
        self.writer.await.unwrap();
    }
}

#[tokio::test]
async fn what_could_not_be_written_is_written_when_the_disk_allows() {
    let rig = Rig::start();
    rig.fleet.settled().await.unwrap();
    rig.disk.full.send_replace(true);
    rig.report(1);
    let refused = rig.fleet.settled().await.unwrap_err();
    assert_eq!(refused.reason, Reason::Store);
    rig.report(2);
    rig.tried_again().await;
    assert_eq!(rig.on_disk(), None);
    rig.disk.full.send_replace(false);
    // The attempt that was just counted may be the one that finds room.
    let settled = async { while rig.fleet.settled().await.is_err() {} };
    timeout(Duration::from_secs(20), settled).await.unwrap();
    // The newest, in one write.
    assert_eq!(rig.on_disk(), Some(2));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_hangs_holds_nobody_up_for_long_and_the_end_writes_what_is_left() {
    let rig = Rig::start();
    rig.fleet.settled().await.unwrap();
    let tried = *rig.disk.tried.borrow();
    let (closed, is_closed) = std::sync::mpsc::channel();
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let gate = Arc::clone(&rig.disk.gate);
    let holder = std::thread::spawn(move || {
        let _closed = gate.lock().unwrap();
        closed.send(()).unwrap();
        // Ends when the other end goes, too.
        let _ended = opened.recv();
    });
    is_closed.recv().unwrap();
    rig.report(1);
    // Bounded by itself: an error, not a wait.
    rig.fleet.settled_report().await.unwrap_err();
    rig.report(2);
    rig.fleet.settled_report().await.unwrap_err();
    assert_eq!(*rig.disk.tried.borrow(), tried + 1, "one write at a time");
    open.send(()).unwrap();
    let disk = rig.disk.clone();
    rig.end().await;
    holder.join().unwrap();
    let written = disk.written.borrow().clone();
    let last = written.iter().flat_map(|changes| &changes.vms).last();
    assert_eq!(last.unwrap().1.as_ref().unwrap().epoch, 2);
}

#[tokio::test]
async fn a_host_whose_address_is_not_called_any_more_is_known_and_silent() {
    let directory = slat_test_dir::TestDir::new();
    let ca = slat_trust::pki::Ca::init(&directory.path().join("ca"), "example.org").unwrap();
    let own = directory.path().join("own");
    ca.issue(slat_trust::Kind::Server, "one", None, &own)
        .unwrap();
    let credentials = slat_trust::Credentials::load(&own).unwrap();
    let fleet = Fleet::new(Duration::from_secs(1), None, Some(credentials));
    let host = |name: &str, address: &str| v1::Host {
        name: name.into(),
        address: address.into(),
        ..Default::default()
    };
    let seen = SeenFleet {
        hosts: vec![
            host("hosts/a", "unix:/run/a.sock"),
            host("hosts/b", "127.0.0.1:1"),
        ],
        ..SeenFleet::default()
    };
    fleet.restore(seen).unwrap();
    fleet.host("hosts/a").unwrap();
    let refused = fleet.channel("hosts/a").unwrap_err();
    assert_eq!(refused.reason, slat_proto::Reason::HostUnreachable);
    fleet.channel("hosts/b").unwrap();
    let unknown = fleet.channel("hosts/c").unwrap_err();
    assert_eq!(unknown.reason, slat_proto::Reason::NoSuchHost);
}
