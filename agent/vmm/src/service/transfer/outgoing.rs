//! The source's side begins: it says what the destination must know, then sends.

use std::{sync::Arc, time::SystemTime};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, MigrationParams, PAGE_SIZE, VmRef, VmSpec, now},
    v1::{self, TransferPhase, TransferRole},
};
use slat_trust::{channel::ChannelKey, grant::Purpose};

use super::{endpoint::TransferEndpoint, expiry::end_with, keys};
use crate::{
    handover::{
        leave::{Leave, Step},
        preamble,
        protocol::source::Source,
        side::{Side, has_ended},
    },
    migration::{
        channel::Channel,
        source::{SourceDriver, take_back},
        wire::TICKET,
    },
};

/// What a side needs to know of its destination.
struct Towards {
    address: std::net::SocketAddr,
    channel: Channel,
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
        let channel_key = if self.insecure_pages {
            Vec::new()
        } else {
            self.key_for(&migration)?.fingerprint().to_vec()
        };
        let mut own = preamble::describe(backend, cpu);
        own.channels = preamble::channels(self.insecure_pages);
        Ok(v1::DescribeOutgoingResponse {
            preamble: Some(own),
            vm: Some(vm),
            slots,
            send_time: Some(now()),
            channel_key,
        })
    }

    /// The key of a migration's page streams: the one that it has, or a new one.
    fn key_for(&self, migration: &MigrationName) -> Result<Arc<ChannelKey>, ApiError> {
        let mut sides = self.sides();
        if let Some(key) = sides.keys.of(migration) {
            return Ok(key);
        }
        let key = keys::make(&self.uid(), migration)?;
        sides.keys.keep(migration, Arc::clone(&key));
        Ok(key)
    }

    /// Starts sending. Idempotent for the same migration, until its side is released; afterwards
    /// the same request is refused with GRANT_USED, and its ticket by another grant with
    /// GRANT_INVALID.
    pub(super) fn start(
        &self,
        request: &v1::StartOutgoingRequest,
        runtime: &tokio::runtime::Handle,
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
        let uid = self.uid();
        let step = Step {
            purpose: Purpose::Send,
            migration: &migration,
            vm_uid: &uid,
            epoch: request.epoch,
            host: self.machine.host(),
        };
        let (grant, keys) = (request.grant.as_ref(), &request.grant_keys);
        let leave = Leave::check(grant, keys, &step, SystemTime::now())?;
        let _starting = self.starting();
        let before = self.sides().outgoing.clone();
        if let Some(side) = before
            .as_ref()
            .filter(|side| *side.migration() == migration)
        {
            return Ok(side.transfer());
        }
        if self.sides().is_used(&leave.id()) {
            return Err(leave.used());
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
        let channel = self.channel(request.channel(), ticket, &migration, &leave)?;
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
            channel,
            params,
            epoch: request.epoch,
            versions,
            remembered: request.remembered,
        };
        let begun = self.begin(&side, towards, &leave);
        if let Err(error) = begun {
            self.sides().outgoing = before;
            side.publish_end(
                TransferPhase::Failed,
                Some(error.to_migration_error(v1::MigrationPhase::Preparing, "source")),
            );
            return Err(error);
        }
        let mut sides = self.sides();
        sides.spend(ticket);
        sides.use_up(leave.id());
        sides.outgoing_expiry = Some(end_with(&side, leave, runtime));
        drop(sides);
        Ok(side.transfer())
    }

    /// How connections to the destination are opened, as the grant says.
    fn channel(
        &self,
        chosen: v1::PageChannel,
        ticket: [u8; TICKET],
        migration: &MigrationName,
        leave: &Leave,
    ) -> Result<Channel, ApiError> {
        let (own, peer) = (leave.grant().source_key, leave.grant().destination_key);
        let plain = chosen != v1::PageChannel::Tls;
        if plain != self.insecure_pages {
            return Err(leave
                .wrong("page streams are to be protected, or not, otherwise than they are here"));
        }
        if plain {
            if own != [0; 32] || peer != [0; 32] {
                return Err(leave.wrong("it names keys, and page streams are in the clear"));
            }
            return Ok(Channel::plain(ticket));
        }
        let key = self.sides().keys.of(migration);
        let key = key
            .filter(|key| key.fingerprint() == own)
            .ok_or_else(|| leave.wrong("it names a key that is not this process's"))?;
        if peer == [0; 32] {
            return Err(leave.wrong("it names no key of the destination"));
        }
        Channel::source(ticket, &key, peer, leave.binding(own, peer)?)
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

    fn begin(
        &self,
        side: &Arc<Side<Source>>,
        towards: Towards,
        leave: &Leave,
    ) -> Result<(), ApiError> {
        self.machine
            .begin_outgoing(side.migration(), towards.epoch)?;
        self.machine.go_by(leave.mark());
        let source = SourceDriver {
            machine: Arc::clone(&self.machine),
            side: Arc::clone(side),
            address: towards.address,
            channel: towards.channel,
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
