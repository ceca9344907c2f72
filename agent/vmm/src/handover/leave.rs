//! The server's leave for one step of a handover, as this process checks it.
//!
//! The agent has checked the grant already and keeps the ids that were used; it gives it on with
//! the public keys that it has. This process believes nobody: it verifies the signature again, and
//! that the grant is for this step of this migration of this VM, at this epoch, on this host.
//!
//! # Binding
//! Source and destination have different grants, with ids of their own. What both of them say - who
//! gives which VM to whom, at which epoch, and which keys protect the pages - is one canonical form
//! again, and its digest ([`Leave::binding`]) is what page streams are bound to.

use std::time::SystemTime;

use slat_proto::{
    ApiError, Reason,
    model::{HostName, MigrationName, key_from_message, refused_grant, signed_grant},
    v1,
};
use slat_record::journal::GrantMark;
use slat_trust::grant::{Checked, Grant, GrantError, KeyRing, Party, Purpose};

/// What a grant has to be for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step<'a> {
    pub(crate) purpose: Purpose,
    pub(crate) migration: &'a MigrationName,
    pub(crate) vm_uid: &'a str,
    /// The VM's epoch at the source.
    pub(crate) epoch: u64,
    /// This host.
    pub(crate) host: &'a HostName,
}

/// A grant that was checked.
#[derive(Clone, Debug)]
pub(crate) struct Leave {
    grant: Grant,
    digest: [u8; 32],
    signed: v1::SignedGrant,
}

impl Leave {
    /// Checks a request's grant by the keys that came with it.
    ///
    /// # Errors
    /// GRANT_INVALID, GRANT_EXPIRED, GRANT_KEY_UNKNOWN; BAD_PARAMETER when a key is not whole.
    pub(crate) fn check(
        field: Option<&v1::SignedGrant>,
        keys: &[v1::GrantKey],
        step: &Step<'_>,
        now: SystemTime,
    ) -> Result<Self, ApiError> {
        let located = |error: ApiError| error.with("vm_location", step.location());
        let signed = signed_grant(field).map_err(located)?;
        let keys = keys.iter().map(key_from_message);
        let mut ring = KeyRing::default();
        ring.learn(keys.collect::<Result<Vec<_>, _>>()?);
        let refused =
            |error: &GrantError, grant: Option<&Grant>| located(refused_grant(error, grant));
        let grant = ring.verify(&signed, now).map_err(|error| {
            let shown = ring.verify_old(&signed).ok();
            refused(&error, shown.as_ref())
        })?;
        grant
            .check(&step.wanted())
            .map_err(|error| refused(&error, Some(&grant)))?;
        let digest = grant
            .digest()
            .map_err(|error| refused(&error, Some(&grant)))?;
        Ok(Self {
            digest,
            signed: v1::SignedGrant::from(&signed),
            grant,
        })
    }

    pub(crate) fn id(&self) -> [u8; 16] {
        self.grant.id
    }

    pub(crate) fn grant(&self) -> &Grant {
        &self.grant
    }

    /// As it came.
    pub(crate) fn signed(&self) -> &v1::SignedGrant {
        &self.signed
    }

    /// As the journal has it.
    pub(crate) fn mark(&self) -> GrantMark {
        mark(&self.grant, &self.digest)
    }

    /// It is over before the VM changed its owner.
    pub(crate) fn expired(&self) -> ApiError {
        let late_ms = SystemTime::now()
            .duration_since(self.grant.not_after())
            .map_or(0, |late| late.as_millis() as u64);
        refused_grant(&GrantError::Expired { late_ms }, Some(&self.grant))
            .with("vm_location", "SOURCE")
    }

    /// It was used, for a side that has ended.
    pub(crate) fn used(&self) -> ApiError {
        ApiError::new(
            Reason::GrantUsed,
            format!(
                "migrations/{} has begun here by this grant before, and ended; this request is late",
                self.grant.migration
            ),
        )
        .with("migration", format_args!("migrations/{}", self.grant.migration))
        .with("grant", self.grant.id_text())
        .with("vm_location", "SOURCE")
        .with("advice", "begin a new migration")
    }

    /// It does not fit what this process has.
    pub(crate) fn wrong(&self, why: &str) -> ApiError {
        ApiError::new(Reason::GrantInvalid, format!("the grant is refused: {why}"))
            .with("why", why)
            .with(
                "migration",
                format_args!("migrations/{}", self.grant.migration),
            )
            .with("grant", self.grant.id_text())
            .with("vm_location", "SOURCE")
            .with("advice", "begin a new migration")
    }

    /// Digest of what both ends' grants say, with both keys.
    ///
    /// # Errors
    /// GRANT_INVALID, which a grant that was read never is.
    pub(crate) fn binding(
        &self,
        source_key: [u8; 32],
        destination_key: [u8; 32],
    ) -> Result<[u8; 32], ApiError> {
        // An agent may begin again between the two grants: its host is the same.
        let host = |party: &Party| Party {
            host: party.host.clone(),
            incarnation: String::new(),
        };
        let both = Grant {
            id: [0; 16],
            purpose: Purpose::Send,
            migration: self.grant.migration.clone(),
            vm_uid: self.grant.vm_uid.clone(),
            source: host(&self.grant.source),
            destination: host(&self.grant.destination),
            epoch: self.grant.epoch,
            issued_ms: 0,
            not_after_ms: 0,
            source_key,
            destination_key,
            ground: String::new(),
        };
        both.digest()
            .map_err(|error| refused_grant(&error, Some(&self.grant)))
    }
}

fn mark(grant: &Grant, digest: &[u8; 32]) -> GrantMark {
    GrantMark {
        id: grant.id_text(),
        digest: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// How the journal names a grant.
#[cfg(test)]
pub(crate) fn tests_mark(grant: &Grant) -> GrantMark {
    mark(grant, &grant.digest().unwrap())
}

impl Step<'_> {
    fn wanted(&self) -> Checked<'_> {
        let here = Some((self.host.id(), None));
        let (source, destination) = match self.purpose {
            Purpose::Send => (here, None),
            Purpose::Receive | Purpose::Commit | Purpose::Abort => (None, here),
        };
        Checked {
            purpose: Some(self.purpose),
            migration: Some(self.migration.id()),
            vm_uid: Some(self.vm_uid),
            epoch: Some(self.epoch),
            source,
            destination,
        }
    }

    fn location(&self) -> &'static str {
        match self.purpose {
            Purpose::Send | Purpose::Receive => "SOURCE",
            Purpose::Commit | Purpose::Abort => "PAUSED_BOTH",
        }
    }
}
