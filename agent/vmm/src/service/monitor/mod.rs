//! What runs the VM of this process, as its services see it: our own machine, or another monitor in
//! its place.
//!
//! # Protocol
//! Calls come from any thread and may block: the services make them on blocking threads. Only what
//! says that it does not block is called from the runtime's workers. A monitor orders calls itself;
//! two may come at the same time.
//!
//! # What a VM cannot do
//! There are no default methods: an implementation says of each call what it does. What its VM
//! cannot do it refuses with CAPABILITY_MISSING and the capability's name
//! ([`slat_proto::ApiError::capability_missing`]), and leaves that capability out of
//! [`Monitor::snapshot`].
//!
//! Requests come as the API's model types, already checked; answers are the API's messages.

mod cancel;
mod copies;
mod machine;
mod transfers;

use std::{fmt, future::Future, pin::Pin};

use slat_proto::{
    ApiError,
    model::{CursorName, DirtyRateOrder, HostName, Paging, SlotChange, SlotSpec, VmName, VmSpec},
    v1::{self, DirtyFormat},
};
use tokio::sync::watch;

pub(crate) use self::{
    cancel::{Cancel, CancelOnDrop},
    transfers::{Transfers, Watched},
};

/// A VM that is to be made of a snapshot, whose pages were handed over before.
#[derive(Clone, Debug)]
pub(crate) struct CopySpec {
    /// What [`Monitor::take_snapshot`] said of the VM; it has one.
    pub(crate) manifest: v1::PrepareIncomingRequest,
    /// Its slots.
    pub(crate) slots: Vec<SlotSpec>,
    /// Everything but memory.
    pub(crate) state: Vec<u8>,
    /// It is there before its pages are.
    pub(crate) lazy: bool,
    /// It runs at once.
    pub(crate) start: bool,
    /// Who pages it; `None`: as its spec says.
    pub(crate) paging: Option<Paging>,
}

/// What a harvest of the working set is asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct HarvestOrder {
    /// Only these frames.
    pub(crate) range: Option<v1::GfnRange>,
    /// Who asks; `None`: nobody in particular.
    pub(crate) reader: Option<CursorName>,
    /// The reader ends with the answer.
    pub(crate) end: bool,
}

/// Runs one VM. See the module for the protocol; the proto files say what each call means and with
/// which reasons it fails.
pub(crate) trait Monitor: fmt::Debug + Send + Sync + 'static {
    /// The one VM that it runs, or will run. Does not block.
    fn name(&self) -> &VmName;
    /// The identity of that VM; `None` before it is known. Does not block.
    fn uid(&self) -> Option<String>;
    /// The host that it runs on. Does not block.
    fn host(&self) -> &HostName;
    /// The VM now; `None` before it exists and after it was deleted.
    fn snapshot(&self) -> Option<v1::Vm>;
    /// A number that grows at each change of state. Does not block.
    fn changes(&self) -> watch::Receiver<u64>;
    /// Completes when the VM is over. Does not block.
    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;

    /// What [`Monitor::create`] would build, with every default filled in; nothing is built.
    fn plan(&self, spec: &VmSpec) -> Result<VmSpec, ApiError>;
    /// Builds the VM in state CREATED.
    fn create(&self, spec: VmSpec) -> Result<v1::Vm, ApiError>;
    /// CREATED to RUNNING.
    fn start(&self) -> Result<v1::Vm, ApiError>;
    /// RUNNING to PAUSED.
    fn pause(&self) -> Result<v1::Vm, ApiError>;
    /// PAUSED to RUNNING.
    fn resume(&self) -> Result<v1::Vm, ApiError>;
    /// Ends the VM for good.
    fn delete(&self) -> Result<(), ApiError>;

    /// Slots, by base.
    fn list_slots(&self) -> Result<v1::ListSlotsResponse, ApiError>;
    /// Changes slots, all or none, in order.
    fn update_slots(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Result<v1::UpdateSlotsResponse, ApiError>;
    /// The same, where it neither waits for anybody nor takes longer than a task of the runtime
    /// may; `None`, having done nothing, where it could.
    fn update_slots_at_once(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Option<Result<v1::UpdateSlotsResponse, ApiError>>;
    /// Takes what was written since the cursor's last harvest, in at most `most` ranges, or pieces
    /// of a bitmap; makes the cursor when there is none. `acknowledge` is the batch before, or 0.
    fn harvest_dirty_pages(
        &self,
        cursor: &CursorName,
        acknowledge: u64,
        format: DirtyFormat,
        most: usize,
    ) -> Result<v1::HarvestDirtyPagesResponse, ApiError>;
    /// Removes a cursor that a caller made.
    fn delete_dirty_cursor(&self, cursor: &CursorName) -> Result<(), ApiError>;
    /// The readers of the VM's dirty pages.
    fn list_dirty_cursors(&self) -> Result<v1::ListDirtyCursorsResponse, ApiError>;
    /// Measures how fast the VM dirties its memory, until it is done or `cancel` is set; a
    /// measurement that was cancelled answers anything.
    fn measure_dirty_rate(
        &self,
        order: DirtyRateOrder,
        cancel: &Cancel,
    ) -> Result<v1::MeasureDirtyRateResponse, ApiError>;
    /// Drops the second-stage mappings of a range, or of all memory.
    fn invalidate(
        &self,
        range: Option<v1::GfnRange>,
    ) -> Result<v1::InvalidateMemoryResponse, ApiError>;
    /// Gives the host's pages of ranges back.
    fn discard(&self, ranges: &[v1::GfnRange]) -> Result<v1::DiscardMemoryResponse, ApiError>;
    /// Digests all memory of a VM that does not run.
    fn digest(&self) -> Result<v1::DigestMemoryResponse, ApiError>;

    /// Tries a page source again that failed.
    fn retry_page_source(&self) -> Result<v1::Vm, ApiError>;
    /// Takes the mappings of a range away, or of all memory, and says which there were.
    fn harvest_working_set(
        &self,
        order: HarvestOrder,
    ) -> Result<v1::HarvestWorkingSetResponse, ApiError>;
    /// What is mapped, from a frame on.
    fn list_mappings(&self, from_gfn: u64) -> Result<v1::ListMappingsResponse, ApiError>;
    /// Maps frames before the guest touches them.
    fn prefault_memory(&self, gfn: u64, pages: u64)
    -> Result<v1::PrefaultMemoryResponse, ApiError>;

    /// Begins a snapshot of memory and reads the state.
    fn take_snapshot(
        &self,
        purpose: &str,
        may_pause: bool,
    ) -> Result<v1::TakeSnapshotResponse, ApiError>;
    /// Makes the VM of a snapshot.
    fn build_copy(&self, copy: &CopySpec) -> Result<v1::Vm, ApiError>;
}
