//! All migrations: accepting, finding, listing, watching and cancelling them, and the reconcilers
//! that drive them.
//!
//! # Locking
//! * `creating` (async) is held from the first check of CreateMigration until the record is stored
//!   and listed: "one migration per VM" and "a name is used once" are decided under it.
//! * `active` (`std`) is a map of migrations with work left, locked for lookups and changes only,
//!   never across `.await`. An entry leaves it when its task has ended; the store answers for it
//!   from then on.
//! * `sweeping` (`std`) is a set of host names, the same way. Neither is locked while the other is.
//!
//! Reconcilers belong to this collection: [`Migrations::stop`] ends them. Ending one is like a
//! crash: its record is the truth, and the next start takes it up.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, PageRequest, Timeline, VmName, paginate},
    v1::{self, MigrationPhase as Phase, TransferRole as Role},
};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    active::Active,
    admission::{NewMigration, check},
    calls::Caller,
    errors::{in_progress, no_such_migration, past_point},
    key::VmKey,
    orphans,
    pairs::{Pairs, RECORDS},
    reconciler::{Context, Reconciler},
    record::{Record, shown},
    replies::Command,
    retention::Retention,
    subject::Subject,
    updates::Updates,
    waiting::{Earlier, Released},
};
use crate::{
    fleet::{Fleet, fenced_meanwhile},
    grants::Grants,
    history::History,
    phase::has_ended,
    store::{BlockingStore, ListQuery, Place, StoreError},
};

/// Cancels that may wait for one migration's task.
const COMMANDS: usize = 16;

/// See the module.
pub(crate) struct Migrations {
    context: Context,
    creating: tokio::sync::Mutex<()>,
    active: Mutex<HashMap<String, Active>>,
    /// Hosts whose leftovers are being ended.
    sweeping: Mutex<BTreeSet<String>>,
    /// A migration has no work left.
    ended: Notify,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Migrations {
    /// Takes up what the store has left open.
    ///
    /// # Errors
    /// When a record cannot be read: a migration must not be forgotten.
    pub(crate) async fn start(
        fleet: Arc<Fleet>,
        store: BlockingStore,
        history: Arc<History>,
        grants: Arc<Grants>,
        retention: Retention,
    ) -> Result<Arc<Self>, StoreError> {
        let open = store.with(|store| store.open_migrations()).await?;
        let pairs = Arc::new(Pairs::default());
        let newest = ListQuery {
            limit: RECORDS,
            ..ListQuery::default()
        };
        match store.with(move |store| store.migrations(&newest)).await {
            Ok(records) => records
                .iter()
                .rev()
                .filter_map(|record| record.migration.as_ref())
                .for_each(|migration| pairs.learn(migration)),
            // A record that cannot be read is no reason not to serve.
            Err(error) => tracing::warn!(%error, "no earlier downtime is remembered"),
        }
        let this = Arc::new(Self {
            context: Context {
                fleet,
                store,
                history,
                grants,
                pairs,
            },
            creating: tokio::sync::Mutex::new(()),
            active: Mutex::new(HashMap::new()),
            sweeping: Mutex::default(),
            ended: Notify::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let (over, going): (Vec<_>, Vec<_>) = open
            .into_iter()
            .filter_map(Record::from_stored)
            .partition(|record| has_ended(record.migration().phase()));
        for record in over {
            this.spawn(record, Vec::new());
        }
        for record in going {
            // What it waited for before the server stopped, it waits for again.
            let migration = record.migration();
            let hosts = [migration.source.as_str(), migration.destination.as_str()];
            let before = this.unreleased(&VmKey::from(migration), hosts);
            this.spawn(record, before);
        }
        let keeper = Arc::clone(&this);
        this.tasks.spawn(async move {
            let store = keeper.context.store.clone();
            tokio::select! {
                () = keeper.stop.cancelled() => {}
                () = retention.keep_to(store, &keeper.ended) => {}
            }
        });
        Ok(this)
    }

    /// Ends all tasks; returns when they have ended.
    pub(crate) async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.active().clear();
    }

    pub(super) fn active(&self) -> MutexGuard<'_, HashMap<String, Active>> {
        // Only whole insertions and removals happen under it.
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(self: &Arc<Self>, record: Record, before: Vec<Earlier>) {
        let name = record.migration().name.clone();
        let (shown, receiver) = watch::channel(record.migration().clone());
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let released = Released::default();
        let durable = record.durable();
        if durable.source_released {
            released.source.set();
        }
        if durable.destination_released {
            released.destination.set();
        }
        let active = Active {
            shown: receiver,
            commands,
            released: released.clone(),
            timeline: record.timeline(),
        };
        let timeline = active.timeline;
        self.active().insert(name.clone(), active);
        let reconciler = Reconciler::new(
            self.context.clone(),
            record,
            shown,
            inbox,
            released,
            timeline,
        );
        let this = Arc::clone(self);
        self.tasks.spawn(async move {
            reconciler.run(before, this.stop.clone()).await;
            if !this.stop.is_cancelled() {
                this.active().remove(&name);
                this.ended.notify_one();
            }
        });
    }

    /// Ends sides in a host's report whose migrations are over: see `orphans`. One such task a
    /// host.
    pub(crate) fn sweep(self: &Arc<Self>, host: &str, mut sides: Vec<v1::Transfer>) {
        {
            let active = self.active();
            sides.retain(|side| !active.contains_key(&side.migration));
        }
        let host = host.to_owned();
        if sides.is_empty() || !self.sweeping().insert(host.clone()) {
            return;
        }
        let this = Arc::clone(self);
        self.tasks.spawn(async move {
            tokio::select! {
                () = this.stop.cancelled() => {}
                () = orphans::sweep(this.context.clone(), &host, sides) => {}
            }
            this.sweeping().remove(&host);
        });
    }

    fn sweeping(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // As above.
        self.sweeping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The migration a VM is part of now.
    pub(crate) fn of_vm(&self, vm: impl Into<VmKey>) -> Option<String> {
        let vm = vm.into();
        self.active()
            .values()
            .map(|active| active.shown.borrow())
            .find(|migration| vm.is_of(migration) && !has_ended(migration.phase()))
            .map(|migration| migration.name.clone())
    }

    /// Whether a migration carries a VM on without anybody's help: it is in flight and not in
    /// doubt.
    pub(crate) fn carries(&self, vm: impl Into<VmKey>) -> bool {
        let vm = vm.into();
        self.active().values().any(|active| {
            let migration = active.shown.borrow();
            vm.is_of(&migration)
                && !has_ended(migration.phase())
                && migration.phase() != Phase::InDoubt
        })
    }

    /// Whether a migration with work left ends what is its own on a host. One that is in doubt
    /// may wait for ever, and so may one that keeps a last copy or cannot release a side: what is
    /// left of them is for a person to see and to end.
    pub(crate) fn explains(&self, migration: &str) -> bool {
        let active = self.active();
        active.get(migration).is_some_and(Active::ends_its_own)
    }

    /// Migrations with a side on a host that is not released yet.
    pub(crate) fn on_host(&self, host: &str) -> Vec<String> {
        let active = self.active();
        let here = active
            .values()
            .filter(|active| !active.unreleased_on(host).is_empty());
        let mut names: Vec<String> = here
            .map(|active| active.shown.borrow().name.clone())
            .collect();
        names.sort_unstable();
        names
    }

    /// Tells the migrations with a side on a host that it was fenced, which is on disk.
    pub(crate) async fn host_fenced(&self, host: &str) {
        let told: Vec<_> = {
            let active = self.active();
            let here = active
                .values()
                .filter(|active| !active.unreleased_on(host).is_empty());
            here.map(|active| active.commands.clone()).collect()
        };
        for commands in told {
            // One whose task has ended has no side there any more.
            drop(commands.send(Command::Fenced).await);
        }
    }

    /// Gives up all sides on a host that is deleted; returns when that is on disk.
    ///
    /// # Errors
    /// STORE: one of them may not be.
    pub(crate) async fn forget_host(&self, host: &str) -> Result<(), ApiError> {
        let mut told = Vec::new();
        for active in self.active().values() {
            for side in active.unreleased_on(host) {
                told.push((active.commands.clone(), side));
            }
        }
        let mut answers = Vec::new();
        for (commands, side) in told {
            let (reply, answer) = oneshot::channel();
            // One whose task has ended has no side there any more.
            if commands.send(Command::Forget(side, reply)).await.is_ok() {
                answers.push(answer);
            }
        }
        for answer in answers {
            answer.await.unwrap_or(Ok(()))?;
        }
        Ok(())
    }

    /// Refuses what cannot be done while a VM migrates.
    pub(crate) fn refuse_if_migrating(
        &self,
        vm: impl Into<VmKey>,
        what: &str,
    ) -> Result<(), ApiError> {
        let vm = vm.into();
        match self.of_vm(vm.clone()) {
            None => Ok(()),
            Some(migration) => Err(in_progress(vm.name(), &migration, what)),
        }
    }

    /// Migrations with work left, by phase.
    pub(crate) fn phases(&self) -> BTreeMap<Phase, usize> {
        let mut phases = BTreeMap::new();
        for active in self.active().values() {
            let phase = active.shown.borrow().phase();
            if !has_ended(phase) {
                *phases.entry(phase).or_default() += 1;
            }
        }
        phases
    }

    /// Migrations that have not ended.
    pub(crate) fn running(&self) -> Vec<v1::Migration> {
        self.active()
            .values()
            .map(|active| (active.shown.borrow().clone(), &active.timeline))
            .filter(|(migration, _)| !has_ended(migration.phase()))
            .map(|(migration, timeline)| shown(migration, timeline))
            .collect()
    }

    /// See MigrationService.CreateMigration.
    pub(crate) async fn create(
        self: &Arc<Self>,
        wanted: NewMigration,
    ) -> Result<v1::Migration, ApiError> {
        let creating = self.creating.lock().await;
        if let Some(name) = &wanted.name
            && let Some(existing) = self.find(&name.to_string()).await?
        {
            if wanted.is_already(&existing) {
                // The caller did not hear the answer to its first call.
                return Ok(existing);
            }
            return Err(ApiError::new(
                Reason::MigrationExists,
                format!(
                    "{name} exists already, of {} to {}",
                    existing.vm, existing.destination
                ),
            )
            .with("migration", name)
            .with("vm", existing.vm)
            .with("destination", existing.destination)
            .with("advice", "name another migration_id"));
        }
        // Looked at before the hosts are: what is fenced from now on counts.
        let destination = wanted.destination.to_string();
        let source = self.context.fleet.find(&wanted.vm).map(|vm| vm.host);
        let source = source.unwrap_or_default();
        let fences = self.context.fleet.begin_after([&source, &destination])?;
        let owner = match self.context.fleet.owner(&wanted.vm) {
            Ok(owner) => owner,
            Err(error) => {
                // A host that died in a migration says less than that migration.
                self.refuse_if_migrating(&wanted.vm, "migrate again")?;
                return Err(error);
            }
        };
        self.refuse_if_migrating(&owner.vm, "migrate again")?;
        let name = match &wanted.name {
            Some(name) => name.to_string(),
            None => choose_name(&owner.vm.name)?.to_string(),
        };
        let keeper = |vm: &VmKey| self.keeper(vm);
        let vm = check(&self.context.fleet, &wanted, owner, keeper).await?;
        // Hosts were asked meanwhile. A start of an agent that came after a fence must not get a
        // migration that this fence cuts.
        let hosts = [vm.host.as_str(), destination.as_str()];
        let now = self.context.fleet.begin_after(hosts)?;
        if let Some(side) = (0..hosts.len()).find(|side| now[*side] != fences[*side]) {
            return Err(fenced_meanwhile(hosts[side]));
        }
        let mut record = Record::new(name, &vm, destination, wanted.params.to_message());
        record.begin_after(fences);
        if wanted.validate_only {
            let caller = Caller {
                fleet: Arc::clone(&self.context.fleet),
                grants: Arc::clone(&self.context.grants),
                subject: Subject::of(record.migration()).into(),
            };
            // Two calls to hosts: no other migration waits for them.
            drop(creating);
            caller.compare().await?;
            return Ok(shown(record.migration().clone(), &record.timeline()));
        }
        let hosts = [vm.host.as_str(), record.migration().destination.as_str()];
        let before = self.unreleased(&VmKey::from(&vm), hosts);
        let stored = record.to_stored();
        self.context
            .store
            .with(move |store| store.put_migration(&stored))
            .await?;
        let migration = record.migration().clone();
        self.context.history.progress(&migration);
        let timeline = record.timeline();
        self.spawn(record, before);
        drop(creating);
        Ok(shown(migration, &timeline))
    }

    /// Sides of a VM's earlier migrations that are not released yet, on hosts that a new one uses.
    /// Others are in nobody's way: a host that does not come back keeps no VM from moving between
    /// the rest.
    fn unreleased(&self, vm: &VmKey, hosts: [&str; 2]) -> Vec<Earlier> {
        let mut sides = Vec::new();
        for active in self.active().values() {
            let migration = active.shown.borrow();
            if !vm.is_of(&migration) {
                continue;
            }
            let released = &active.released;
            sides.extend(
                [
                    (Role::Source, &migration.source, &released.source),
                    (
                        Role::Destination,
                        &migration.destination,
                        &released.destination,
                    ),
                ]
                .into_iter()
                .filter(|(_, host, released)| hosts.contains(&host.as_str()) && !released.is_set())
                .map(|(role, host, released)| Earlier {
                    migration: migration.name.clone(),
                    host: host.clone(),
                    role,
                    released: released.clone(),
                }),
            );
        }
        sides
    }

    /// The migration that ended and keeps the last copy of a VM.
    pub(super) fn keeper(&self, vm: &VmKey) -> Option<String> {
        self.active()
            .values()
            .find(|active| active.keeps(vm))
            .map(|active| active.shown.borrow().name.clone())
    }

    fn live(&self, name: &str) -> Option<v1::Migration> {
        self.active()
            .get(name)
            .map(|active| shown(active.shown.borrow().clone(), &active.timeline))
    }

    async fn find(&self, name: &str) -> Result<Option<v1::Migration>, ApiError> {
        if let Some(live) = self.live(name) {
            return Ok(Some(live));
        }
        let key = name.to_owned();
        let stored = self
            .context
            .store
            .with(move |store| store.migration(&key))
            .await?;
        Ok(stored.and_then(|record| record.migration))
    }

    /// One migration, finished ones too.
    pub(crate) async fn get(&self, name: &MigrationName) -> Result<v1::Migration, ApiError> {
        self.find(&name.to_string())
            .await?
            .ok_or_else(|| no_such_migration(name))
    }

    /// One page of those that are to be `seen`, newest first.
    pub(crate) async fn list(
        &self,
        page_size: i32,
        page_token: &str,
        vm: Option<String>,
        vm_uid: Option<String>,
        seen: impl Fn(&v1::Migration) -> bool + Send,
    ) -> Result<(Vec<v1::Migration>, String), ApiError> {
        // The size is checked as everywhere; the store reads one more than the page to know whether
        // it is the last.
        PageRequest::new(page_size, "")?;
        let size = match usize::try_from(page_size) {
            Ok(size @ 1..) => size.min(1000),
            _ => 100,
        };
        let after = match page_token {
            "" => None,
            token => Some(Place::from_token(token).ok_or_else(|| {
                ApiError::bad_parameter("page_token", "is not from a list of migrations")
            })?),
        };
        let mut after = after;
        let mut migrations: Vec<v1::Migration> = Vec::new();
        loop {
            let query = ListQuery {
                vm: vm.clone(),
                vm_uid: vm_uid.clone(),
                after,
                limit: size + 1,
            };
            let found = self
                .context
                .store
                .with(move |store| store.migrations(&query))
                .await?;
            let read = found.len();
            let stored = found.into_iter().filter_map(|record| record.migration);
            let stored: Vec<v1::Migration> = stored.collect();
            after = stored.last().map(Place::of);
            let live = stored
                .into_iter()
                .map(|stored| self.live(&stored.name).unwrap_or(stored));
            migrations.extend(live.filter(&seen).map(|mut migration| {
                if let Some(progress) = &mut migration.progress {
                    progress.summarize_histories();
                }
                migration
            }));
            // Who does not see all of them is read on for.
            if read <= size || migrations.len() > size || after.is_none() {
                break;
            }
        }
        let first = PageRequest::new(page_size, "")?;
        Ok(paginate(migrations, &first, |migration| {
            Place::of(migration).to_token()
        }))
    }

    /// The migration now and at each change, ending after its terminal phase.
    pub(crate) async fn watch(&self, name: &MigrationName) -> Result<Updates, ApiError> {
        let live = self
            .active()
            .get(&name.to_string())
            .map(|active| (active.shown.clone(), active.timeline));
        let (receiver, timeline) = match live {
            Some(live) => live,
            // Not active: what the store has is final, a stream of one.
            None => (
                watch::channel(self.get(name).await?).1,
                Timeline::begin(None),
            ),
        };
        Ok(Updates::new(receiver, timeline, name.to_string()))
    }

    /// See MigrationService.CancelMigration.
    pub(crate) async fn cancel(&self, name: &MigrationName) -> Result<v1::Migration, ApiError> {
        let commands = self
            .active()
            .get(&name.to_string())
            .map(|active| (active.commands.clone(), active.timeline));
        if let Some((commands, timeline)) = commands {
            let (reply, answer) = oneshot::channel();
            if commands.send(Command::Cancel(reply)).await.is_ok()
                && let Ok(answer) = answer.await
            {
                return answer.map(|migration| shown(migration, &timeline));
            }
        }
        // Its task has ended: the outcome is stored.
        let migration = self.get(name).await?;
        match migration.phase() {
            Phase::Completed => Err(past_point(&migration)),
            phase if has_ended(phase) => Ok(migration),
            _ => Err(ApiError::new(
                Reason::PeerUnreachable,
                "the server is stopping; the migration goes on without it",
            )
            .with("migration", name)
            .with("advice", "ask again when the server runs")),
        }
    }
}

/// `{vm}-` and a number that grows with time; the VM's part is cut to keep the whole a name.
fn choose_name(vm: &str) -> Result<MigrationName, ApiError> {
    let vm = VmName::parse(vm)?;
    let id = uuid::Uuid::now_v7().simple().to_string();
    let vm: String = vm.id().chars().take(40).collect();
    let vm = vm.trim_end_matches('-');
    // Twelve digits are the milliseconds, the last four are random.
    MigrationName::from_id(&format!("{vm}-{}{}", &id[..12], &id[28..]))
}
