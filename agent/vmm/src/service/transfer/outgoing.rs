//! The source's side begins: it says what the destination must know, then sends.

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, MigrationParams, PAGE_SIZE, VmRef, VmSpec, now},
    v1::{self, TransferPhase, TransferRole},
};

use super::endpoint::TransferEndpoint;
use crate::{
    handover::{
        preamble,
        protocol::source::Source,
        side::{Side, has_ended},
    },
    migration::{
        source::{SourceDriver, take_back},
        wire::TICKET,
    },
};

/// What a side needs to know of its destination.
struct Towards {
    address: std::net::SocketAddr,
    ticket: [u8; TICKET],
    params: MigrationParams,
    epoch: u64,
    versions: v1::ChosenVersions,
    remembered: Option<v1::RememberedCosts>,
}

impl TransferEndpoint {
    /// What the destination must know before it reserves anything.
    pub(super) fn describe(
        &self,
        request: &v1::DescribeOutgoingRequest,
    ) -> Result<v1::DescribeOutgoingResponse, ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
        self.is_meant(&request.vm, &request.vm_uid)?;
        let vm = self.machine.describe_outgoing(&migration, request.epoch)?;
        let spec = vm.spec.clone().unwrap_or_default();
        let backend = VmSpec::from_resource(&spec)?
            .backend
            .ok_or_else(|| ApiError::new(Reason::Internal, "a VM without a backend"))?;
        // What the VM was told, not all that this host has: it may have come from a lesser one.
        let cpu = self.machine.backend()?.cpu_facts();
        let slots = self.machine.list_slots()?.slots;
        Ok(v1::DescribeOutgoingResponse {
            preamble: Some(preamble::describe(backend, cpu)),
            vm: Some(vm),
            slots,
            send_time: Some(now()),
        })
    }

    /// Starts sending. Idempotent for the same migration, until its side is released; afterwards
    /// the same request is refused with GRANT_INVALID.
    pub(super) fn start(
        &self,
        request: &v1::StartOutgoingRequest,
    ) -> Result<v1::Transfer, ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
        self.is_meant(&request.vm, &request.vm_uid)?;
        let params = MigrationParams::from_message(request.params.as_ref())?;
        let address = request.data_address.parse().map_err(|_| {
            ApiError::bad_parameter(
                "data_address",
                format_args!(
                    "\"{}\" is not ip:port",
                    request.data_address.escape_default()
                ),
            )
        })?;
        let ticket = request.ticket.as_slice().try_into().map_err(|_| {
            ApiError::bad_parameter(
                "ticket",
                format_args!("{} bytes, not {TICKET}", request.ticket.len()),
            )
        })?;
        let versions = preamble::accept(request.versions.as_ref())?;
        let _starting = self.starting();
        let before = self.sides().outgoing.clone();
        if let Some(side) = before
            .as_ref()
            .filter(|side| *side.migration() == migration)
        {
            return Ok(side.transfer());
        }
        if self.sides().is_spent(&ticket) {
            return Err(ApiError::new(
                Reason::GrantInvalid,
                format!("{migration} has begun here before, and ended; this request is late"),
            )
            .with("migration", &migration)
            .with("vm", &self.vm)
            .with("advice", "begin a new migration"));
        }
        // Before the side of another migration is replaced: it may still be asked about.
        self.machine.describe_outgoing(&migration, request.epoch)?;
        if let Some(other) = before.as_ref().filter(|side| !has_ended(side.phase())) {
            return Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("{} is still part of {}", self.vm, other.migration()),
            )
            .with("vm", &self.vm)
            .with("migration", other.migration())
            .with("advice", "wait for the migration or cancel it"));
        }
        let total = self.machine.memory().table().pages() * PAGE_SIZE;
        let side = Arc::new(Side::new(
            &migration,
            (&self.vm, self.uid()),
            request.epoch,
            total,
        ));
        // Known from the moment it may begin: whoever asks meanwhile is not told that there is
        // none.
        self.sides().outgoing = Some(Arc::clone(&side));
        let towards = Towards {
            address,
            ticket,
            params,
            epoch: request.epoch,
            versions,
            remembered: request.remembered,
        };
        let begun = self.begin(&side, towards);
        if let Err(error) = begun {
            self.sides().outgoing = before;
            side.publish_end(
                TransferPhase::Failed,
                Some(error.to_migration_error(v1::MigrationPhase::Preparing, "source")),
            );
            return Err(error);
        }
        self.sides().spend(ticket);
        Ok(side.transfer())
    }

    /// Takes the VM back that the source's side gave away.
    pub(super) fn adopt(
        &self,
        request: &v1::AdoptTransferRequest,
    ) -> Result<v1::AdoptTransferResponse, ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
        VmRef::new("", &request.vm_uid, "")?.check(&self.vm, &self.uid(), self.machine.host())?;
        // One order at a time, and none while another side begins.
        let _starting = self.starting();
        let side = self.sides().outgoing.clone();
        let side = side
            .filter(|side| *side.migration() == migration)
            .ok_or_else(|| self.unknown(&migration, TransferRole::Source))?;
        take_back(&self.machine, &side, request.epoch)?;
        Ok(v1::AdoptTransferResponse {
            vm: self.machine.snapshot(),
            transfer: Some(side.transfer()),
        })
    }

    fn begin(&self, side: &Arc<Side<Source>>, towards: Towards) -> Result<(), ApiError> {
        self.machine
            .begin_outgoing(side.migration(), towards.epoch)?;
        let source = SourceDriver {
            machine: Arc::clone(&self.machine),
            side: Arc::clone(side),
            address: towards.address,
            ticket: towards.ticket,
            params: towards.params,
            epoch: towards.epoch,
            versions: towards.versions,
            filter: Arc::clone(&self.filter),
            remembered: towards.remembered,
        };
        if let Err(error) = std::thread::Builder::new()
            .name("outgoing".to_owned())
            .spawn(move || source.run())
        {
            self.machine.end_outgoing(side.migration())?;
            return Err(ApiError::new(
                Reason::Internal,
                format!("no thread for the migration: {error}"),
            ));
        }
        Ok(())
    }
}
