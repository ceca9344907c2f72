//! A save that is being written, or that failed: what there is of it beside the files.
//!
//! *Locking*: [`Table`] is one mutex over one map, held for a look or a change; of each save there
//! is a watch channel, whose lock is a leaf below it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use slat_paging::wire::Written;
use slat_proto::{
    ApiError,
    model::{PAGE_SIZE, SaveName},
    v1::{self, save::State},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::pause::count_pause;

/// All of them, by id.
#[derive(Debug, Default)]
pub(super) struct Table(Mutex<BTreeMap<String, Arc<Going>>>);

impl Table {
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Going>>> {
        // Each change is one map operation: a panic elsewhere leaves the map whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a save, unless another one has its name by now.
    fn forget(&self, which: &Arc<Going>) {
        let mut all = self.lock();
        let id = which.name.id();
        if all.get(id).is_some_and(|known| Arc::ptr_eq(known, which)) {
            all.remove(id);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Going {
    name: SaveName,
    shown: watch::Sender<v1::Save>,
    /// Somebody wants its end.
    pub(crate) cancel: CancellationToken,
    /// It is written, failed or given up.
    pub(super) ended: CancellationToken,
}

impl Going {
    pub(super) fn new(name: SaveName) -> Arc<Self> {
        let shown = v1::Save {
            name: name.to_string(),
            state: State::Writing.into(),
            ..Default::default()
        };
        Arc::new(Self {
            name,
            shown: watch::Sender::new(shown),
            cancel: CancellationToken::new(),
            ended: CancellationToken::new(),
        })
    }

    /// The save.
    pub(crate) fn name(&self) -> &SaveName {
        &self.name
    }

    pub(super) fn shown(&self) -> v1::Save {
        self.shown.borrow().clone()
    }

    pub(super) fn state(&self) -> State {
        self.shown.borrow().state()
    }

    pub(super) fn watch(&self) -> watch::Receiver<v1::Save> {
        self.shown.subscribe()
    }

    /// How far its writer is.
    pub(crate) fn progress(&self, written: Written) {
        self.shown.send_modify(|save| {
            save.done_bytes = written.done.saturating_mul(PAGE_SIZE);
            save.file_bytes = written.file_bytes;
            save.empty_pages = written.empty;
            save.pages = written.pages;
        });
    }
}

/// The right to write a save of a name. Dropped it leaves nothing of that name.
#[derive(Debug)]
pub(crate) struct Begun {
    table: Arc<Table>,
    going: Arc<Going>,
    kept: bool,
}

impl Begun {
    pub(super) fn new(table: Arc<Table>, going: Arc<Going>) -> Self {
        Self {
            table,
            going,
            kept: false,
        }
    }

    /// What others see of it.
    pub(crate) fn going(&self) -> &Arc<Going> {
        &self.going
    }

    /// Shows it so.
    pub(crate) fn show(&self, save: v1::Save) {
        self.going.shown.send_replace(save);
    }

    /// There will be no file: shown until it is deleted.
    pub(crate) fn fail(mut self, error: &ApiError) {
        self.going.shown.send_modify(|save| {
            save.set_state(State::Failed);
            save.vm_paused.clear();
            save.state_message.clone_from(&error.message);
            error.reason.as_str().clone_into(&mut save.reason);
        });
        self.kept = true;
    }

    /// The file has its name: from now on it speaks for itself.
    pub(crate) fn written(self, written: Written, now: prost_types::Timestamp) {
        self.going.progress(written);
        self.going.shown.send_modify(|save| {
            save.set_state(State::Written);
            save.end_time = Some(now);
            count_pause(save);
        });
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if !self.kept {
            self.table.forget(&self.going);
        }
        self.going.ended.cancel();
    }
}
