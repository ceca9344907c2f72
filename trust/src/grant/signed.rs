//! What a grant says, its canonical bytes, and whether it is for this.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ring::digest;

use super::{
    GrantError,
    bytes::{Reader, hex, put_text, random_id},
};

/// Before everything that is signed: no signature for another purpose fits a grant.
const TAG: &[u8] = b"slat.grant.v1\0";

/// Which step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// The destination may receive the VM.
    Receive,
    /// The source may send it.
    Send,
    /// A destination in doubt owns the VM.
    Commit,
    /// A destination in doubt does not.
    Abort,
}

impl Purpose {
    const ALL: [Self; 4] = [Self::Receive, Self::Send, Self::Commit, Self::Abort];

    /// As in errors and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Receive => "RECEIVE",
            Self::Send => "SEND",
            Self::Commit => "COMMIT",
            Self::Abort => "ABORT",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Receive => 1,
            Self::Send => 2,
            Self::Commit => 3,
            Self::Abort => 4,
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One start of one host's agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Party {
    /// The host's name, without `hosts/`.
    pub host: String,
    /// Of the agent's start.
    pub incarnation: String,
}

/// Leave for one step of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Random; good once.
    pub id: [u8; 16],
    /// Which step.
    pub purpose: Purpose,
    /// The migration's id, without `migrations/`.
    pub migration: String,
    /// The VM's identity.
    pub vm_uid: String,
    /// Who gives the VM away.
    pub source: Party,
    /// Who takes it.
    pub destination: Party,
    /// The VM's epoch at the source; the destination's is one more.
    pub epoch: u64,
    /// Milliseconds since 1970 when it was signed.
    pub issued_ms: u64,
    /// Milliseconds since 1970 when it ends.
    pub not_after_ms: u64,
    /// SHA-256 of the public key of the source's page streams; zeroes: they are in the clear, or it
    /// is not known yet.
    pub source_key: [u8; 32],
    /// The same of the destination.
    pub destination_key: [u8; 32],
    /// What a decision stands on: `journal`, or `fence` and the fence's id. Else empty.
    pub ground: String,
}

impl Grant {
    /// A grant with an id of its own and nothing said yet but who and what; it ends `lasts` after
    /// `now`.
    ///
    /// # Errors
    /// When the kernel gives no random numbers.
    pub fn new(
        purpose: Purpose,
        migration: &str,
        (vm_uid, epoch): (&str, u64),
        (source, destination): (Party, Party),
        now: SystemTime,
        lasts: Duration,
    ) -> Result<Self, GrantError> {
        Ok(Self {
            id: random_id()?,
            purpose,
            migration: migration.to_owned(),
            vm_uid: vm_uid.to_owned(),
            source,
            destination,
            epoch,
            issued_ms: millis(now),
            not_after_ms: millis(now + lasts),
            source_key: [0; 32],
            destination_key: [0; 32],
            ground: String::new(),
        })
    }

    /// Its id in hexadecimal.
    #[must_use]
    pub fn id_text(&self) -> String {
        hex(&self.id)
    }

    /// When it ends.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.not_after_ms)
    }

    /// The bytes that are signed.
    ///
    /// # Errors
    /// [`GrantError::Malformed`] when a text is too long.
    pub fn encode(&self) -> Result<Vec<u8>, GrantError> {
        let mut bytes = TAG.to_vec();
        bytes.extend_from_slice(&self.id);
        bytes.push(self.purpose.number());
        put_text(&mut bytes, &self.migration)?;
        put_text(&mut bytes, &self.vm_uid)?;
        for party in [&self.source, &self.destination] {
            put_text(&mut bytes, &party.host)?;
            put_text(&mut bytes, &party.incarnation)?;
        }
        for number in [self.epoch, self.issued_ms, self.not_after_ms] {
            bytes.extend_from_slice(&number.to_be_bytes());
        }
        bytes.extend_from_slice(&self.source_key);
        bytes.extend_from_slice(&self.destination_key);
        put_text(&mut bytes, &self.ground)?;
        Ok(bytes)
    }

    /// Reads canonical bytes. Says nothing of a signature: see
    /// [`KeyRing::verify`](super::KeyRing::verify).
    ///
    /// # Errors
    /// [`GrantError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Self, GrantError> {
        let rest = bytes
            .strip_prefix(TAG)
            .ok_or(GrantError::Malformed("another format"))?;
        let mut reader = Reader(rest);
        let id = reader.take()?;
        let [number] = reader.take()?;
        let purpose = Purpose::ALL
            .into_iter()
            .find(|purpose| purpose.number() == number)
            .ok_or(GrantError::Malformed("no such purpose"))?;
        let migration = reader.text()?.to_owned();
        let vm_uid = reader.text()?.to_owned();
        let mut party = || -> Result<Party, GrantError> {
            Ok(Party {
                host: reader.text()?.to_owned(),
                incarnation: reader.text()?.to_owned(),
            })
        };
        let (source, destination) = (party()?, party()?);
        let grant = Self {
            id,
            purpose,
            migration,
            vm_uid,
            source,
            destination,
            epoch: reader.number()?,
            issued_ms: reader.number()?,
            not_after_ms: reader.number()?,
            source_key: reader.take()?,
            destination_key: reader.take()?,
            ground: reader.text()?.to_owned(),
        };
        reader.end()?;
        Ok(grant)
    }

    /// SHA-256 of its canonical bytes: what page streams are bound to.
    ///
    /// # Errors
    /// [`GrantError::Malformed`] when a text is too long.
    pub fn digest(&self) -> Result<[u8; 32], GrantError> {
        let mut sum = [0; 32];
        sum.copy_from_slice(digest::digest(&digest::SHA256, &self.encode()?).as_ref());
        Ok(sum)
    }

    /// Whether its time is not over.
    ///
    /// # Errors
    /// [`GrantError::Expired`].
    pub fn in_time(&self, now: SystemTime) -> Result<(), GrantError> {
        let late = millis(now).checked_sub(self.not_after_ms);
        match late {
            Some(late_ms) => Err(GrantError::Expired { late_ms }),
            None => Ok(()),
        }
    }

    /// Whether it is for this. Fields of `wanted` that are `None` are not compared.
    ///
    /// # Errors
    /// [`GrantError::Other`] with the first field that differs.
    pub fn check(&self, wanted: &Checked<'_>) -> Result<(), GrantError> {
        let same = |what, found: &str, wanted: Option<&str>| match wanted {
            Some(wanted) if wanted != found => Err(GrantError::Other {
                what,
                found: found.to_owned(),
                wanted: wanted.to_owned(),
            }),
            _ => Ok(()),
        };
        same(
            "purpose",
            self.purpose.as_str(),
            wanted.purpose.map(Purpose::as_str),
        )?;
        same("migration", &self.migration, wanted.migration)?;
        same("vm_uid", &self.vm_uid, wanted.vm_uid)?;
        if let Some(epoch) = wanted.epoch {
            same("epoch", &self.epoch.to_string(), Some(&epoch.to_string()))?;
        }
        for (whose, found, wanted) in [
            (
                ["source", "source_incarnation"],
                &self.source,
                &wanted.source,
            ),
            (
                ["destination", "destination_incarnation"],
                &self.destination,
                &wanted.destination,
            ),
        ] {
            let Some((host, incarnation)) = wanted else {
                continue;
            };
            same(whose[0], &found.host, Some(host))?;
            same(whose[1], &found.incarnation, *incarnation)?;
        }
        Ok(())
    }
}

/// What a grant is compared with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checked<'a> {
    /// The step.
    pub purpose: Option<Purpose>,
    /// The migration's id.
    pub migration: Option<&'a str>,
    /// The VM's identity.
    pub vm_uid: Option<&'a str>,
    /// The VM's epoch at the source.
    pub epoch: Option<u64>,
    /// The source's host, and its incarnation where that is compared.
    pub source: Option<(&'a str, Option<&'a str>)>,
    /// The destination's.
    pub destination: Option<(&'a str, Option<&'a str>)>,
}

/// A grant as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// Which key.
    pub key_id: Vec<u8>,
    /// [`Grant::encode`].
    pub bytes: Vec<u8>,
    /// Ed25519.
    pub signature: Vec<u8>,
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::*, *};

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn party(host: &str) -> Party {
        Party {
            host: host.to_owned(),
            incarnation: format!("{host}-1"),
        }
    }

    fn grant() -> Grant {
        let lasts = Duration::from_secs(60);
        let parties = (party("a"), party("b"));
        Grant::new(Purpose::Receive, "m1", ("u1", 7), parties, now(), lasts).unwrap()
    }

    fn ring_of(signer: &Signer) -> KeyRing {
        let mut ring = KeyRing::default();
        ring.learn([GrantKey {
            public_key: signer.public_key(),
            not_before: now() - Duration::from_secs(10),
            not_after: now() + Duration::from_secs(100),
        }]);
        ring
    }

    #[test]
    fn what_was_signed_is_read_again() {
        let signer = Signer::generate().unwrap();
        let again = Signer::from_pkcs8(signer.pkcs8()).unwrap();
        let signed = again.sign(&grant()).unwrap();
        let read = ring_of(&signer).verify(&signed, now()).unwrap();
        assert_eq!(read.encode().unwrap(), signed.bytes);
        assert_eq!(read.epoch, 7);
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let signer = Signer::generate().unwrap();
        let ring = ring_of(&signer);
        let signed = signer.sign(&grant()).unwrap();
        for bit in 0..signed.bytes.len() * 8 {
            let mut other = signed.clone();
            other.bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                ring.verify(&other, now()),
                Err(GrantError::Signature),
                "{bit}"
            );
        }
        for bit in 0..512 {
            let mut other = signed.clone();
            other.signature[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                ring.verify(&other, now()),
                Err(GrantError::Signature),
                "{bit}"
            );
        }
    }

    #[test]
    fn times_of_grants_and_keys_count_and_a_question_outlives_both() {
        let signer = Signer::generate().unwrap();
        let ring = ring_of(&signer);
        let signed = signer.sign(&grant()).unwrap();
        let at = |seconds| now() + Duration::from_secs(seconds);
        assert!(ring.verify(&signed, at(59)).is_ok());
        let late = ring.verify(&signed, at(60)).unwrap_err();
        assert_eq!(late, GrantError::Expired { late_ms: 0 });
        let old = ring.verify(&signed, at(100)).unwrap_err();
        assert!(matches!(old, GrantError::KeyUnknown { .. }), "{old}");
        let early = ring.verify(&signed, now() - Duration::from_secs(11));
        assert!(matches!(early, Err(GrantError::KeyUnknown { .. })));
        assert!(ring.verify_old(&signed).is_ok());
        let mut forgotten = ring;
        forgotten.forget_before(at(101));
        assert!(forgotten.verify_old(&signed).is_err());
    }

    #[test]
    fn a_key_of_another_server_is_unknown_and_one_under_its_id_does_not_fit() {
        let (signer, other) = (Signer::generate().unwrap(), Signer::generate().unwrap());
        let mut signed = other.sign(&grant()).unwrap();
        let ring = ring_of(&signer);
        let unknown = ring.verify(&signed, now()).unwrap_err();
        assert!(
            matches!(unknown, GrantError::KeyUnknown { .. }),
            "{unknown}"
        );
        signed.key_id = signer.key_id().to_vec();
        assert_eq!(ring.verify(&signed, now()), Err(GrantError::Signature));
    }

    #[test]
    fn each_field_is_compared() {
        let grant = grant();
        let right = Checked {
            purpose: Some(Purpose::Receive),
            migration: Some("m1"),
            vm_uid: Some("u1"),
            epoch: Some(7),
            source: Some(("a", Some("a-1"))),
            destination: Some(("b", Some("b-1"))),
        };
        grant.check(&right).unwrap();
        let wrong = [
            (
                "purpose",
                Checked {
                    purpose: Some(Purpose::Send),
                    ..right
                },
            ),
            (
                "migration",
                Checked {
                    migration: Some("m2"),
                    ..right
                },
            ),
            (
                "vm_uid",
                Checked {
                    vm_uid: Some("u2"),
                    ..right
                },
            ),
            (
                "epoch",
                Checked {
                    epoch: Some(8),
                    ..right
                },
            ),
            (
                "source",
                Checked {
                    source: Some(("c", None)),
                    ..right
                },
            ),
            (
                "source_incarnation",
                Checked {
                    source: Some(("a", Some("a-2"))),
                    ..right
                },
            ),
            (
                "destination",
                Checked {
                    destination: Some(("a", None)),
                    ..right
                },
            ),
            (
                "destination_incarnation",
                Checked {
                    destination: Some(("b", Some("b-2"))),
                    ..right
                },
            ),
        ];
        for (field, checked) in wrong {
            match grant.check(&checked) {
                Err(GrantError::Other { what, .. }) => assert_eq!(what, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        grant.check(&Checked::default()).unwrap();
    }

    #[test]
    fn a_ring_keeps_no_more_than_it_may() {
        let mut ring = KeyRing::default();
        for second in 0..200_u64 {
            let mut public_key = [0; 32];
            public_key[..8].copy_from_slice(&second.to_be_bytes());
            ring.learn([GrantKey {
                public_key,
                not_before: now(),
                not_after: now() + Duration::from_secs(second),
            }]);
        }
        assert_eq!(ring.keys().len(), 64);
        assert_eq!(ring.keys()[0].not_after, now() + Duration::from_secs(136));
    }

    #[test]
    fn a_private_key_is_not_printed() {
        let signer = Signer::generate().unwrap();
        let printed = format!("{signer:?}");
        assert!(printed.len() < 60, "{printed}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_are_the_one_form(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut tagged = TAG.to_vec();
            tagged.extend_from_slice(&bytes);
            for bytes in [bytes, tagged] {
                if let Ok(grant) = Grant::decode(&bytes) {
                    prop_assert_eq!(grant.encode().unwrap(), bytes);
                }
            }
        }

        #[test]
        fn any_grant_is_read_as_written(
            texts in prop::array::uniform7("\\PC{0,40}"),
            epoch: u64,
            key in prop::array::uniform32(any::<u8>()),
        ) {
            let [migration, vm_uid, a, b, c, d, ground] = texts;
            let grant = Grant {
                migration,
                vm_uid,
                source: Party { host: a, incarnation: b },
                destination: Party { host: c, incarnation: d },
                epoch,
                source_key: key,
                ground,
                ..grant()
            };
            let bytes = grant.encode().unwrap();
            prop_assert_eq!(Grant::decode(&bytes).unwrap(), grant);
        }
    }
}
