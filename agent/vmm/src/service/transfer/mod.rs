//! Our own machine's sides of migrations: started here, and answered for. [`TransferApi`] serves
//! them.
//!
//! A process has at most one running side. The last source's side stays to be asked about after it
//! ended, until it is released or another begins; so does the destination's side that brought the
//! VM here. The lock around the sides is held for look-ups only; beginning a side has a lock of its
//! own, taken before it.
//!
//! `endpoint` holds the sides, `incoming` prepares the destination's, `outgoing` describes and
//! starts the source's, `api` is the gRPC service.

mod api;
mod endpoint;
mod expiry;
mod incoming;
mod keys;
mod outgoing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_downtime;
#[cfg(test)]
mod tests_expiry;
#[cfg(test)]
mod tests_hostile;
#[cfg(test)]
mod tests_leave;
#[cfg(test)]
mod tests_modes;
#[cfg(test)]
mod tests_server;
#[cfg(test)]
mod tests_software;

use std::sync::Arc;

use slat_proto::{
    ApiError,
    model::MigrationName,
    v1::{self, TransferRole},
};

pub(crate) use self::{api::TransferApi, endpoint::TransferEndpoint};
use super::monitor::{Transfers, Watched};

impl Transfers for TransferEndpoint {
    fn describe_outgoing(
        &self,
        request: &v1::DescribeOutgoingRequest,
    ) -> Result<v1::DescribeOutgoingResponse, ApiError> {
        self.describe(request)
    }

    fn prepare_incoming(
        &self,
        request: &v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        self.prepare(request, tokio::runtime::Handle::current())
    }

    fn start_outgoing(&self, request: &v1::StartOutgoingRequest) -> Result<v1::Transfer, ApiError> {
        self.start(request, &tokio::runtime::Handle::current())
    }

    fn transfer(
        &self,
        migration: &MigrationName,
        role: TransferRole,
    ) -> Result<v1::Transfer, ApiError> {
        Ok(self.find(migration, role)?.transfer())
    }

    fn watch(&self, migration: &MigrationName, role: TransferRole) -> Result<Watched, ApiError> {
        let side = self.find(migration, role)?;
        let shown = Arc::clone(&side);
        Ok(Watched {
            changes: side.watch(),
            phase: Box::new(move || shown.phase()),
            now: Box::new(move || side.transfer()),
        })
    }

    fn cancel(
        &self,
        migration: &MigrationName,
        role: TransferRole,
        cause: Option<v1::MigrationError>,
    ) -> Result<v1::Transfer, ApiError> {
        let side = self.find(migration, role)?;
        side.cancel(cause)?;
        Ok(side.transfer())
    }

    fn resolve(&self, request: &v1::ResolveTransferRequest) -> Result<v1::Transfer, ApiError> {
        self.resolve(request)
    }

    fn adopt(
        &self,
        request: &v1::AdoptTransferRequest,
    ) -> Result<v1::AdoptTransferResponse, ApiError> {
        self.adopt(request)
    }

    fn release(&self, migration: &MigrationName, role: TransferRole) -> Result<(), ApiError> {
        self.forget(migration, role)
    }
}
