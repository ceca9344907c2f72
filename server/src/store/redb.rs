//! The store in one redb file, `slat-server.redb`, with mode 0600 in a directory with mode 0700.
//!
//! Tables: `migrations` (name → record), `migrations_by_time` (creation in nanoseconds, name →
//! nothing), `migrations_open` (names with work left), `hosts` (name → address) and `probe` (a
//! number that grows). The three of a migration change in one transaction.
//!
//! redb locks the file, so a second server on the same directory is refused at start. After an I/O
//! error redb answers nothing more until it is opened again: [`super::keeper`] does that.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use prost::Message as _;
use redb::{
    Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition,
    backends::FileBackend,
};

use super::{
    contract::{ListQuery, Store},
    error::StoreError,
    record::StoredMigration,
};

const MIGRATIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("migrations");
const BY_TIME: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("migrations_by_time");
const OPEN: TableDefinition<'_, &str, ()> = TableDefinition::new("migrations_open");
const HOSTS: TableDefinition<'_, &str, &str> = TableDefinition::new("hosts");

const PROBE: TableDefinition<'_, (), u64> = TableDefinition::new("probe");

const FILE: &str = "slat-server.redb";

/// See the module.
pub(crate) struct RedbStore {
    database: Database,
}

/// How the database is put on its file: a port, so that a test can stand between the two.
pub(super) type Attach = dyn Fn(File) -> Result<Database, DatabaseError> + Send + Sync;

/// Straight.
pub(super) fn attach(file: File) -> Result<Database, DatabaseError> {
    Database::builder().create_with_backend(FileBackend::new(file)?)
}

/// The store's file in a directory.
pub(super) fn file_in(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

fn failed<E: Into<redb::Error>>(operation: &'static str) -> impl FnOnce(E) -> StoreError {
    move |source| match source.into() {
        redb::Error::Io(source) => StoreError::Disk {
            operation,
            path: FILE.into(),
            source,
        },
        other => StoreError::Transaction {
            operation,
            source: other.into(),
        },
    }
}

/// Nanoseconds since 1970 of a migration's creation; the order of lists.
fn creation(record: &StoredMigration) -> u64 {
    let time = record
        .migration
        .as_ref()
        .and_then(|migration| migration.create_time)
        .unwrap_or_default();
    let seconds = u64::try_from(time.seconds).unwrap_or_default();
    let nanos = u64::try_from(time.nanos).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

fn name_of(record: &StoredMigration) -> &str {
    record
        .migration
        .as_ref()
        .map_or("", |migration| migration.name.as_str())
}

fn decode(key: &str, bytes: &[u8]) -> Result<StoredMigration, StoreError> {
    let bad = |message: String| StoreError::Record {
        table: "migrations",
        key: key.to_owned(),
        message,
    };
    let record = StoredMigration::decode(bytes).map_err(|error| bad(error.to_string()))?;
    if name_of(&record) != key {
        return Err(bad(format!("it names itself \"{}\"", name_of(&record))));
    }
    Ok(record)
}

impl RedbStore {
    /// Opens or makes the store in `directory`.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another server has it, [`StoreError::Disk`] or
    /// [`StoreError::Open`] otherwise.
    #[cfg(test)]
    pub(crate) fn open(directory: &Path) -> Result<Self, StoreError> {
        Self::open_with(directory, &attach)
    }

    /// [`RedbStore::open`], with the database put on its file in this way.
    pub(super) fn open_with(directory: &Path, attach: &Attach) -> Result<Self, StoreError> {
        let disk = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Disk {
                operation: "open the store",
                path,
                source,
            }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(disk(directory))?;
        let path = file_in(directory);
        // Made here so that it never exists with a wider mode.
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(disk(&path))?;
        let database = attach(file).map_err(|error| match redb::Error::from(error) {
            redb::Error::DatabaseAlreadyOpen => StoreError::InUse { path: path.clone() },
            redb::Error::Io(source) => disk(&path)(source),
            other => StoreError::Open {
                path: path.clone(),
                source: other.into(),
            },
        })?;
        let store = Self { database };
        store.make_tables().map_err(|error| error.in_file(&path))?;
        Ok(store)
    }

    fn make_tables(&self) -> Result<(), StoreError> {
        let write = self
            .database
            .begin_write()
            .map_err(failed("make the tables"))?;
        write
            .open_table(MIGRATIONS)
            .map_err(failed("make the tables"))?;
        write
            .open_table(BY_TIME)
            .map_err(failed("make the tables"))?;
        write.open_table(OPEN).map_err(failed("make the tables"))?;
        write.open_table(HOSTS).map_err(failed("make the tables"))?;
        write.open_table(PROBE).map_err(failed("make the tables"))?;
        write.commit().map_err(failed("make the tables"))
    }
}

impl Store for RedbStore {
    fn put_migration(&self, record: &StoredMigration) -> Result<(), StoreError> {
        const WHAT: &str = "write a migration";
        let name = name_of(record);
        let write = self.database.begin_write().map_err(failed(WHAT))?;
        {
            let mut table = write.open_table(MIGRATIONS).map_err(failed(WHAT))?;
            table
                .insert(name, record.encode_to_vec().as_slice())
                .map_err(failed(WHAT))?;
            let mut by_time = write.open_table(BY_TIME).map_err(failed(WHAT))?;
            by_time
                .insert((creation(record), name), ())
                .map_err(failed(WHAT))?;
            let mut open = write.open_table(OPEN).map_err(failed(WHAT))?;
            if record.is_open() {
                open.insert(name, ()).map_err(failed(WHAT))?;
            } else {
                open.remove(name).map_err(failed(WHAT))?;
            }
        }
        write.commit().map_err(failed(WHAT))
    }

    fn migration(&self, name: &str) -> Result<Option<StoredMigration>, StoreError> {
        const WHAT: &str = "read a migration";
        let read = self.database.begin_read().map_err(failed(WHAT))?;
        let table = read.open_table(MIGRATIONS).map_err(failed(WHAT))?;
        let Some(bytes) = table.get(name).map_err(failed(WHAT))? else {
            return Ok(None);
        };
        decode(name, bytes.value()).map(Some)
    }

    fn migrations(&self, query: &ListQuery) -> Result<Vec<StoredMigration>, StoreError> {
        const WHAT: &str = "list migrations";
        let read = self.database.begin_read().map_err(failed(WHAT))?;
        let table = read.open_table(MIGRATIONS).map_err(failed(WHAT))?;
        let by_time = read.open_table(BY_TIME).map_err(failed(WHAT))?;
        let end = match &query.after {
            None => None,
            // A token that names nothing is a list's end, not its beginning again.
            Some(after) => match self.migration(after)? {
                None => return Ok(Vec::new()),
                Some(record) => Some((creation(&record), after.as_str())),
            },
        };
        let range = match end {
            None => by_time.iter().map_err(failed(WHAT))?,
            Some(end) => by_time.range(..end).map_err(failed(WHAT))?,
        };
        let mut found = Vec::new();
        for entry in range.rev() {
            if found.len() >= query.limit {
                break;
            }
            let (key, _) = entry.map_err(failed(WHAT))?;
            let (_, name) = key.value();
            let Some(bytes) = table.get(name).map_err(failed(WHAT))? else {
                continue;
            };
            let record = decode(name, bytes.value())?;
            let wanted = query.vm.as_ref().is_none_or(|vm| {
                record
                    .migration
                    .as_ref()
                    .is_some_and(|migration| migration.vm == *vm)
            });
            if wanted {
                found.push(record);
            }
        }
        Ok(found)
    }

    fn open_migrations(&self) -> Result<Vec<StoredMigration>, StoreError> {
        const WHAT: &str = "read open migrations";
        let read = self.database.begin_read().map_err(failed(WHAT))?;
        let table = read.open_table(MIGRATIONS).map_err(failed(WHAT))?;
        let open = read.open_table(OPEN).map_err(failed(WHAT))?;
        let mut found = Vec::new();
        for entry in open.iter().map_err(failed(WHAT))? {
            let (key, _) = entry.map_err(failed(WHAT))?;
            if let Some(bytes) = table.get(key.value()).map_err(failed(WHAT))? {
                found.push(decode(key.value(), bytes.value())?);
            }
        }
        Ok(found)
    }

    fn put_host(&self, name: &str, address: &str) -> Result<(), StoreError> {
        const WHAT: &str = "write a host";
        let write = self.database.begin_write().map_err(failed(WHAT))?;
        {
            let mut hosts = write.open_table(HOSTS).map_err(failed(WHAT))?;
            hosts.insert(name, address).map_err(failed(WHAT))?;
        }
        write.commit().map_err(failed(WHAT))
    }

    fn probe(&self) -> Result<(), StoreError> {
        const WHAT: &str = "write a probe";
        let write = self.database.begin_write().map_err(failed(WHAT))?;
        {
            let mut probe = write.open_table(PROBE).map_err(failed(WHAT))?;
            let last = probe
                .get(())
                .map_err(failed(WHAT))?
                .map(|last| last.value());
            let next = last.unwrap_or(0).wrapping_add(1);
            probe.insert((), next).map_err(failed(WHAT))?;
        }
        write.commit().map_err(failed(WHAT))
    }

    fn hosts(&self) -> Result<Vec<(String, String)>, StoreError> {
        const WHAT: &str = "read hosts";
        let read = self.database.begin_read().map_err(failed(WHAT))?;
        let hosts = read.open_table(HOSTS).map_err(failed(WHAT))?;
        let mut found = Vec::new();
        for entry in hosts.iter().map_err(failed(WHAT))? {
            let (name, address) = entry.map_err(failed(WHAT))?;
            found.push((name.value().to_owned(), address.value().to_owned()));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use slat_proto::v1;

    use super::{super::record::SourceStart, *};

    fn record(name: &str, vm: &str, seconds: i64, phase: v1::MigrationPhase) -> StoredMigration {
        StoredMigration {
            migration: Some(v1::Migration {
                name: name.into(),
                vm: vm.into(),
                phase: phase.into(),
                create_time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
                ..Default::default()
            }),
            source_released: true,
            destination_released: true,
            source_start: SourceStart::Never.into(),
        }
    }

    #[test]
    fn records_survive_and_lists_are_newest_first() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let store = RedbStore::open(&state).unwrap();
        let done = v1::MigrationPhase::Completed;
        for (name, vm, at) in [
            ("migrations/b", "vms/x", 5),
            ("migrations/a", "vms/y", 9),
            ("migrations/c", "vms/x", 7),
        ] {
            store.put_migration(&record(name, vm, at, done)).unwrap();
        }
        let pending = record("migrations/d", "vms/x", 8, v1::MigrationPhase::Pending);
        store.put_migration(&pending).unwrap();
        drop(store);

        let store = RedbStore::open(&state).unwrap();
        let names = |query: &ListQuery| -> Vec<String> {
            let list = store.migrations(query).unwrap();
            list.iter().map(|r| name_of(r).to_owned()).collect()
        };
        let all = ListQuery {
            limit: 10,
            ..Default::default()
        };
        assert_eq!(
            names(&all),
            [
                "migrations/a",
                "migrations/d",
                "migrations/c",
                "migrations/b"
            ]
        );
        let x = ListQuery {
            vm: Some("vms/x".into()),
            after: Some("migrations/d".into()),
            limit: 1,
        };
        assert_eq!(names(&x), ["migrations/c"]);
        assert_eq!(store.open_migrations().unwrap(), [pending]);
    }

    #[test]
    fn a_second_server_is_refused_and_modes_are_private() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("deep/state");
        let store = RedbStore::open(&state).unwrap();
        assert!(matches!(
            RedbStore::open(&state),
            Err(StoreError::InUse { .. })
        ));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state), 0o700);
        assert_eq!(mode(&state.join(FILE)), 0o600);
        drop(store);
    }

    #[test]
    fn an_unreadable_record_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let store = RedbStore::open(directory.path()).unwrap();
        let write = store.database.begin_write().unwrap();
        write
            .open_table(MIGRATIONS)
            .unwrap()
            .insert("migrations/torn", [0xff_u8, 0xff].as_slice())
            .unwrap();
        write
            .open_table(OPEN)
            .unwrap()
            .insert("migrations/torn", ())
            .unwrap();
        write.commit().unwrap();
        let error = store.open_migrations().unwrap_err();
        assert!(error.to_string().contains("migrations/torn"), "{error}");
    }
}
