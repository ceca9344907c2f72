//! The sides of migrations that this process takes part in, and what is needed to talk to them.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, PortRange, VmName, VmRef},
    v1::{self, TransferPhase, TransferRole},
};
use slat_trust::channel::ChannelKey;

use super::{expiry::Expiry, keys::Keys};
use crate::{
    handover::{
        leave::Leave,
        protocol::{destination::Destination, source::Source},
        side::{AnySide, Side, has_ended},
    },
    machine::Machine,
    migration::{
        destination::Note,
        filter::{EveryPage, PageFilter},
        wire::TICKET,
    },
};

/// The destination's side with what is needed to talk to it.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) side: Arc<Side<Destination>>,
    pub(super) notes: mpsc::Sender<Note>,
    pub(super) data_address: String,
    pub(super) ticket: [u8; TICKET],
    pub(super) versions: v1::ChosenVersions,
    pub(super) channel: v1::PageChannel,
    /// Of its page streams; `None` in the clear.
    pub(super) key: Option<Arc<ChannelKey>>,
    /// By which the side began.
    pub(super) leave: Leave,
    pub(super) _expiry: Expiry,
}

/// Spent tickets and grants that are remembered; a request that is later than so many migrations is
/// not expected.
const SPENT: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Sides {
    pub(super) incoming: Option<Incoming>,
    pub(super) outgoing: Option<Arc<Side<Source>>>,
    /// Of its grant.
    pub(super) outgoing_expiry: Option<Expiry>,
    /// Tickets that a source's side began with, the last at the back. A ticket is good for one
    /// side: a request that arrives once more, after its side has ended and was released, must not
    /// begin a handover that the server has called cancelled.
    spent: VecDeque<[u8; TICKET]>,
    /// Grants that a side began with, likewise. A grant is good for one side.
    used: VecDeque<[u8; 16]>,
    /// Keys of page streams that a source is to send by.
    pub(super) keys: Keys,
}

/// The service over one machine.
#[derive(Clone, Debug)]
pub(crate) struct TransferEndpoint {
    pub(super) machine: Arc<Machine>,
    pub(super) vm: VmName,
    pub(super) data_ip: IpAddr,
    pub(super) data_ports: PortRange,
    sides: Arc<Mutex<Sides>>,
    /// Held while a side begins, which may take long; never by those who only ask.
    starting: Arc<Mutex<()>>,
    /// Which pages a source sends.
    pub(super) filter: Arc<dyn PageFilter>,
    /// Page streams are in the clear.
    pub(super) insecure_pages: bool,
}

impl TransferEndpoint {
    /// An endpoint to `machine`, whose incoming pages are taken on any free port of `data_ip`.
    #[must_use]
    pub(crate) fn new(machine: Arc<Machine>, vm: VmName, data_ip: IpAddr) -> Self {
        Self {
            machine,
            vm,
            data_ip,
            data_ports: PortRange::ANY,
            sides: Arc::default(),
            starting: Arc::default(),
            filter: Arc::new(EveryPage),
            insecure_pages: false,
        }
    }

    /// With page streams in the clear, to and from hosts that have them so too.
    #[must_use]
    pub(crate) fn in_the_clear(mut self, insecure_pages: bool) -> Self {
        self.insecure_pages = insecure_pages;
        self
    }

    /// With pages taken on these ports only.
    #[must_use]
    pub(crate) fn on_ports(mut self, data_ports: PortRange) -> Self {
        self.data_ports = data_ports;
        self
    }

    pub(super) fn sides(&self) -> MutexGuard<'_, Sides> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn starting(&self) -> MutexGuard<'_, ()> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(
        &self,
        migration: &MigrationName,
        role: TransferRole,
    ) -> Result<Arc<dyn AnySide>, ApiError> {
        let sides = self.sides();
        let side: Option<Arc<dyn AnySide>> = match role {
            TransferRole::Source => sides.outgoing.clone().map(|side| side as Arc<dyn AnySide>),
            TransferRole::Destination => sides
                .incoming
                .as_ref()
                .map(|incoming| Arc::clone(&incoming.side) as Arc<dyn AnySide>),
            TransferRole::Unspecified => {
                return Err(ApiError::bad_parameter("role", "is SOURCE or DESTINATION"));
            }
        };
        side.filter(|side| side.migration() == migration)
            .ok_or_else(|| self.unknown(migration, role))
    }

    pub(super) fn unknown(&self, migration: &MigrationName, role: TransferRole) -> ApiError {
        ApiError::new(
            Reason::NoSuchMigration,
            format!(
                "{} has no {} side of {migration}",
                self.vm,
                role.as_str_name()
            ),
        )
        .with("migration", migration)
    }

    /// The VM's identity; empty before that is known.
    pub(super) fn uid(&self) -> String {
        self.machine.uid().unwrap_or_default()
    }

    /// Whether a request means this VM.
    pub(super) fn is_meant(&self, name: &str, uid: &str) -> Result<(), ApiError> {
        VmRef::new(name, uid, "")?.check(&self.vm, &self.uid(), self.machine.host())
    }

    /// Forgets a side that has ended.
    pub(super) fn forget(
        &self,
        migration: &MigrationName,
        role: TransferRole,
    ) -> Result<(), ApiError> {
        let side = match self.find(migration, role) {
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
        if !relinquished && !has_ended(phase) {
            return Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("{migration} has not ended here: {}", phase.as_str_name()),
            )
            .with("migration", migration)
            .with("phase", phase.as_str_name()));
        }
        side.release_record(self.machine.dir()).map_err(|error| {
            ApiError::new(
                Reason::Store,
                format!("the record of {migration} could not be removed: {error}"),
            )
            .because_of(&error)
        })?;
        if relinquished {
            // Before the side is forgotten: a release that fails is tried again.
            self.machine.release()?;
        }
        self.sides().remove(migration, role);
        Ok(())
    }
}

impl Sides {
    /// Whether a source's side began with this ticket.
    pub(super) fn is_spent(&self, ticket: &[u8; TICKET]) -> bool {
        self.spent.contains(ticket)
    }

    /// A source's side begins with this ticket.
    pub(super) fn spend(&mut self, ticket: [u8; TICKET]) {
        if self.spent.len() == SPENT {
            self.spent.pop_front();
        }
        self.spent.push_back(ticket);
    }

    /// Whether a side began by this grant.
    pub(super) fn is_used(&self, grant: &[u8; 16]) -> bool {
        self.used.contains(grant)
    }

    /// A side begins by this grant.
    pub(super) fn use_up(&mut self, grant: [u8; 16]) {
        if self.used.len() == SPENT {
            self.used.pop_front();
        }
        self.used.push_back(grant);
    }

    /// Forgets a side, unless another has taken its place meanwhile.
    pub(super) fn remove(&mut self, migration: &MigrationName, role: TransferRole) {
        if role == TransferRole::Source {
            let of = |side: &mut Arc<Side<Source>>| side.migration() == migration;
            if self.outgoing.take_if(of).is_some() {
                self.outgoing_expiry = None;
            }
            self.keys.forget(migration);
        } else {
            self.incoming
                .take_if(|incoming| incoming.side.migration() == migration);
        }
    }
}

impl Incoming {
    pub(super) fn answer(&self) -> v1::PrepareIncomingResponse {
        v1::PrepareIncomingResponse {
            transfer: Some(self.side.transfer()),
            data_address: self.data_address.clone(),
            ticket: self.ticket.to_vec(),
            versions: Some(self.versions),
            channel_key: self
                .key
                .as_ref()
                .map_or_else(Vec::new, |key| key.fingerprint().to_vec()),
            channel: self.channel.into(),
        }
    }
}
