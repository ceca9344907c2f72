//! VMs made of something that was: of a saved file, and of another VM's snapshot. Name and memory
//! taken, process started, page source handed over, pager started, BuildCopy forwarded — or
//! everything undone.
//!
//! # Forks
//! All children are of one snapshot, whose lease each child's process holds for itself. They are
//! made at the same time, and each stands or falls alone: when one cannot be made the others stay,
//! and the error says which are there (`made`) and which are not (`failed`).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{SaveName, SlotSpec, VmName, VmSpec, check_slot_table},
    v1,
};
use slat_record::uid::VmUid;

use super::{Supervisor, instead::never_made, refuse::refused, slot_bytes, task_failed};
use crate::{
    counts,
    identity::save_seen,
    living::LiveVm,
    registry::{Claim, Work},
    saves::{self, Used, blocking},
    source::PageSource,
};

/// How long memory may take to be there, for a copy that is not lazy.
const BUILD: Duration = Duration::from_secs(3600);

/// A VM that is to be made.
struct Plan {
    vm: VmName,
    claim: Claim,
    uid: VmUid,
    memory: u64,
    request: v1::BuildCopyRequest,
    /// Saves that its memory comes from.
    saves: Vec<String>,
}

/// What a save or a snapshot announces, checked.
struct Announced {
    spec: VmSpec,
    memory: u64,
}

impl Announced {
    /// # Errors
    /// BAD_PARAMETER, BAD_SLOT_TABLE.
    fn of(manifest: &v1::PrepareIncomingRequest) -> Result<Self, ApiError> {
        let missing = |field| ApiError::bad_parameter(field, "is missing");
        let vm = manifest.vm.as_ref().ok_or_else(|| missing("vm"))?;
        let spec = vm.spec.as_ref().ok_or_else(|| missing("vm.spec"))?;
        let spec = VmSpec::from_resource(spec)?;
        let slots: Vec<SlotSpec> = manifest
            .slots
            .iter()
            .map(SlotSpec::from_message)
            .collect::<Result<_, _>>()?;
        check_slot_table(&slots)?;
        let memory = spec.backing.ordinary_bytes(if slots.is_empty() {
            spec.memory_bytes
        } else {
            slot_bytes(&manifest.slots)
        });
        Ok(Self { spec, memory })
    }
}

impl Supervisor {
    /// Makes a VM of a save.
    ///
    /// # Errors
    /// Those of the save; what this host lacks, by name; NO_MEMORY, VM_EXISTS; the VM's process's
    /// own. Nothing is left of it.
    pub(crate) async fn restore(
        self: Arc<Self>,
        name: SaveName,
        request: v1::RestoreVmRequest,
    ) -> Result<v1::RestoreVmResponse, ApiError> {
        let began = Instant::now();
        let (store, wanted) = (Arc::clone(&self.saves), name.clone());
        let opened = blocking(move || {
            let used = store.use_one(&wanted)?;
            let contents = used.contents(&wanted)?;
            Ok((used, contents))
        });
        let (used, contents) = opened.await?;
        let corrupt = |error: ApiError| {
            let words = format!("{name} cannot be restored: {error}");
            ApiError::new(Reason::SaveCorrupt, words)
                .with("save", &name)
                .with("file", self.saves.path(name.id()).display())
                .with("cause", &error)
                .with("advice", "slat verify save SAVE; restore another one")
        };
        let mut manifest = contents.manifest;
        manifest.validate_only = request.validate_only;
        let announced = Announced::of(&manifest).map_err(corrupt)?;
        let saved = manifest.vm.clone().unwrap_or_default();
        let vm = if request.vm_id.is_empty() {
            VmName::parse(&saved.name).map_err(corrupt)?
        } else {
            VmName::from_id(&request.vm_id)?
        };
        self.backends.fresh().await;
        // Before anything is taken, and before a process is started.
        self.admits(&manifest).await?;
        if request.validate_only {
            self.check_new(&vm, announced.memory, announced.spec.backend)
                .await?;
            let vm = v1::Vm {
                name: vm.to_string(),
                spec: saved.spec,
                host: self.host.to_string(),
                ..Default::default()
            };
            return Ok(v1::RestoreVmResponse {
                vm: Some(vm),
                duration_nanos: nanos(began),
            });
        }
        let source = PageSource::of_files(&self.path_of(&used), &used.opened.files())?;
        let build = v1::BuildCopyRequest {
            vm_id: vm.id().to_owned(),
            manifest: Some(manifest),
            state: contents.state,
            lazy: request.lazy,
            start: request.start,
            paging: request.paging,
        };
        let plan = self.plan(vm, &announced, build, used.ids()).await?;
        let made = Arc::clone(&self).build(plan, Arc::new(source)).await;
        counts::copied("save", made.is_ok());
        // Its process has written down by now what it needs.
        drop(used);
        let vm = made?;
        tracing::info!(vm = %vm.name, uid = %vm.uid, save = %name, lazy = request.lazy, "VM restored");
        Ok(v1::RestoreVmResponse {
            vm: Some(vm),
            duration_nanos: nanos(began),
        })
    }

    fn path_of(&self, used: &Used) -> String {
        let ids = used.ids();
        let own = ids.first().map_or("", String::as_str);
        self.saves.path(own).display().to_string()
    }

    /// Makes copies of a VM.
    ///
    /// # Errors
    /// The VM's own; NO_MEMORY, VM_EXISTS before it is paused; that of the first child that could
    /// not be made, with `made` and `failed`.
    pub(crate) async fn fork(
        self: Arc<Self>,
        parent: Arc<LiveVm>,
        children: Vec<VmName>,
        paused: bool,
    ) -> Result<v1::ForkVmResponse, ApiError> {
        let began = Instant::now();
        let held = self.registry.label(parent.uid());
        let memory = held.map_or(0, |(_, memory)| memory);
        // All names and all memory, before the parent stops for it.
        let mut claims = Vec::new();
        for child in &children {
            claims.push(self.claim_copy(child, memory).await?);
        }
        let names: Vec<&str> = children.iter().map(VmName::id).collect();
        let purpose = format!("fork to {}", names.join(", "));
        let taken = self.snapshot(&parent, purpose, false).await?;
        counts::paused("fork", taken.said.pause_nanos);
        Announced::of(&taken.manifest)?;
        let saves = saves::needed_by(&parent);
        let source = Arc::new(match children.len() {
            1 => taken.source,
            _ => taken.source.shared(),
        });
        let mut making = tokio::task::JoinSet::new();
        for (at, (vm, (uid, claim))) in children.iter().cloned().zip(claims).enumerate() {
            let request = v1::BuildCopyRequest {
                vm_id: vm.id().to_owned(),
                manifest: Some(taken.manifest.clone()),
                state: taken.said.state.clone(),
                lazy: true,
                start: taken.said.ran && !paused,
                paging: v1::Paging::Unspecified.into(),
            };
            let plan = Plan {
                vm,
                claim,
                uid,
                memory,
                request,
                saves: saves.clone(),
            };
            let (me, source) = (Arc::clone(&self), Arc::clone(&source));
            making.spawn(async move { (at, me.build(plan, source).await) });
        }
        // From here on the children alone hold the lease.
        drop(source);
        let mut results = Vec::new();
        while let Some(result) = making.join_next().await {
            results.push(result.map_err(|error| task_failed(&error))?);
        }
        results.sort_by_key(|(at, _)| *at);
        let vms = all_or_told(results)?;
        tracing::info!(vm = %parent.name(), children = names.join(","), "VM forked");
        Ok(v1::ForkVmResponse {
            vms,
            pause_nanos: taken.said.pause_nanos,
            duration_nanos: nanos(began),
        })
    }

    async fn plan(
        self: &Arc<Self>,
        vm: VmName,
        announced: &Announced,
        request: v1::BuildCopyRequest,
        saves: Vec<String>,
    ) -> Result<Plan, ApiError> {
        self.check_backend(announced.spec.backend)?;
        let memory = announced.memory;
        let (uid, claim) = self.claim_copy(&vm, memory).await?;
        Ok(Plan {
            vm,
            claim,
            uid,
            memory,
            request,
            saves,
        })
    }

    async fn claim_copy(
        self: &Arc<Self>,
        vm: &VmName,
        memory: u64,
    ) -> Result<(VmUid, Claim), ApiError> {
        let uid = VmUid::fresh();
        self.check_path(&uid)?;
        self.reread().await;
        self.settled_name(vm).await;
        let claim = self
            .registry
            .claim(&uid, vm, memory, Work::Creating)
            .map_err(|refusal| refused(vm, Reason::NoMemory, refusal))?;
        Ok((uid, claim))
    }

    /// Makes one VM of its source. On failure nothing is left.
    async fn build(
        self: Arc<Self>,
        plan: Plan,
        source: Arc<PageSource>,
    ) -> Result<v1::Vm, ApiError> {
        let live = self.launch(plan.uid, &plan.vm, false).await?;
        match self
            .hand_over(&live, plan.request, source, plan.saves)
            .await
        {
            Ok(made) => {
                save_seen(live.dir(), &made);
                live.see(made.clone());
                self.go_live(plan.claim, &live, plan.memory);
                Ok(made)
            }
            Err(error) => {
                let error = never_made(&live, error, "was made").await;
                tracing::warn!(vm = %plan.vm, %error, "a copy was not made");
                self.undo(&live).await;
                drop(plan.claim);
                Err(error)
            }
        }
    }

    async fn hand_over(
        &self,
        live: &Arc<LiveVm>,
        request: v1::BuildCopyRequest,
        source: Arc<PageSource>,
        needs: Vec<String>,
    ) -> Result<v1::Vm, ApiError> {
        let dir = live.dir().clone();
        let given = blocking(move || {
            saves::note(&dir, &needs)
                .map_err(|error| ApiError::from_io(Reason::Store, dir.path(), &error))?;
            source.give(&dir)
        });
        given.await?;
        // Whoever has no pager gets no page.
        let asked = live.paged().ask();
        let mut copies = live.copies();
        let made = live
            .answer_within(BUILD, copies.build_copy(request))
            .await?;
        drop(asked);
        Ok(made)
    }
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The children, or the first failure with what became of the others.
fn all_or_told(results: Vec<(usize, Result<v1::Vm, ApiError>)>) -> Result<Vec<v1::Vm>, ApiError> {
    let (mut made, mut failed, mut first) = (Vec::new(), 0_usize, None);
    for (_, result) in results {
        counts::copied("vm", result.is_ok());
        match result {
            Ok(vm) => made.push(vm),
            Err(error) => {
                failed += 1;
                first.get_or_insert(error);
            }
        }
    }
    let Some(error) = first else {
        return Ok(made);
    };
    if made.is_empty() {
        return Err(error);
    }
    let names: Vec<&str> = made.iter().map(|vm| vm.name.as_str()).collect();
    let names = names.join(",");
    let words = format!("{failed} children were not made, and {names} were: {error}");
    Err(ApiError {
        message: words,
        ..error.with("made", names).with("failed", failed).with(
            "advice",
            "the children that were made stay; fork again for the others",
        )
    })
}
