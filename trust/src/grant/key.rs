//! Keys: the server's, which sign, and their public halves, which agents keep.
//!
//! Of a private key in memory the bytes are wiped that this crate has: the seed and the PKCS#8 that
//! is written to disk. What signs is ring's key pair, and ring wipes neither that nor what it has
//! on its stack meanwhile: a process that had a key may have pieces of it in memory until it ends.

use std::{fmt, time::SystemTime};

use ring::{
    digest,
    rand::{SecureRandom as _, SystemRandom},
    signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};
use zeroize::Zeroizing;

use super::{Grant, GrantError, Signed, bytes::hex};

/// Bytes of a key's id.
pub const KEY_ID: usize = 8;

/// Keys that are remembered, old ones included.
const MOST_KEYS: usize = 64;

/// Bytes of what an Ed25519 key is made from.
const SEED: usize = 32;
/// PKCS#8 with the public key (RFC 5958) around the seed, as ring writes and reads it.
const BEFORE_SEED: [u8; 16] = [
    0x30, 0x51, 0x02, 0x01, 0x01, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];
const BEFORE_PUBLIC: [u8; 3] = [0x81, 0x21, 0x00];

/// Signs grants. At its end its bytes are zeroised; those within ring's key pair are not.
pub struct Signer {
    pair: Ed25519KeyPair,
    pkcs8: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer")
            .field("key", &hex(&self.key_id()))
            .finish_non_exhaustive()
    }
}

impl Signer {
    /// A new key.
    ///
    /// # Errors
    /// When the kernel gives no random numbers.
    pub fn generate() -> Result<Self, GrantError> {
        let none = |_| GrantError::Malformed("the kernel gives no random numbers");
        let mut seed = Zeroizing::new([0; SEED]);
        SystemRandom::new().fill(&mut *seed).map_err(none)?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&*seed)
            .map_err(|_| GrantError::Malformed("not an Ed25519 key"))?;
        let parts = [
            &BEFORE_SEED[..],
            &*seed,
            &BEFORE_PUBLIC,
            pair.public_key().as_ref(),
        ];
        // At once as large as it gets: a buffer that grows leaves copies behind.
        let mut pkcs8 = Zeroizing::new(Vec::with_capacity(parts.iter().map(|it| it.len()).sum()));
        for part in parts {
            pkcs8.extend_from_slice(part);
        }
        Ok(Self { pair, pkcs8 })
    }

    /// A key from what [`Signer::pkcs8`] gave.
    ///
    /// # Errors
    /// When it is none.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, GrantError> {
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8)
            .map_err(|_| GrantError::Malformed("not an Ed25519 key"))?;
        let pkcs8 = Zeroizing::new(pkcs8.to_vec());
        Ok(Self { pair, pkcs8 })
    }

    /// The private key, to be kept where nobody else reads it.
    #[must_use]
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The public half.
    #[must_use]
    pub fn public_key(&self) -> [u8; 32] {
        let mut key = [0; 32];
        key.copy_from_slice(self.pair.public_key().as_ref());
        key
    }

    /// First bytes of the SHA-256 of the public half.
    #[must_use]
    pub fn key_id(&self) -> [u8; KEY_ID] {
        key_id(&self.public_key())
    }

    /// Signs.
    ///
    /// # Errors
    /// When a text in it is too long.
    pub fn sign(&self, grant: &Grant) -> Result<Signed, GrantError> {
        let bytes = grant.encode()?;
        let signature = self.pair.sign(&bytes).as_ref().to_vec();
        Ok(Signed {
            key_id: self.key_id().to_vec(),
            bytes,
            signature,
        })
    }
}

fn key_id(public: &[u8; 32]) -> [u8; KEY_ID] {
    let mut id = [0; KEY_ID];
    id.copy_from_slice(&digest::digest(&digest::SHA256, public).as_ref()[..KEY_ID]);
    id
}

/// A public key, and when grants by it are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantKey {
    /// Ed25519.
    pub public_key: [u8; 32],
    /// From when.
    pub not_before: SystemTime,
    /// Until when.
    pub not_after: SystemTime,
}

impl GrantKey {
    /// First bytes of the SHA-256 of the public key.
    #[must_use]
    pub fn id(&self) -> [u8; KEY_ID] {
        key_id(&self.public_key)
    }
}

/// Public keys that grants are verified by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyRing(Vec<GrantKey>);

impl KeyRing {
    /// Takes keys in. One that is known already gets its new times. The newest 64 stay.
    pub fn learn(&mut self, keys: impl IntoIterator<Item = GrantKey>) {
        for key in keys {
            match self
                .0
                .iter_mut()
                .find(|known| known.public_key == key.public_key)
            {
                Some(known) => *known = key,
                None => self.0.push(key),
            }
        }
        self.0.sort_by_key(|key| key.not_after);
        let over = self.0.len().saturating_sub(MOST_KEYS);
        self.0.drain(..over);
    }

    /// Forgets keys that ended before `then`.
    pub fn forget_before(&mut self, then: SystemTime) {
        self.0.retain(|key| key.not_after >= then);
    }

    /// The keys, the first to end first.
    #[must_use]
    pub fn keys(&self) -> &[GrantKey] {
        &self.0
    }

    /// Whether the signature is right, by a key in force at `now`, and the grant's time not over.
    ///
    /// # Errors
    /// All but [`GrantError::Other`].
    pub fn verify(&self, signed: &Signed, now: SystemTime) -> Result<Grant, GrantError> {
        let grant =
            self.verify_signature(signed, |key| key.not_before <= now && now < key.not_after)?;
        grant.in_time(now)?;
        Ok(grant)
    }

    /// Whether the signature is right by any key that is remembered, whatever the time: for a
    /// question that changes nothing.
    ///
    /// # Errors
    /// All but [`GrantError::Expired`] and [`GrantError::Other`].
    pub fn verify_old(&self, signed: &Signed) -> Result<Grant, GrantError> {
        self.verify_signature(signed, |_| true)
    }

    fn verify_signature(
        &self,
        signed: &Signed,
        in_force: impl Fn(&GrantKey) -> bool,
    ) -> Result<Grant, GrantError> {
        let key = self
            .0
            .iter()
            .find(|key| key.id().as_slice() == signed.key_id && in_force(key))
            .ok_or_else(|| GrantError::KeyUnknown {
                key: hex(signed.key_id.get(..KEY_ID).unwrap_or(&signed.key_id)),
            })?;
        UnparsedPublicKey::new(&ED25519, &key.public_key)
            .verify(&signed.bytes, &signed.signature)
            .map_err(|_| GrantError::Signature)?;
        Grant::decode(&signed.bytes)
    }
}
