//! The store on a disk that fails: what is said, and that it goes on when the disk does.

use std::{
    fs::File,
    io,
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use redb::{BackendError, Database, DatabaseError, StorageBackend, backends::FileBackend};
use slat_proto::{ApiError, Reason, v1};
use tokio::time::timeout;

use super::{BlockingStore, ListQuery, SourceStart, StoredMigration, probe};

const LONG: Duration = Duration::from_secs(30);
pub(crate) const EIO: i32 = 5;
pub(crate) const ENOSPC: i32 = 28;

/// A disk whose writes fail with an error of the kernel while it is set; 0: they do not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fault(Arc<AtomicI32>);

impl Fault {
    pub(crate) fn set(&self, errno: i32) {
        self.0.store(errno, Ordering::SeqCst);
    }

    fn check(&self) -> io::Result<()> {
        match self.0.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// A store on such a disk.
    pub(crate) fn open(&self, directory: &std::path::Path) -> BlockingStore {
        let fault = self.clone();
        let attach = move |file: File| -> Result<Database, DatabaseError> {
            let fault = fault.clone();
            let inner = FileBackend::new(file)?;
            Database::builder().create_with_backend(FaultyFile { inner, fault })
        };
        BlockingStore::open_with(directory, Arc::new(attach)).unwrap()
    }
}

#[derive(Debug)]
struct FaultyFile {
    inner: FileBackend,
    fault: Fault,
}

impl StorageBackend for FaultyFile {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.fault.check()?;
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.fault.check()?;
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.fault.check()?;
        self.inner.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }
}

fn record(name: &str) -> StoredMigration {
    StoredMigration {
        migration: Some(v1::Migration {
            name: name.into(),
            ..Default::default()
        }),
        source_released: false,
        destination_released: false,
        source_start: SourceStart::Never.into(),
        ..Default::default()
    }
}

async fn put(store: &BlockingStore, name: &str) -> Result<(), ApiError> {
    let record = record(name);
    let written = store.with(move |store| store.put_migration(&record)).await;
    written.map_err(ApiError::from)
}

async fn names(store: &BlockingStore) -> Vec<String> {
    let query = ListQuery {
        limit: 10,
        ..Default::default()
    };
    let found = store.with(move |store| store.migrations(&query)).await;
    let names = found.unwrap().into_iter().filter_map(|one| one.migration);
    names.map(|migration| migration.name).collect()
}

#[tokio::test]
async fn a_store_that_failed_is_opened_again_when_the_disk_writes() {
    for (errno, reason) in [(ENOSPC, Reason::DiskFull), (EIO, Reason::Store)] {
        let directory = slat_test_dir::TestDir::new();
        let fault = Fault::default();
        let store = fault.open(directory.path());
        put(&store, "migrations/before").await.unwrap();

        fault.set(errno);
        let error = put(&store, "migrations/lost").await.unwrap_err();
        assert_eq!(error.reason, reason, "{error}");
        let path = directory.path().join("slat-server.redb");
        assert_eq!(error.metadata["path"], path.display().to_string());
        assert!(!error.metadata["advice"].is_empty());
        assert_eq!(store.trouble().borrow().as_ref().unwrap().reason, reason);
        // Answered at once, with what closed it.
        let error = put(&store, "migrations/lost").await.unwrap_err();
        assert_eq!(error.reason, reason, "{error}");

        fault.set(0);
        let mut trouble = store.trouble();
        let probing = tokio::spawn(probe(store.clone()));
        timeout(LONG, trouble.wait_for(Option::is_none))
            .await
            .expect("it does not recover")
            .unwrap();
        put(&store, "migrations/after").await.unwrap();
        let kept = names(&store).await;
        assert!(kept.contains(&"migrations/before".to_owned()), "{kept:?}");
        assert!(kept.contains(&"migrations/after".to_owned()), "{kept:?}");
        probing.abort();
    }
}

#[tokio::test]
async fn a_full_disk_is_found_before_anybody_writes() {
    let directory = slat_test_dir::TestDir::new();
    let fault = Fault::default();
    let store = fault.open(directory.path());
    let mut trouble = store.trouble();
    let probing = tokio::spawn(probe(store.clone()));
    fault.set(ENOSPC);
    let found = timeout(LONG, trouble.wait_for(Option::is_some)).await;
    let found = found.expect("nobody notices").unwrap().clone();
    assert_eq!(found.unwrap().reason, Reason::DiskFull);
    probing.abort();
}
