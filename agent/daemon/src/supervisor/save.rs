//! VMs saved: a snapshot taken, its layers handed to a writer, the file named when it is whole.
//!
//! # Ends
//! The VM goes on whatever happens here. While the file is written its VM keeps pages for whoever
//! holds the snapshot's lease: this agent until the writer has it, then the writer alone. A writer
//! ends when its socket is closed, so a save that is cancelled, that fails, or whose agent stops
//! gives the lease back at once; the agent never names a file that is not whole.

use std::{sync::Arc, time::SystemTime};

use slat_image::Draft;
use slat_paging::wire::Socket;
use slat_proto::{
    ApiError, Reason,
    model::{SaveName, timestamp},
    v1,
};

use super::{LEAVE, Supervisor, slot_bytes};
use crate::{
    counts::{self, Outcome},
    living::LiveVm,
    process::Process,
    saves::{Begun, Contents, Order, Used, blocking, working_set, write},
    source::PageSource,
};

/// What a save is made by.
#[derive(Clone, Debug)]
pub(crate) struct SaveOrder {
    pub(crate) name: SaveName,
    /// The save that it is to build on.
    pub(crate) base: Option<SaveName>,
    /// zstd's level; 0: not packed.
    pub(crate) zstd_level: u32,
}

/// A snapshot, as it was taken.
pub(super) struct Taken {
    pub(super) said: v1::TakeSnapshotResponse,
    pub(super) manifest: v1::PrepareIncomingRequest,
    pub(super) source: PageSource,
}

impl Supervisor {
    /// Takes a snapshot of a living VM, and its layers.
    ///
    /// # Errors
    /// The VM's own; VM_UNREACHABLE.
    pub(super) async fn snapshot(
        self: &Arc<Self>,
        live: &Arc<LiveVm>,
        purpose: String,
        may_pause: bool,
    ) -> Result<Taken, ApiError> {
        // Its pager keeps what the guest overwrites; the VM waits for it. One that cannot be
        // watched stands still instead.
        let can = |vm: &v1::Vm| vm.capabilities().any(|one| one == v1::Capability::Paging);
        let watchable = live.snapshot().is_none_or(|vm| can(&vm));
        let asked = watchable.then(|| live.paged().ask());
        let request = v1::TakeSnapshotRequest {
            name: live.name().to_string(),
            uid: live.own_uid(),
            purpose,
            may_pause,
        };
        let mut copies = live.copies();
        let answer = live.answer_long(copies.take_snapshot(request));
        let mut said = self.told(live, answer).await?;
        let (dir, number) = (live.dir().clone(), said.snapshot);
        let source = blocking(move || PageSource::take(&dir, number)).await?;
        drop(asked);
        let manifest = said.manifest.take().unwrap_or_default();
        Ok(Taken {
            said,
            manifest,
            source,
        })
    }

    /// Begins to save a VM; the answer comes once its moment is taken.
    ///
    /// # Errors
    /// SAVE_EXISTS, LIMIT_REACHED, DISK_FULL, BAD_PARAMETER, those of the base, the VM's own.
    /// Nothing of the save is left then.
    pub(crate) async fn save(
        self: Arc<Self>,
        live: Arc<LiveVm>,
        order: SaveOrder,
    ) -> Result<v1::Save, ApiError> {
        let saved = Arc::clone(&self).begin_save(live, order).await;
        if saved.is_err() {
            counts::saved(Outcome::Failed, 0);
        }
        saved
    }

    async fn begin_save(
        self: Arc<Self>,
        live: Arc<LiveVm>,
        order: SaveOrder,
    ) -> Result<v1::Save, ApiError> {
        let (saves, name) = (Arc::clone(&self.saves), order.name.clone());
        let base = order.base.clone();
        let uid = live.uid().to_string();
        let populated = populated(&live).filter(|_| order.base.is_none() && order.zstd_level == 0);
        let prepared = blocking(move || {
            let begun = saves.begin(&name)?;
            let base = base.map(|base| base_of(&saves, &base, &uid)).transpose()?;
            if let Some(needed) = populated {
                has_room(saves.dir(), needed)?;
            }
            let draft = saves.draft(&name)?;
            Ok((begun, base, draft))
        });
        let (begun, base, draft) = prepared.await?;
        let purpose = format!("saves/{}", order.name.id());
        let taken = self.snapshot(&live, purpose, true).await?;
        counts::paused("save", taken.said.pause_nanos);
        let shown = shown(&order, &taken);
        let contents = Contents {
            manifest: taken.manifest.clone(),
            state: taken.said.state,
            shown: shown.clone(),
        };
        let file = draft.file().try_clone().map_err(|error| {
            let path = self.saves.path(order.name.id());
            ApiError::from_io(Reason::Store, &path, &error).with("save", &order.name)
        })?;
        let bases = base.as_ref().map_or_else(Vec::new, Used::named_files);
        let mut sections = contents.into_sections();
        sections.extend(working_set(&taken.manifest.slots, &taken.said.working_set));
        let slots = taken.manifest.slots.iter();
        let order = Order {
            name: self.saves.path(order.name.id()).display().to_string(),
            file,
            zstd_level: order.zstd_level,
            bases,
            sections,
            memories: slots.map(|slot| (slot.slot, slot.pages)).collect(),
            source: taken.source,
        };
        let (socket, process) = self.start_writer(&begun)?;
        let mut own = shown;
        own.path.clone_from(&order.name);
        begun.show(own.clone());
        let me = Arc::clone(&self);
        self.tasks.spawn(async move {
            // What it builds on stays until it is written.
            let _base = base;
            me.follow_writer(begun, draft, order, socket, process).await;
        });
        Ok(own)
    }

    fn start_writer(&self, begun: &Begun) -> Result<(Socket, Process), ApiError> {
        let started = Socket::pair().and_then(|(ours, theirs)| {
            let process = self.programs.start_writer(&theirs)?;
            Ok((ours, process))
        });
        started.map_err(|error| {
            let name = begun.going().name();
            let words = format!("the writer of {name} cannot be started: {error}");
            ApiError::new(Reason::Internal, words)
                .with("save", name)
                .with("op", "spawn")
                .because_of(&error)
        })
    }

    /// Follows a writer to its end.
    async fn follow_writer(
        self: Arc<Self>,
        begun: Begun,
        draft: Draft,
        order: Order,
        socket: Socket,
        process: Process,
    ) {
        let going = Arc::clone(begun.going());
        let name = going.name().clone();
        let (socket, told) = (Arc::new(socket), Arc::clone(&going));
        let talking = Arc::clone(&socket);
        let mut talk = Box::pin(blocking(move || {
            write(order, &talking, |written| told.progress(written))
        }));
        let (result, cancelled) = tokio::select! {
            result = &mut talk => (result, false),
            () = going.cancel.cancelled() => {
                socket.close();
                (talk.await, true)
            }
            () = self.stop.cancelled() => {
                socket.close();
                (talk.await, true)
            }
        };
        socket.close();
        if tokio::time::timeout(LEAVE, process.ended()).await.is_err() {
            tracing::warn!(save = %name, pid = process.pid(), "ending the writer of a save, which does not end");
            process.put_down().await;
        }
        let result = match result {
            Ok(written) if !cancelled => {
                let (saves, named) = (Arc::clone(&self.saves), name.clone());
                let published = blocking(move || saves.publish(&named, draft)).await;
                published.map(|()| written)
            }
            Ok(_) => Err(ApiError::new(Reason::CancelledByUser, "it was given up")),
            Err(error) => Err(error),
        };
        match result {
            Ok(written) => {
                counts::saved(Outcome::Written, written.file_bytes);
                tracing::info!(save = %name, bytes = written.file_bytes, pages = written.pages, "a VM is saved");
                begun.written(written, timestamp(SystemTime::now()));
            }
            _ if cancelled => {
                counts::saved(Outcome::Cancelled, 0);
                tracing::info!(save = %name, "a save was given up");
            }
            Err(error) => {
                counts::saved(Outcome::Failed, 0);
                let error = process.end().map_or(error.clone(), |end| end.tell(error));
                tracing::error!(save = %name, %error, reason = %error.reason, "a save failed");
                begun.fail(&error);
            }
        }
    }
}

/// Opens what is to be built on.
fn base_of(saves: &Arc<crate::saves::Saves>, base: &SaveName, uid: &str) -> Result<Used, ApiError> {
    let used = saves.use_one(base)?;
    let of = used.contents(base)?.shown.vm_uid;
    if of == uid {
        return Ok(used);
    }
    let words = format_args!("{base} is of the VM with uid {of}, not {uid}");
    Err(ApiError::bad_parameter("base", words)
        .with("save", base)
        .with("uid", uid)
        .with("other_uid", &of)
        .with("advice", "build on a save of the same VM, or on none"))
}

/// What is shown of a save that begins.
fn shown(order: &SaveOrder, taken: &Taken) -> v1::Save {
    let vm = taken.manifest.vm.clone().unwrap_or_default();
    let memory_bytes = slot_bytes(&taken.manifest.slots);
    v1::Save {
        name: order.name.to_string(),
        state: v1::save::State::Writing.into(),
        vm: vm.name,
        vm_uid: vm.uid,
        vm_epoch: vm.epoch,
        vm_spec: vm.spec,
        vm_ran: taken.said.ran,
        create_time: Some(timestamp(SystemTime::now())),
        pause_nanos: taken.said.pause_nanos,
        vm_paused: taken.said.paused.clone(),
        memory_bytes,
        base: order
            .base
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        compression: Some(v1::Compression {
            zstd_level: order.zstd_level,
        }),
        ..Default::default()
    }
}

/// Bytes of a VM's memory that are there, as far as it says.
fn populated(live: &LiveVm) -> Option<u64> {
    let stats = live.snapshot()?.mmu_stats?;
    let small = stats.backing_4k_bytes?;
    let more = [stats.backing_2m_bytes, stats.backing_1g_bytes];
    Some(more.into_iter().flatten().fold(small, u64::saturating_add))
}

/// Whether a file system has that much space.
fn has_room(dir: &std::path::Path, needed: u64) -> Result<(), ApiError> {
    let Ok(space) = rustix::fs::statvfs(dir) else {
        // Whoever writes there will say what is wrong.
        return Ok(());
    };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if needed <= free {
        return Ok(());
    }
    let path = dir.display();
    let words = format!("{path} has {free} bytes free, and {needed} bytes of memory are populated");
    Err(ApiError::new(Reason::DiskFull, words)
        .with("path", path)
        .with("needed_bytes", needed)
        .with("free_bytes", free)
        .with("advice", "free space there, or pack pages with --compress"))
}
