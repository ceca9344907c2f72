//! Our own machine's sides of migrations: starts them and answers for them. [`TransferApi`] serves
//! them.
//!
//! A process has at most one running side. The last source side stays to be asked about after it
//! ended, until it is released or another begins; so does the destination side that brought the VM
//! here. Blocking work runs on `spawn_blocking`; the sides' threads are their own. The lock around
//! the sides is held for look-ups only; beginning a side has a lock of its own, taken before it.

mod api;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_software;

use std::{
    io::Read as _,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, MigrationParams, SlotSpec, Verify, VmName, check_slot_table},
    transport::Address,
    v1::{self, TransferPhase, TransferRole, resolve_transfer_request::Decision as WireDecision},
};

use super::monitor::{Transfers, Watched};
use crate::{
    handover::side::{Side, is_terminal},
    machine::Machine,
    migration::{
        destination::{Decision, Destination, Note},
        listener::Listener,
        source::Source,
        wire::TICKET,
    },
};

pub(crate) use self::api::TransferApi;

/// The destination side with what is needed to talk to it.
#[derive(Debug)]
struct Incoming {
    side: Arc<Side>,
    notes: mpsc::Sender<Note>,
    data_address: String,
    ticket: [u8; TICKET],
}

#[derive(Debug, Default)]
struct Sides {
    incoming: Option<Incoming>,
    outgoing: Option<Arc<Side>>,
}

/// The sides over one machine.
#[derive(Clone, Debug)]
pub(crate) struct TransferEndpoint {
    machine: Arc<Machine>,
    vm: VmName,
    data_ip: IpAddr,
    sides: Arc<Mutex<Sides>>,
    /// Held while a side begins, which may take long; never by those who only ask.
    starting: Arc<Mutex<()>>,
    #[cfg(test)]
    pub(super) omit: Option<(u32, u32, u32)>,
}

impl TransferEndpoint {
    /// No sides yet of `machine`, whose incoming pages are taken on `data_ip`.
    #[must_use]
    pub(crate) fn new(machine: Arc<Machine>, vm: VmName, data_ip: IpAddr) -> Self {
        Self {
            machine,
            vm,
            data_ip,
            sides: Arc::default(),
            starting: Arc::default(),
            #[cfg(test)]
            omit: None,
        }
    }

    fn sides(&self) -> MutexGuard<'_, Sides> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn starting(&self) -> MutexGuard<'_, ()> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(&self, migration: &str, role: TransferRole) -> Result<Arc<Side>, ApiError> {
        let migration = MigrationName::parse(migration)?;
        let sides = self.sides();
        let side = match role {
            TransferRole::Source => sides.outgoing.as_ref(),
            TransferRole::Destination => sides.incoming.as_ref().map(|incoming| &incoming.side),
            TransferRole::Unspecified => {
                return Err(ApiError::bad_parameter("role", "is SOURCE or DESTINATION"));
            }
        };
        side.filter(|side| *side.migration() == migration)
            .cloned()
            .ok_or_else(|| {
                ApiError::new(
                    Reason::NoSuchMigration,
                    format!(
                        "{} has no {} side of {migration}",
                        self.vm,
                        role.as_str_name()
                    ),
                )
                .with("migration", &migration)
            })
    }

    /// Builds the empty VM and listens. Idempotent for the same migration.
    fn prepare(
        &self,
        request: &v1::PrepareIncomingRequest,
        runtime: tokio::runtime::Handle,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
        let vm = request
            .vm
            .as_ref()
            .ok_or_else(|| ApiError::bad_parameter("vm", "is missing"))?;
        if VmName::parse(&vm.name)? != self.vm {
            return Err(ApiError::bad_parameter(
                "vm.name",
                format_args!("this process is {}'s", self.vm),
            ));
        }
        let params = MigrationParams::from_message(request.params.as_ref())?;
        let slots: Vec<SlotSpec> = request
            .slots
            .iter()
            .map(SlotSpec::from_message)
            .collect::<Result<_, _>>()?;
        check_slot_table(&slots)?;
        let source_agent = match request.source_agent_address.as_str() {
            "" => None,
            address => Some(address.parse::<Address>()?),
        };
        // Held to the end: two calls for the same migration build one side.
        let _starting = self.starting();
        if let Some(incoming) = &self.sides().incoming {
            if *incoming.side.migration() == migration {
                return Ok(incoming.answer());
            }
            return Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("{} arrives by {}", self.vm, incoming.side.migration()),
            )
            .with("migration", incoming.side.migration()));
        }
        self.machine.begin_incoming(&migration, vm, &slots)?;
        let total = slots.iter().map(|slot| slot.bytes()).sum();
        let side = Arc::new(Side::new(
            &migration,
            &self.vm,
            TransferRole::Destination,
            vm.epoch,
            total,
        ));
        match self.listen(&side, params, vm.epoch, source_agent, runtime) {
            Ok(incoming) => {
                let answer = incoming.answer();
                self.sides().incoming = Some(incoming);
                Ok(answer)
            }
            Err(error) => {
                self.machine.abort_incoming(&migration)?;
                Err(ApiError::new(
                    Reason::Internal,
                    format!("data port on {}: {error}", self.data_ip),
                ))
            }
        }
    }

    fn listen(
        &self,
        side: &Arc<Side>,
        params: MigrationParams,
        epoch: u64,
        source_agent: Option<Address>,
        runtime: tokio::runtime::Handle,
    ) -> std::io::Result<Incoming> {
        let mut ticket = [0; TICKET];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut ticket)?;
        let (sender, notes) = mpsc::channel();
        let admit = Mutex::new(sender.clone());
        let listener = Listener::open(self.data_ip, ticket, epoch, move |peer| {
            let admit = admit.lock().unwrap_or_else(PoisonError::into_inner);
            // The side has ended: the connection closes with the value.
            drop(admit.send(Note::Connected(peer)));
        })?;
        let data_address = listener.address().to_string();
        let destination = Destination {
            machine: Arc::clone(&self.machine),
            side: Arc::clone(side),
            streams: params.streams,
            verify: params.verify != Verify::None,
            epoch,
            source_agent,
            runtime,
            listener,
            notes,
            sender: sender.clone(),
        };
        std::thread::Builder::new()
            .name("incoming".to_owned())
            .spawn(move || destination.run())?;
        Ok(Incoming {
            side: Arc::clone(side),
            notes: sender,
            data_address,
            ticket,
        })
    }

    /// Starts sending. Idempotent for the same migration.
    fn start(&self, request: &v1::StartOutgoingRequest) -> Result<v1::Transfer, ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
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
        let _starting = self.starting();
        let before = self.sides().outgoing.clone();
        if let Some(side) = before
            .as_ref()
            .filter(|side| *side.migration() == migration)
        {
            return Ok(side.transfer());
        }
        let total = self.machine.memory().table().pages() * slat_proto::model::PAGE_SIZE;
        let side = Arc::new(Side::new(
            &migration,
            &self.vm,
            TransferRole::Source,
            request.epoch,
            total,
        ));
        // Known from the moment it may begin: whoever asks meanwhile is not told that there is
        // none.
        self.sides().outgoing = Some(Arc::clone(&side));
        let begun = self.begin(&side, address, ticket, params, request.epoch);
        if let Err(error) = begun {
            self.sides().outgoing = before;
            side.publish_end(
                TransferPhase::Failed,
                Some(error.to_migration_error(v1::MigrationPhase::Preparing, "source")),
            );
            return Err(error);
        }
        Ok(side.transfer())
    }

    fn begin(
        &self,
        side: &Arc<Side>,
        address: std::net::SocketAddr,
        ticket: [u8; TICKET],
        params: MigrationParams,
        epoch: u64,
    ) -> Result<(), ApiError> {
        self.machine.begin_outgoing(side.migration(), epoch)?;
        let source = Source {
            machine: Arc::clone(&self.machine),
            side: Arc::clone(side),
            address,
            ticket,
            params,
            epoch,
            #[cfg(test)]
            omit: self.omit,
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

    fn resolve(&self, request: &v1::ResolveTransferRequest) -> Result<v1::Transfer, ApiError> {
        let side = self.find(&request.migration, TransferRole::Destination)?;
        let decision = match WireDecision::try_from(request.decision) {
            Ok(WireDecision::Commit) => Decision::Commit,
            Ok(WireDecision::Abort) => Decision::Abort,
            _ => return Err(ApiError::bad_parameter("decision", "is COMMIT or ABORT")),
        };
        if let Some(incoming) = &self.sides().incoming {
            // A side that has ended needs no decision.
            drop(incoming.notes.send(Note::Decided(decision)));
        }
        Ok(side.transfer())
    }

    fn release(&self, request: &v1::ReleaseTransferRequest) -> Result<(), ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
        let role = TransferRole::try_from(request.role).unwrap_or_default();
        let side = match self.find(&request.migration, role) {
            Ok(side) => side,
            // Released before.
            Err(error) if error.reason == Reason::NoSuchMigration => return Ok(()),
            Err(error) => return Err(error),
        };
        let phase = side.phase();
        let relinquished = role == TransferRole::Source
            && matches!(
                phase,
                TransferPhase::Relinquished | TransferPhase::Completed
            );
        if !relinquished && !is_terminal(phase) {
            return Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("{migration} has not ended here: {}", phase.as_str_name()),
            )
            .with("migration", &migration)
            .with("phase", phase.as_str_name()));
        }
        side.release_record(self.machine.dir()).map_err(|error| {
            ApiError::new(
                Reason::Store,
                format!("the record of {migration} could not be removed: {error}"),
            )
        })?;
        if relinquished {
            // Before the side is forgotten: a release that fails is tried again.
            self.machine.release()?;
        }
        let mut sides = self.sides();
        match role {
            TransferRole::Source => sides.outgoing = None,
            _ => sides.incoming = None,
        }
        Ok(())
    }
}

impl Incoming {
    fn answer(&self) -> v1::PrepareIncomingResponse {
        v1::PrepareIncomingResponse {
            transfer: Some(self.side.transfer()),
            data_address: self.data_address.clone(),
            ticket: self.ticket.to_vec(),
        }
    }
}

impl Transfers for TransferEndpoint {
    fn prepare_incoming(
        &self,
        request: &v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        self.prepare(request, tokio::runtime::Handle::current())
    }

    fn start_outgoing(&self, request: &v1::StartOutgoingRequest) -> Result<v1::Transfer, ApiError> {
        self.start(request)
    }

    fn transfer(
        &self,
        migration: &MigrationName,
        role: TransferRole,
    ) -> Result<v1::Transfer, ApiError> {
        Ok(self.find(migration.id(), role)?.transfer())
    }

    fn watch(&self, migration: &MigrationName, role: TransferRole) -> Result<Watched, ApiError> {
        let side = self.find(migration.id(), role)?;
        Ok(Watched {
            changes: side.watch(),
            now: Box::new(move || side.transfer()),
        })
    }

    fn cancel(
        &self,
        migration: &MigrationName,
        role: TransferRole,
        cause: Option<v1::MigrationError>,
    ) -> Result<v1::Transfer, ApiError> {
        let side = self.find(migration.id(), role)?;
        side.cancel(cause)?;
        Ok(side.transfer())
    }

    fn resolve(&self, request: &v1::ResolveTransferRequest) -> Result<v1::Transfer, ApiError> {
        self.resolve(request)
    }

    fn release(&self, migration: &MigrationName, role: TransferRole) -> Result<(), ApiError> {
        self.release(&v1::ReleaseTransferRequest {
            migration: migration.to_string(),
            role: role.into(),
        })
    }
}
