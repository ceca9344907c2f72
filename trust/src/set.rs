//! What one reading of an identity's files came to, and the endpoints made of it. A set never
//! changes; new files make a new one.
//!
//! Both endpoints speak TLS 1.3 alone. Every connection begins with a full handshake: no tickets,
//! no resumption and no early data, so a certificate is judged each time.

use std::{path::Path, sync::Arc, time::SystemTime};

use rustls::{
    ClientConfig, InconsistentKeys, ServerConfig,
    client::Resumption,
    crypto::{
        CryptoProvider,
        ring::{default_provider, sign::any_supported_type},
    },
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::anchor_from_trusted_cert;

use crate::{
    Identity, Refusal, TrustError,
    crl::Lists,
    files::{CA, CERTIFICATE, CRL, KEY, Parsed, Raw},
    identity::shown,
    verify::{Authority, Expects, Purpose, Root, Verifier},
    x509::Facts,
};

/// Names of what is spoken on top of TLS.
const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// The files that were read, ready for use.
pub(crate) struct Set {
    pub(crate) digest: [u8; 32],
    pub(crate) generation: u64,
    pub(crate) identity: Identity,
    pub(crate) not_after: SystemTime,
    pub(crate) ca_not_after: SystemTime,
    authority: Arc<Authority>,
    certified: Arc<CertifiedKey>,
    server: Arc<ServerConfig>,
    /// Expects anyone; others are made of it.
    client: ClientConfig,
}

impl Set {
    /// Makes one of the bytes of `dir`'s files.
    pub(crate) fn new(raw: &Raw, dir: &Path, generation: u64) -> Result<Self, TrustError> {
        let parsed = raw.parse()?;
        let provider = Arc::new(default_provider());
        let (identity, not_after) = own(&parsed, dir)?;
        let authority = Arc::new(authority(&parsed, dir, identity.domain(), &provider)?);
        let certified = Arc::new(certify(&parsed, dir)?);
        let verifier = Arc::new(Verifier {
            authority: Arc::clone(&authority),
            expects: Expects::Anyone,
        });
        let tls = |source| TrustError::Tls {
            dir: dir.to_owned(),
            source,
        };
        let server = server(&verifier, &certified, &provider).map_err(tls)?;
        let client = client(&verifier, &certified, &provider).map_err(tls)?;
        Ok(Self {
            digest: raw.digest(),
            generation,
            identity,
            not_after,
            ca_not_after: earliest(authority.roots.iter().map(|root| root.not_after)),
            authority,
            certified,
            server: Arc::new(server),
            client,
        })
    }

    pub(crate) fn acceptor(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    pub(crate) fn connector(&self, expects: Expects) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        let authority = Arc::clone(&self.authority);
        let verifier = Verifier { authority, expects };
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }

    /// The own certificate and those above it.
    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    pub(crate) fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        expects: &Expects,
    ) -> Result<Identity, Refusal> {
        self.authority
            .judge(chain, expects, Purpose::Either, UnixTime::now())
    }
}

fn earliest(times: impl Iterator<Item = SystemTime>) -> SystemTime {
    times.min().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Who the leaf is for, and the earliest end in its chain.
fn own(parsed: &Parsed, dir: &Path) -> Result<(Identity, SystemTime), TrustError> {
    let path = dir.join(CERTIFICATE);
    let facts = parsed
        .chain
        .iter()
        .map(|certificate| Facts::read(certificate))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|why| TrustError::bad(&path, "certificate", why))?;
    let uris = facts.first().map(|leaf| &*leaf.uris).unwrap_or_default();
    let [uri] = uris else {
        return Err(TrustError::NotOneIdentity {
            path,
            found: uris.len(),
        });
    };
    let parsed = uri.as_deref().unwrap_or_default().parse();
    let identity = parsed.map_err(|source| TrustError::Identity { path, source })?;
    Ok((identity, earliest(facts.iter().map(|it| it.not_after))))
}

fn authority(
    parsed: &Parsed,
    dir: &Path,
    domain: &str,
    provider: &CryptoProvider,
) -> Result<Authority, TrustError> {
    let path = dir.join(CA);
    let mut roots = Vec::with_capacity(parsed.roots.len());
    for root in &parsed.roots {
        let facts = Facts::read(root).map_err(|why| TrustError::bad(&path, "certificate", why))?;
        let anchor = anchor_from_trusted_cert(root)
            .map_err(|error| TrustError::bad(&path, "certificate", error))?;
        roots.push(Root {
            anchor: anchor.to_owned(),
            key: facts.key,
            not_before: facts.not_before,
            not_after: facts.not_after,
        });
    }
    // Whoever may have signed a list: roots, and the intermediates of the own chain.
    let known: Vec<&CertificateDer<'_>> = parsed.roots.iter().chain(&parsed.chain).collect();
    let crls = Lists::read(
        &parsed.crls,
        &known,
        provider.signature_verification_algorithms.all,
    )
    .map_err(|why| TrustError::bad(&dir.join(CRL), "revocation list", why))?;
    Ok(Authority {
        domain: domain.to_owned(),
        roots,
        crls,
        algorithms: provider.signature_verification_algorithms,
    })
}

/// The chain with the key that belongs to it.
fn certify(parsed: &Parsed, dir: &Path) -> Result<CertifiedKey, TrustError> {
    for (nth, key) in parsed.keys.iter().enumerate() {
        let key = match any_supported_type(key.der()) {
            Ok(key) => key,
            Err(error) if nth == 0 => {
                return Err(TrustError::bad(
                    &dir.join(KEY),
                    "private key",
                    shown(&error.to_string()),
                ));
            }
            Err(_) => continue,
        };
        let certified = CertifiedKey::new(parsed.chain.clone(), key);
        match certified.keys_match() {
            Ok(()) => return Ok(certified),
            Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {}
            Err(error) => {
                return Err(TrustError::Tls {
                    dir: dir.to_owned(),
                    source: error,
                });
            }
        }
    }
    Err(TrustError::KeyMismatch(dir.to_owned()))
}

fn server(
    verifier: &Arc<Verifier>,
    certified: &Arc<CertifiedKey>,
    provider: &Arc<CryptoProvider>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::<Verifier>::clone(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

fn client(
    verifier: &Arc<Verifier>,
    certified: &Arc<CertifiedKey>,
    provider: &Arc<CryptoProvider>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::<Verifier>::clone(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}
