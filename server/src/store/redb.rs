//! The store in one redb file, `slat-server.redb`, with mode 0600 in a directory with mode 0700.
//!
//! Tables: `migrations` (name → record), `migrations_by_time` (creation in nanoseconds, name →
//! nothing), `migrations_open` (names with work left), `hosts` (name → address) and `probe` (a
//! number that grows). The three of a migration change in one transaction. What was seen of the
//! fleet is in `redb_seen`.
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
    Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _,
    TableDefinition, backends::FileBackend,
};
use slat_proto::v1;

use super::{
    contract::{ListQuery, Prune, Store, nanos},
    error::StoreError,
    record::StoredMigration,
};

const MIGRATIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("migrations");
const BY_TIME: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("migrations_by_time");
const OPEN: TableDefinition<'_, &str, ()> = TableDefinition::new("migrations_open");
pub(super) const HOSTS: TableDefinition<'_, &str, &str> = TableDefinition::new("hosts");

const PROBE: TableDefinition<'_, (), u64> = TableDefinition::new("probe");

const FILE: &str = "slat-server.redb";

/// See the module.
pub(crate) struct RedbStore {
    pub(super) database: Database,
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

pub(super) fn failed<E: Into<redb::Error>>(
    operation: &'static str,
) -> impl FnOnce(E) -> StoreError {
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
        .and_then(|migration| migration.create_time);
    time.as_ref().map_or(0, nanos)
}

/// The same of its end; `None` while it has none.
fn end(record: &StoredMigration) -> Option<u64> {
    let time = record.migration.as_ref()?.end_time?;
    Some(nanos(&time))
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
        // The place, not the migration there: that may be forgotten by now.
        let end = query
            .after
            .as_ref()
            .map(|place| (place.created, place.name.as_str()));
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
            let migration = record.migration.as_ref();
            let is = |wanted: &Option<String>, field: fn(&v1::Migration) -> &String| {
                wanted
                    .as_ref()
                    .is_none_or(|wanted| migration.is_some_and(|m| field(m) == wanted))
            };
            if is(&query.vm, |m| &m.vm) && is(&query.vm_uid, |m| &m.vm_uid) {
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

    fn prune_migrations(&self, what: &Prune) -> Result<usize, StoreError> {
        const WHAT: &str = "forget migrations";
        let write = self.database.begin_write().map_err(failed(WHAT))?;
        let going = {
            let mut table = write.open_table(MIGRATIONS).map_err(failed(WHAT))?;
            let mut by_time = write.open_table(BY_TIME).map_err(failed(WHAT))?;
            let open = write.open_table(OPEN).map_err(failed(WHAT))?;
            let count = |length: u64| usize::try_from(length).unwrap_or(usize::MAX);
            let all = count(by_time.len().map_err(failed(WHAT))?);
            let ended = all.saturating_sub(count(open.len().map_err(failed(WHAT))?));
            let too_many = ended.saturating_sub(what.keep);
            let mut going: Vec<(u64, String)> = Vec::new();
            for entry in by_time.iter().map_err(failed(WHAT))? {
                if going.len() >= what.at_most {
                    break;
                }
                let (key, _) = entry.map_err(failed(WHAT))?;
                let (created, name) = key.value();
                // What was created later than this ended later too.
                if going.len() >= too_many && created >= what.ended_after {
                    break;
                }
                if open.get(name).map_err(failed(WHAT))?.is_some() {
                    continue;
                }
                let old = match table.get(name).map_err(failed(WHAT))? {
                    _ if going.len() < too_many => true,
                    Some(bytes) => {
                        end(&decode(name, bytes.value())?).is_none_or(|end| end < what.ended_after)
                    }
                    None => true,
                };
                if old {
                    going.push((created, name.to_owned()));
                }
            }
            for (created, name) in &going {
                table.remove(name.as_str()).map_err(failed(WHAT))?;
                by_time
                    .remove((*created, name.as_str()))
                    .map_err(failed(WHAT))?;
            }
            going.len()
        };
        if going == 0 {
            write.abort().map_err(failed(WHAT))?;
        } else {
            write.commit().map_err(failed(WHAT))?;
        }
        Ok(going)
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
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::{
        super::{contract::Place, record::SourceStart},
        *,
    };

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
            ..Default::default()
        }
    }

    #[test]
    fn records_survive_and_lists_are_newest_first() {
        let directory = slat_test_dir::TestDir::new();
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
        let all = ListQuery {
            limit: 10,
            ..Default::default()
        };
        assert_eq!(
            names(&store, &all),
            [
                "migrations/a",
                "migrations/d",
                "migrations/c",
                "migrations/b"
            ]
        );
        let x = ListQuery {
            vm: Some("vms/x".into()),
            after: Some(Place {
                created: 8_000_000_000,
                name: "migrations/d".into(),
            }),
            limit: 1,
            ..Default::default()
        };
        assert_eq!(names(&store, &x), ["migrations/c"]);
        assert_eq!(store.open_migrations().unwrap(), [pending]);
    }

    fn names(store: &RedbStore, query: &ListQuery) -> Vec<String> {
        let list = store.migrations(query).unwrap();
        list.iter().map(|r| name_of(r).to_owned()).collect()
    }

    #[test]
    fn the_oldest_ended_migrations_go_and_open_ones_never() {
        let directory = slat_test_dir::TestDir::new();
        let store = RedbStore::open(directory.path()).unwrap();
        let put = |number: i64, ended: Option<i64>| {
            let phase = match ended {
                Some(_) => v1::MigrationPhase::Completed,
                None => v1::MigrationPhase::InDoubt,
            };
            let mut stored = record(&format!("migrations/m{number:03}"), "vms/x", number, phase);
            stored.migration.as_mut().unwrap().end_time =
                ended.map(|seconds| prost_types::Timestamp { seconds, nanos: 0 });
            store.put_migration(&stored).unwrap();
        };
        // Two of the oldest are open; another old one has just ended.
        put(1, None);
        put(2, None);
        put(3, Some(5000));
        for number in 4..100 {
            put(number, Some(number));
        }
        let all = ListQuery {
            limit: 1000,
            ..Default::default()
        };
        let prune = |keep, seconds: u64, at_most| {
            let what = Prune {
                keep,
                ended_after: seconds * 1_000_000_000,
                at_most,
            };
            store.prune_migrations(&what).unwrap()
        };
        assert_eq!(prune(97, 0, 100), 0);
        // By age, in batches: those that ended before 50, not those that began before it.
        assert_eq!(prune(1000, 50, 30), 30);
        assert_eq!(prune(1000, 50, 30), 16);
        assert_eq!(prune(1000, 50, 30), 0);
        let left = names(&store, &all);
        assert_eq!(left.len(), 2 + 1 + 50);
        let oldest = ["migrations/m003", "migrations/m002", "migrations/m001"];
        assert_eq!(left[50..], oldest);
        // By number, whenever they ended.
        assert_eq!(prune(10, 0, 1000), 41);
        let left = names(&store, &all);
        assert_eq!(left[0], "migrations/m099");
        let oldest = ["migrations/m090", "migrations/m002", "migrations/m001"];
        assert_eq!(left[9..], oldest);
        assert_eq!(store.open_migrations().unwrap().len(), 2);
        assert_eq!(store.migration("migrations/m089").unwrap(), None);
        // None that has ended is to be kept; the open ones are all the same.
        assert_eq!(prune(0, 0, 1000), 10);
        assert_eq!(names(&store, &all).len(), 2);
    }

    #[test]
    fn a_page_goes_on_where_the_last_ended_although_that_migration_is_forgotten() {
        let directory = slat_test_dir::TestDir::new();
        let store = RedbStore::open(directory.path()).unwrap();
        let done = v1::MigrationPhase::Completed;
        let open = v1::MigrationPhase::InDoubt;
        for number in 0..=9 {
            let name = format!("migrations/m{number}");
            let phase = if number == 0 { open } else { done };
            store
                .put_migration(&record(&name, "vms/x", number, phase))
                .unwrap();
        }
        let mut page = ListQuery {
            limit: 2,
            ..Default::default()
        };
        assert_eq!(names(&store, &page), ["migrations/m9", "migrations/m8"]);
        let last = store.migration("migrations/m5").unwrap().unwrap();
        let token = Place::of(last.migration.as_ref().unwrap()).to_token();
        page.after = Place::from_token(&token);
        assert_eq!(names(&store, &page), ["migrations/m4", "migrations/m3"]);
        // The one that the token stands for goes, and all that were before it but one.
        let what = Prune {
            keep: 4,
            ended_after: 0,
            at_most: 100,
        };
        assert_eq!(store.prune_migrations(&what).unwrap(), 5);
        assert_eq!(names(&store, &page), ["migrations/m0"]);
        assert_eq!(Place::from_token("migrations/m5"), None);
        assert_eq!(Place::from_token("x.migrations/m5"), None);
    }

    #[test]
    fn a_second_server_is_refused_and_modes_are_private() {
        let directory = slat_test_dir::TestDir::new();
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
        let directory = slat_test_dir::TestDir::new();
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
