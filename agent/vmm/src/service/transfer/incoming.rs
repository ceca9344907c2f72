//! The destination's side begins: what the source said is checked, an empty VM is built, and the
//! data port opened.

use std::{
    io::Read as _,
    sync::{Arc, Mutex, PoisonError, mpsc},
};

use slat_proto::{
    ApiError, Reason,
    model::{
        MigrationName, MigrationParams, SlotSpec, Verify, VmName, check_slot_table, to_own_clock,
    },
    transport::Address,
    v1::{self, TransferRole, resolve_transfer_request::Decision as WireDecision},
};

use super::endpoint::{Incoming, TransferEndpoint};
use crate::{
    handover::{
        preamble,
        protocol::destination::{Decision, Destination},
        side::Side,
    },
    migration::{
        data_port,
        destination::{DestinationDriver, Note},
        listener::Listener,
        wire::TICKET,
    },
};

/// What a side needs to know of its source.
struct From {
    params: MigrationParams,
    epoch: u64,
    versions: v1::ChosenVersions,
    agent: Option<Address>,
}

impl TransferEndpoint {
    /// Builds the empty VM and listens. Idempotent for the same migration.
    pub(super) fn prepare(
        &self,
        request: &v1::PrepareIncomingRequest,
        runtime: tokio::runtime::Handle,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
        let mut vm = request
            .vm
            .clone()
            .ok_or_else(|| ApiError::bad_parameter("vm", "is missing"))?;
        to_own_clock(&mut vm.create_time, request.send_time.as_ref());
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
        // Before anything is reserved.
        let versions = preamble::admit_here(request)?;
        if request.validate_only {
            return Ok(v1::PrepareIncomingResponse::default());
        }
        let agent = match request.source_agent_address.as_str() {
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
        self.machine.begin_incoming(&migration, &vm, &slots)?;
        let total = slots.iter().map(|slot| slot.bytes()).sum();
        let side = Arc::new(Side::new(
            &migration,
            (&self.vm, vm.uid.clone()),
            vm.epoch,
            total,
        ));
        let from = From {
            params,
            epoch: vm.epoch,
            versions,
            agent,
        };
        match self.listen(&side, from, runtime) {
            Ok(incoming) => {
                let answer = incoming.answer();
                self.sides().incoming = Some(incoming);
                Ok(answer)
            }
            Err(error) => {
                self.machine.abort_incoming(&migration)?;
                Err(error.with("vm", &self.vm).with("migration", &migration))
            }
        }
    }

    fn listen(
        &self,
        side: &Arc<Side<Destination>>,
        from: From,
        runtime: tokio::runtime::Handle,
    ) -> Result<Incoming, ApiError> {
        let failed = |error: std::io::Error| {
            ApiError::new(
                Reason::Internal,
                format!("the data port cannot be served: {error}"),
            )
        };
        let mut ticket = [0; TICKET];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut ticket))
            .map_err(failed)?;
        let socket = data_port::bind(self.data_ip, self.data_ports)?;
        let (sender, notes) = mpsc::channel();
        let protocol = from.versions.protocol;
        let admit = Mutex::new(sender.clone());
        let listener = Listener::open(socket, ticket, protocol, from.epoch, move |peer| {
            let admit = admit.lock().unwrap_or_else(PoisonError::into_inner);
            // The side has ended: the connection closes with the value.
            drop(admit.send(Note::Connected(peer)));
        })
        .map_err(failed)?;
        let data_address = listener.address().to_string();
        let destination = DestinationDriver {
            machine: Arc::clone(&self.machine),
            side: Arc::clone(side),
            streams: from.params.streams,
            verify: from.params.verify != Verify::None,
            epoch: from.epoch,
            versions: from.versions,
            source_agent: from.agent,
            runtime,
            listener,
            notes,
            sender: sender.clone(),
        };
        std::thread::Builder::new()
            .name("incoming".to_owned())
            .spawn(move || destination.run())
            .map_err(failed)?;
        Ok(Incoming {
            side: Arc::clone(side),
            notes: sender,
            data_address,
            ticket,
            versions: from.versions,
        })
    }

    pub(super) fn resolve(
        &self,
        request: &v1::ResolveTransferRequest,
    ) -> Result<v1::Transfer, ApiError> {
        let side = self.find(
            &MigrationName::parse(&request.migration)?,
            TransferRole::Destination,
        )?;
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
}
