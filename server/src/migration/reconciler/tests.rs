//! The driver with a disk that hangs: nothing is said or begun before the disk has it, and no input
//! waits for it.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{mpsc, oneshot, watch};

use super::*;
use crate::store::{
    FleetStore, ListQuery, Prune, SeenChanges, SeenFleet, Store, StoreError, StoredMigration,
    tests::{ENOSPC, Fault},
};

/// A store that writes while the test lets it.
#[derive(Clone)]
struct SlowStore {
    gate: Arc<Mutex<()>>,
    written: watch::Sender<Vec<Phase>>,
    begun: watch::Sender<usize>,
}

impl Store for SlowStore {
    fn put_migration(&self, record: &StoredMigration) -> Result<(), StoreError> {
        self.begun.send_modify(|begun| *begun += 1);
        let _open: MutexGuard<'_, ()> = self.gate.lock().unwrap();
        let phase = record.migration.as_ref().unwrap().phase();
        self.written.send_modify(|written| written.push(phase));
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

impl FleetStore for SlowStore {
    fn put_seen(&self, _: &SeenChanges) -> Result<(), StoreError> {
        Ok(())
    }

    fn seen(&self) -> Result<SeenFleet, StoreError> {
        Ok(SeenFleet::default())
    }
}

/// With keys in a directory that goes at once: they are held.
fn grants() -> Arc<Grants> {
    let directory = slat_test_dir::TestDir::new();
    let clock = Arc::new(std::time::SystemTime::now);
    Arc::new(Grants::open(directory.path(), clock).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_is_taken_in_while_the_disk_hangs_and_answered_when_it_does_not() {
    let store = SlowStore {
        gate: Arc::default(),
        written: watch::channel(Vec::new()).0,
        begun: watch::channel(0).0,
    };
    let vm = v1::Vm {
        name: "vms/web".into(),
        host: "hosts/a".into(),
        ..Default::default()
    };
    let params = v1::MigrationParams::default();
    let record = Record::new("migrations/m".into(), &vm, "hosts/b".into(), params);
    let (shown, seen) = watch::channel(record.migration().clone());
    let (commands, inbox) = mpsc::channel(1);
    let context = Context {
        pairs: Arc::default(),
        fleet: Fleet::new(Duration::from_secs(1), None, None),
        store: BlockingStore::new(store.clone()),
        history: Arc::new(History::new(std::time::Duration::from_secs(1))),
        grants: grants(),
    };
    let reconciler = Reconciler::new(
        context,
        record,
        shown,
        inbox,
        Released::default(),
        Timeline::begin(None),
    );
    let gate = Arc::clone(&store.gate);
    // Held by a thread of its own: a guard does not cross an await.
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let (closed, is_closed) = oneshot::channel();
    let holder = std::thread::spawn(move || {
        let _closed = gate.lock().unwrap();
        closed.send(()).unwrap();
        opened.recv().unwrap();
    });
    is_closed.await.unwrap();
    let run = tokio::spawn(reconciler.run(Vec::new(), CancellationToken::new()));
    let mut begun = store.begun.subscribe();
    begun.wait_for(|begun| *begun == 1).await.unwrap();

    let (reply, mut answer) = oneshot::channel();
    commands.send(Command::Cancel(reply)).await.unwrap();
    // The inbox is free again: the cancel was taken in.
    let permit = commands.reserve().await.unwrap();
    drop(permit);
    assert!(answer.try_recv().is_err(), "answered before it is on disk");
    assert_eq!(seen.borrow().phase(), Phase::Pending);

    open.send(()).unwrap();
    let answer = answer.await.unwrap().unwrap();
    assert_eq!(answer.phase(), Phase::Cancelled);
    run.await.unwrap();
    // Nobody was asked: there is no such host, and it did not fail.
    assert_eq!(
        *store.written.borrow(),
        [Phase::Preparing, Phase::Cancelled]
    );
    assert_eq!(seen.borrow().phase(), Phase::Cancelled);
    holder.join().unwrap();
}

/// The disk is full when the migration begins, and has room again later.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_waits_for_a_full_disk_and_goes_on_when_it_is_not() {
    let directory = slat_test_dir::TestDir::new();
    let fault = Fault::default();
    let store = fault.open(directory.path());
    let vm = v1::Vm {
        name: "vms/web".into(),
        host: "hosts/a".into(),
        ..Default::default()
    };
    let params = v1::MigrationParams::default();
    let record = Record::new("migrations/m".into(), &vm, "hosts/b".into(), params);
    let (shown, mut seen) = watch::channel(record.migration().clone());
    let (_commands, inbox) = mpsc::channel(1);
    let context = Context {
        fleet: Fleet::new(Duration::from_secs(1), None, None),
        store: store.clone(),
        history: Arc::new(History::new(std::time::Duration::from_secs(1))),
        grants: grants(),
        pairs: Arc::default(),
    };
    fault.set(ENOSPC);
    let reconciler = Reconciler::new(
        context,
        record,
        shown,
        inbox,
        Released::default(),
        Timeline::begin(None),
    );
    let run = tokio::spawn(reconciler.run(Vec::new(), CancellationToken::new()));
    let mut trouble = store.trouble();
    trouble.wait_for(Option::is_some).await.unwrap();
    assert_eq!(
        seen.borrow().phase(),
        Phase::Pending,
        "shown before it is on disk"
    );

    fault.set(0);
    // There is no such host: it fails, which is on disk before it is shown.
    let ended = seen.wait_for(|shown| has_ended(shown.phase()));
    let ended = tokio::time::timeout(Duration::from_secs(30), ended).await;
    assert_eq!(ended.unwrap().unwrap().phase(), Phase::Failed);
    let stored = store.with(|store| store.migration("migrations/m")).await;
    let stored = stored.unwrap().unwrap().migration.unwrap();
    assert_eq!(stored.phase(), Phase::Failed);
    run.abort();
}
