//! Signed grants and the keys behind them, between messages and what `slat-trust` works on.

use slat_trust::grant::{Grant, GrantError, GrantKey, Signed};

use super::time::{system_time, timestamp};
use crate::{ApiError, Reason, v1};

/// Bytes of a grant or a signature at most, before anything looks at them.
const LONGEST: usize = 4096;

impl From<&Signed> for v1::SignedGrant {
    fn from(signed: &Signed) -> Self {
        Self {
            key_id: signed.key_id.clone(),
            grant: signed.bytes.clone(),
            signature: signed.signature.clone(),
        }
    }
}

/// A request's grant.
///
/// # Errors
/// GRANT_INVALID when there is none, or when it is too large to be one.
pub fn signed_grant(field: Option<&v1::SignedGrant>) -> Result<Signed, ApiError> {
    let refused = |why: &str| {
        ApiError::new(
            Reason::GrantInvalid,
            format!("the call has no leave: {why}"),
        )
        .with("why", why)
        .with(
            "advice",
            "such calls are the server's: ask it to migrate the VM",
        )
    };
    let signed = field.ok_or_else(|| refused("it brings no grant"))?;
    if signed.grant.len() > LONGEST || signed.signature.len() > 64 || signed.key_id.len() > 8 {
        return Err(refused("its grant is too large to be one"));
    }
    Ok(Signed {
        key_id: signed.key_id.clone(),
        bytes: signed.grant.clone(),
        signature: signed.signature.clone(),
    })
}

/// A key as it is announced.
#[must_use]
pub fn key_message(key: &GrantKey) -> v1::GrantKey {
    v1::GrantKey {
        key_id: key.id().to_vec(),
        public_key: key.public_key.to_vec(),
        not_before: Some(timestamp(key.not_before)),
        not_after: Some(timestamp(key.not_after)),
    }
}

/// A key that was announced.
///
/// # Errors
/// BAD_PARAMETER when it is not whole.
pub fn key_from_message(message: &v1::GrantKey) -> Result<GrantKey, ApiError> {
    let bad = |field, words: &str| ApiError::bad_parameter(field, words);
    let public_key = <[u8; 32]>::try_from(message.public_key.as_slice())
        .map_err(|_| bad("grant_keys.public_key", "is not 32 bytes"))?;
    let time = |field, time: Option<&prost_types::Timestamp>| {
        time.and_then(system_time)
            .ok_or_else(|| bad(field, "is missing or out of range"))
    };
    Ok(GrantKey {
        public_key,
        not_before: time("grant_keys.not_before", message.not_before.as_ref())?,
        not_after: time("grant_keys.not_after", message.not_after.as_ref())?,
    })
}

/// A grant that is refused, as the caller is told.
#[must_use]
pub fn refused_grant(error: &GrantError, grant: Option<&Grant>) -> ApiError {
    let (reason, advice) = match error {
        GrantError::KeyUnknown { .. } => (
            Reason::GrantKeyUnknown,
            "the host has not heard of the server's key yet, or that key is over: see that its agent reports",
        ),
        GrantError::Expired { .. } => (
            Reason::GrantExpired,
            "migrate again; if it ends at once, compare the clocks of server and host",
        ),
        _ => (
            Reason::GrantInvalid,
            "such calls are the server's: ask it to migrate the VM",
        ),
    };
    let mut told = ApiError::new(reason, format!("the grant is refused: {error}"))
        .with("why", error)
        .with("advice", advice);
    if let GrantError::KeyUnknown { key } = error {
        told = told.with("key", key);
    }
    if let Some(grant) = grant {
        told = told
            .with("migration", format_args!("migrations/{}", grant.migration))
            .with("grant", grant.id_text());
    }
    told
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_key_survives_the_wire_and_half_a_key_does_not() {
        let key = GrantKey {
            public_key: [7; 32],
            not_before: UNIX_EPOCH + Duration::from_secs(5),
            not_after: UNIX_EPOCH + Duration::from_secs(9),
        };
        let message = key_message(&key);
        assert_eq!(key_from_message(&message).unwrap(), key);
        for broken in [
            v1::GrantKey {
                public_key: vec![7; 31],
                ..message.clone()
            },
            v1::GrantKey {
                not_after: None,
                ..message.clone()
            },
        ] {
            assert!(key_from_message(&broken).is_err(), "{broken:?}");
        }
    }

    #[test]
    fn a_call_without_a_grant_or_with_a_huge_one_has_no_leave() {
        let huge = v1::SignedGrant {
            grant: vec![0; LONGEST + 1],
            ..Default::default()
        };
        for field in [None, Some(&huge)] {
            assert_eq!(
                signed_grant(field).unwrap_err().reason,
                Reason::GrantInvalid
            );
        }
    }
}
