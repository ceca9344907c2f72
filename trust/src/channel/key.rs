//! A migration's key, its certificate, and the two configurations of TLS with it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use rustls::{
    ClientConfig, ServerConfig, SignatureScheme,
    client::Resumption,
    crypto::{CryptoProvider, ring as provider},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SigningKey, SingleCertAndKey},
    version::TLS13,
};
use zeroize::Zeroizing;

use super::{
    ChannelError,
    pinned::{Pinned, fingerprint},
};

/// How far two hosts' clocks may differ before a new certificate is taken for one of the future.
const SKEW: Duration = Duration::from_secs(24 * 3600);

/// Whether a connection's secrets may be taken out of rustls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extraction {
    /// Never.
    Never,
    /// To give them to the kernel, which then encrypts.
    ToKernel,
}

/// One migration's key at one end, and its certificate. The private half is in memory only, and not
/// shown by `Debug`. The copy that this crate makes of it is zeroised; ring wipes neither what it
/// generates nor what signs, so pieces of it may be in the process's memory until that ends.
pub struct ChannelKey {
    certified: Arc<CertifiedKey>,
    fingerprint: [u8; 32],
    not_after: SystemTime,
}

impl fmt::Debug for ChannelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelKey")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl ChannelKey {
    /// A new key for one end of one migration, good for `lasts` from now on.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn generate(vm_uid: &str, migration: &str, lasts: Duration) -> Result<Self, ChannelError> {
        let now = SystemTime::now();
        Self::between(vm_uid, migration, now - SKEW, now + lasts)
    }

    fn between(
        vm_uid: &str,
        migration: &str,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<Self, ChannelError> {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random)
            .map_err(|_| ChannelError::Key)?;
        let pkcs8 = Zeroizing::new(document.as_ref().to_vec());
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &pkcs8, &random)
            .map_err(|_| ChannelError::Key)?;
        let public = pair.public_key().as_ref().to_vec();
        let signs =
            provider::sign::any_ecdsa_type(&PrivatePkcs8KeyDer::from(pkcs8.as_slice()).into())?;
        let signed = SelfSigned {
            public,
            signs: &*signs,
        };
        let certificate = signed.certificate(vm_uid, migration, not_before, not_after)?;
        let fingerprint = fingerprint(&rcgen::PublicKeyData::subject_public_key_info(&signed));
        Ok(Self {
            certified: Arc::new(CertifiedKey::new(vec![certificate], signs)),
            fingerprint,
            not_after,
        })
    }

    /// SHA-256 of its SubjectPublicKeyInfo: what the other end pins.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// When it ends.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// For the end that connects, to the peer that has the key `peer`.
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn client(
        &self,
        peer: [u8; 32],
        extraction: Extraction,
    ) -> Result<Arc<ClientConfig>, ChannelError> {
        let provider = crypto();
        let pinned = Arc::new(Pinned {
            key: peer,
            provider: Arc::clone(&provider),
        });
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(pinned)
            .with_client_cert_resolver(self.resolver());
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        // The peer's key says who it is.
        config.enable_sni = false;
        config.enable_secret_extraction = extraction == Extraction::ToKernel;
        Ok(Arc::new(config))
    }

    /// For the end that listens, for the peer that has the key `peer`.
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn server(
        &self,
        peer: [u8; 32],
        extraction: Extraction,
    ) -> Result<Arc<ServerConfig>, ChannelError> {
        let provider = crypto();
        let pinned = Arc::new(Pinned {
            key: peer,
            provider: Arc::clone(&provider),
        });
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(pinned)
            .with_cert_resolver(self.resolver());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        config.enable_secret_extraction = extraction == Extraction::ToKernel;
        Ok(Arc::new(config))
    }

    fn resolver(&self) -> Arc<SingleCertAndKey> {
        Arc::new(SingleCertAndKey::from(CertifiedKey::clone(&self.certified)))
    }
}

/// What both ends speak. Where the CPU has no instructions for AES, ChaCha is faster by far.
fn crypto() -> Arc<CryptoProvider> {
    use provider::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let aes = [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384];
    let chacha = [TLS13_CHACHA20_POLY1305_SHA256];
    let cipher_suites = if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
        [&aes[..], &chacha].concat()
    } else {
        [&chacha[..], &aes].concat()
    };
    Arc::new(CryptoProvider {
        cipher_suites,
        ..provider::default_provider()
    })
}

/// A public key, and what signs for it.
struct SelfSigned<'a> {
    public: Vec<u8>,
    signs: &'a dyn SigningKey,
}

impl SelfSigned<'_> {
    fn certificate(
        &self,
        vm_uid: &str,
        migration: &str,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<CertificateDer<'static>, ChannelError> {
        let failed = |error: rcgen::Error| ChannelError::Certificate(error.to_string());
        let mut params = rcgen::CertificateParams::new(Vec::new()).map_err(failed)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        // For whoever reads a trace of packets: nobody compares it.
        params.distinguished_name.push(
            rcgen::DnType::CommonName,
            format!("slat pages of {vm_uid} by {migration}"),
        );
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        let certificate = params.self_signed(self).map_err(failed)?;
        Ok(certificate.der().clone())
    }
}

impl rcgen::PublicKeyData for SelfSigned<'_> {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for SelfSigned<'_> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.signs
            .choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256])
            .and_then(|signer| signer.sign(message).ok())
            .ok_or(rcgen::Error::RemoteKeyError)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
