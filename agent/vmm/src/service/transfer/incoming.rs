//! The destination's side begins: what the source said is checked, an empty VM is built, and the
//! data port opened.

use std::{
    io::Read as _,
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::SystemTime,
};

use slat_proto::{
    ApiError, Reason,
    model::{
        MigrationName, MigrationParams, SlotSpec, Verify, VmName, check_slot_table, to_own_clock,
    },
    transport::Address,
    v1::{self, TransferRole, resolve_transfer_request::Decision as WireDecision},
};
use slat_trust::grant::Purpose;

use super::{
    endpoint::{Incoming, TransferEndpoint},
    expiry::end_with,
    keys,
};
use crate::{
    handover::{
        leave::{Leave, Step},
        preamble,
        protocol::destination::{Decision, Destination},
        side::Side,
    },
    migration::{
        channel::Channel,
        data_port,
        destination::{DestinationDriver, Note},
        listener::Listener,
        wire::TICKET,
    },
};

/// A grant that names no key.
const NO_KEY: [u8; 32] = [0; 32];

/// What a side needs to know of its source.
struct From {
    params: MigrationParams,
    epoch: u64,
    versions: v1::ChosenVersions,
    agent: Option<Address>,
    channel: v1::PageChannel,
    leave: Leave,
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
        let preamble = request.preamble.clone().unwrap_or_default();
        let channel = preamble::choose_channel(&preamble, self.insecure_pages)?;
        if request.validate_only {
            return Ok(v1::PrepareIncomingResponse::default());
        }
        let agent = match request.source_agent_address.as_str() {
            "" => None,
            address => Some(address.parse::<Address>()?),
        };
        let step = Step {
            purpose: Purpose::Receive,
            migration: &migration,
            vm_uid: &vm.uid,
            epoch: vm.epoch,
            host: self.machine.host(),
        };
        let (grant, keys) = (request.grant.as_ref(), &request.grant_keys);
        let leave = Leave::check(grant, keys, &step, SystemTime::now())?;
        if (channel == v1::PageChannel::Tls) == (leave.grant().source_key == NO_KEY) {
            return Err(
                leave.wrong("page streams are to be protected, or not, otherwise than it says")
            );
        }
        // Held to the end: two calls for the same migration build one side.
        let _starting = self.starting();
        if let Some(incoming) = &self.sides().incoming {
            if *incoming.side.migration() == migration {
                return incoming.again(&leave);
            }
            return Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("{} arrives by {}", self.vm, incoming.side.migration()),
            )
            .with("migration", incoming.side.migration()));
        }
        if self.sides().is_used(&leave.id()) {
            return Err(leave.used());
        }
        if leave.grant().destination_key != NO_KEY {
            return Err(leave.wrong("it names a key that is not this process's"));
        }
        self.machine.begin_incoming(&migration, &vm, &slots)?;
        self.machine.go_by(leave.mark());
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
            channel,
            leave,
        };
        match self.listen(&side, from, runtime) {
            Ok(incoming) => {
                let answer = incoming.answer();
                let mut sides = self.sides();
                sides.use_up(incoming.leave.id());
                sides.incoming = Some(incoming);
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
        let key = match from.channel {
            v1::PageChannel::Tls => Some(keys::make(&side.transfer().vm_uid, side.migration())?),
            _ => None,
        };
        let channel = match &key {
            None => Channel::plain(ticket),
            Some(key) => {
                let peer = from.leave.grant().source_key;
                let binding = from.leave.binding(peer, key.fingerprint())?;
                Channel::destination(ticket, key, peer, binding)?
            }
        };
        let socket = data_port::bind(self.data_ip, self.data_ports)?;
        let (sender, notes) = mpsc::channel();
        let protocol = from.versions.protocol;
        let admit = Mutex::new(sender.clone());
        let listener = Listener::open(socket, channel, protocol, from.epoch, move |peer| {
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
            grant: from.leave.signed().clone(),
            runtime: runtime.clone(),
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
            channel: from.channel,
            key,
            _expiry: end_with(side, from.leave.clone(), &runtime),
            leave: from.leave,
        })
    }

    pub(super) fn resolve(
        &self,
        request: &v1::ResolveTransferRequest,
    ) -> Result<v1::Transfer, ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
        let side = self.find(&migration, TransferRole::Destination)?;
        let decision = match WireDecision::try_from(request.decision) {
            Ok(WireDecision::Commit) => Decision::Commit,
            Ok(WireDecision::Abort) => Decision::Abort,
            _ => return Err(ApiError::bad_parameter("decision", "is COMMIT or ABORT")),
        };
        // An operator's order is given to the agent, and by it.
        if !request.ordered {
            let transfer = side.transfer();
            let step = Step {
                purpose: match decision {
                    Decision::Commit => Purpose::Commit,
                    Decision::Abort => Purpose::Abort,
                },
                migration: &migration,
                vm_uid: &transfer.vm_uid,
                epoch: transfer.epoch,
                host: self.machine.host(),
            };
            let (grant, keys) = (request.grant.as_ref(), &request.grant_keys);
            Leave::check(grant, keys, &step, SystemTime::now())?;
        }
        if let Some(incoming) = &self.sides().incoming {
            // A side that has ended needs no decision.
            drop(incoming.notes.send(Note::Decided(decision)));
        }
        Ok(side.transfer())
    }
}

impl Incoming {
    /// The answer to a request that came again, with the same grant or a newer one.
    fn again(&self, leave: &Leave) -> Result<v1::PrepareIncomingResponse, ApiError> {
        let own = self.key.as_ref().map_or(NO_KEY, |key| key.fingerprint());
        let (said, began) = (leave.grant(), self.leave.grant());
        if said.source_key != began.source_key
            || (said.destination_key != NO_KEY && said.destination_key != own)
        {
            return Err(leave.wrong("it names other keys than those that the side began with"));
        }
        Ok(self.answer())
    }
}
