//! Leave for what a migration asks of agents: the grants that go with its calls.

use std::time::Duration;

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, MigrationParams},
    v1,
};
use slat_trust::grant::{Party, Purpose};

use super::{protocol::Side, subject::Subject};
use crate::{
    fleet::{Fleet, host_unreachable},
    grants::{About, Grants},
};

/// Whether an agent refuses a grant for what it will know soon: it started anew and has not
/// registered, it has not heard of the key, or its clock is not known here yet.
pub(super) fn is_behind(error: &ApiError) -> bool {
    match error.reason {
        Reason::GrantKeyUnknown | Reason::GrantExpired => true,
        Reason::GrantInvalid => error
            .metadata
            .get("field")
            .is_some_and(|field| field.ends_with("_incarnation")),
        _ => false,
    }
}

/// What an agent says of a process's key. Nothing: its pages go in the clear.
pub(super) fn channel_key(said: &[u8]) -> Result<[u8; 32], ApiError> {
    if said.is_empty() {
        return Ok([0; 32]);
    }
    said.try_into()
        .map_err(|_| ApiError::bad_parameter("channel_key", "is not 32 bytes"))
}

/// A host's id.
fn bare(host: &str) -> String {
    host.strip_prefix("hosts/").unwrap_or(host).to_owned()
}

/// The keys of the two ends' page streams that are not known, or not needed.
const NO_KEY: [u8; 32] = [0; 32];

/// Signs what goes with one migration's calls.
pub(super) struct Leave<'a> {
    pub(super) fleet: &'a Fleet,
    pub(super) grants: &'a Grants,
    pub(super) subject: &'a Subject,
}

impl Leave<'_> {
    /// RECEIVE, for the destination.
    pub(super) fn receive(&self, source_key: [u8; 32]) -> Result<v1::SignedGrant, ApiError> {
        let about = self.about(Side::Destination, self.source()?, [source_key, NO_KEY])?;
        let grant = self.grants.side(Purpose::Receive, &about, self.total()?);
        Ok(grant?)
    }

    /// SEND, for the source.
    pub(super) fn send(&self, keys: [[u8; 32]; 2]) -> Result<v1::SignedGrant, ApiError> {
        let about = self.about(Side::Source, self.source()?, keys)?;
        let grant = self.grants.side(Purpose::Send, &about, self.total()?);
        Ok(grant?)
    }

    /// COMMIT or ABORT, for the destination.
    pub(super) fn decision(&self, commit: bool, ground: &str) -> Result<v1::SignedGrant, ApiError> {
        // The source may be gone for good by now.
        let source = self.party(&self.subject.source).unwrap_or_else(|_| Party {
            host: bare(&self.subject.source),
            incarnation: String::new(),
        });
        let about = self.about(Side::Destination, source, [NO_KEY; 2])?;
        Ok(self.grants.decision(commit, &about, ground)?)
    }

    fn total(&self) -> Result<Duration, ApiError> {
        let params = MigrationParams::from_message(self.subject.params.as_ref())?;
        Ok(params.max_total_time)
    }

    /// Who and what, for the host of `reader`.
    fn about(&self, reader: Side, source: Party, keys: [[u8; 32]; 2]) -> Result<About, ApiError> {
        let subject = self.subject;
        let [source_key, destination_key] = keys;
        Ok(About {
            migration: MigrationName::parse(&subject.migration)?.id().to_owned(),
            vm_uid: self.vm_uid(),
            epoch: subject.epoch,
            source,
            destination: self.party(&subject.destination)?,
            source_key,
            destination_key,
            ahead_ms: self.fleet.ahead_ms(subject.host(reader)),
        })
    }

    fn vm_uid(&self) -> String {
        let subject = self.subject;
        if !subject.vm_uid.is_empty() {
            return subject.vm_uid.clone();
        }
        // A record that an older version wrote.
        subject.last_seen(self.fleet).unwrap_or_default().uid
    }

    fn source(&self) -> Result<Party, ApiError> {
        self.party(&self.subject.source)
    }

    /// A host's agent as it is registered.
    fn party(&self, host: &str) -> Result<Party, ApiError> {
        let known = self.fleet.host(host)?;
        if known.incarnation.is_empty() {
            // Not heard from since this server started: it will register.
            return Err(host_unreachable(host));
        }
        Ok(Party {
            host: bare(host),
            incarnation: known.incarnation,
        })
    }
}
