//! A monitor's sides of migrations, as `TransferService` sees them.
//!
//! How pages and state travel is the monitor's own: ours has its data port and its journal, another
//! may have a protocol of its own. What a migration's coordinator sees is the same.

use std::fmt;

use slat_proto::{
    ApiError,
    model::MigrationName,
    v1::{self, TransferRole},
};
use tokio::sync::watch;

/// The sides of migrations that a monitor takes part in. Calls may block, may come at the same
/// time, and repeated for the same migration change nothing.
pub(crate) trait Transfers: fmt::Debug + Send + Sync + 'static {
    /// What a destination must know of the VM here before it reserves anything.
    fn describe_outgoing(
        &self,
        request: &v1::DescribeOutgoingRequest,
    ) -> Result<v1::DescribeOutgoingResponse, ApiError>;
    /// Begins the destination's side: an empty VM, and an address to send to.
    fn prepare_incoming(
        &self,
        request: &v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, ApiError>;
    /// Begins the source's side.
    fn start_outgoing(&self, request: &v1::StartOutgoingRequest) -> Result<v1::Transfer, ApiError>;
    /// A side now.
    fn transfer(
        &self,
        migration: &MigrationName,
        role: TransferRole,
    ) -> Result<v1::Transfer, ApiError>;
    /// A side now and from now on.
    fn watch(&self, migration: &MigrationName, role: TransferRole) -> Result<Watched, ApiError>;
    /// Ends a side before the point of no return; `cause` makes that FAILED instead of CANCELLED.
    fn cancel(
        &self,
        migration: &MigrationName,
        role: TransferRole,
        cause: Option<v1::MigrationError>,
    ) -> Result<v1::Transfer, ApiError>;
    /// Tells a destination in doubt what the source's journal says.
    fn resolve(&self, request: &v1::ResolveTransferRequest) -> Result<v1::Transfer, ApiError>;
    /// Takes back a VM that was given away, on an operator's order.
    fn adopt(
        &self,
        request: &v1::AdoptTransferRequest,
    ) -> Result<v1::AdoptTransferResponse, ApiError>;
    /// Forgets a side whose outcome is stored; a source that gave its VM away ends.
    fn release(&self, migration: &MigrationName, role: TransferRole) -> Result<(), ApiError>;
}

/// A side that is watched. It stays to be shown until the watch ends, even when it is released.
pub(crate) struct Watched {
    /// Grows at each change.
    pub(crate) changes: watch::Receiver<u64>,
    /// The side now. Does not block.
    pub(crate) now: Box<dyn Fn() -> v1::Transfer + Send + Sync>,
    /// Its phase now. Does not block.
    pub(crate) phase: Box<dyn Fn() -> v1::TransferPhase + Send + Sync>,
}
