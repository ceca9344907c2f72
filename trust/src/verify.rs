//! The judgement of a certificate chain: signatures up to a trusted root, time, purpose,
//! revocation, exactly one URI, the trust domain, and who is expected. webpki does the first three;
//! a list that is missing, or that nobody wrote anew in time, stops no fleet.
//! The name that a client called the server by plays no part.
//!
//! An [`Authority`] never changes. A configuration of rustls holds the one of the files that it was
//! made from, so that a handshake is judged by one set of files from its beginning to its end.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{
    EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage,
    RequiredEkuNotFoundContext, VerifiedPath,
};

use crate::{Identity, Kind, Refusal, crl::Lists, identity::shown, x509::Facts};

/// Who may be at the other end. Always of the own trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expects {
    /// Any identity.
    Anyone,
    /// One of these kinds.
    Kinds(&'static [Kind]),
    /// This one.
    Exactly(Identity),
    /// The one of this kind and name.
    Named(Kind, String),
}

impl Expects {
    fn accepts(&self, domain: &str, found: &Identity) -> bool {
        found.domain() == domain
            && match self {
                Self::Anyone => true,
                Self::Kinds(kinds) => kinds.contains(&found.kind()),
                Self::Exactly(identity) => identity == found,
                Self::Named(kind, name) => *kind == found.kind() && name == found.name(),
            }
    }

    /// In words, for the trust domain that it is asked in.
    fn wanted(&self, domain: &str) -> String {
        match self {
            Self::Anyone => format!("an identity of {domain}"),
            Self::Kinds(kinds) => {
                let words: Vec<&str> = kinds.iter().map(|kind| kind.word()).collect();
                format!(
                    "an identity of {domain} that is one of: {}",
                    words.join(", ")
                )
            }
            Self::Exactly(identity) => identity.to_string(),
            Self::Named(kind, name) => format!("spiffe://{domain}/slat/{kind}/{}", shown(name)),
        }
    }
}

/// What the peer's certificate has to be good for. One without purposes is good for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Client,
    Server,
    /// One of the two: which was judged when the connection began.
    Either,
}

impl ExtendedKeyUsageValidator for Purpose {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let mut present = Vec::new();
        for purpose in purposes {
            let oid = purpose?.to_decoded_oid();
            let is_client = oid == KeyUsage::CLIENT_AUTH_REPR;
            let is_server = oid == KeyUsage::SERVER_AUTH_REPR;
            let fits = match self {
                Self::Client => is_client,
                Self::Server => is_server,
                Self::Either => is_client || is_server,
            };
            if fits {
                return Ok(());
            }
            present.push(oid);
        }
        if present.is_empty() {
            return Ok(());
        }
        Err(webpki::Error::RequiredEkuNotFoundContext(
            RequiredEkuNotFoundContext {
                required: match self {
                    Self::Server => KeyUsage::server_auth(),
                    Self::Client | Self::Either => KeyUsage::client_auth(),
                },
                present,
            },
        ))
    }
}

/// One trusted root.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) anchor: TrustAnchor<'static>,
    /// Its SubjectPublicKeyInfo.
    pub(crate) key: Vec<u8>,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

/// What chains are judged by.
#[derive(Debug)]
pub(crate) struct Authority {
    pub(crate) domain: String,
    pub(crate) roots: Vec<Root>,
    pub(crate) crls: Lists,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
}

fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(
        time.duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO),
    )
}

impl Authority {
    /// Judges a chain, the leaf first.
    pub(crate) fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        expects: &Expects,
        purpose: Purpose,
        now: UnixTime,
    ) -> Result<Identity, Refusal> {
        let (leaf, intermediates) = chain.split_first().ok_or(Refusal::NoCertificate)?;
        let end = EndEntityCert::try_from(leaf).map_err(refusal_of)?;
        let anchors: Vec<TrustAnchor<'_>> = self.roots.iter().map(|it| it.anchor.clone()).collect();
        let is_good = |path: &VerifiedPath<'_>| self.check(path, now);
        end.verify_for_usage(
            self.algorithms.all,
            &anchors,
            intermediates,
            now,
            purpose,
            None,
            Some(&is_good),
        )
        .map_err(refusal_of)?;
        self.identify(leaf, expects)
    }

    /// What webpki leaves out: it takes an anchor at any time, and a root whose time is over is
    /// none; and what is revoked on the way to it.
    fn check(&self, path: &VerifiedPath<'_>, now: UnixTime) -> Result<(), webpki::Error> {
        let anchor = path.anchor();
        let mut said = Err(webpki::Error::UnknownIssuer);
        for root in self.roots.iter().filter(|root| root.anchor == *anchor) {
            let (not_before, not_after) = (unix(root.not_before), unix(root.not_after));
            if now > not_after {
                said = Err(webpki::Error::CertExpired {
                    time: now,
                    not_after,
                });
            } else if now < not_before {
                said = Err(webpki::Error::CertNotValidYet {
                    time: now,
                    not_before,
                });
            } else {
                return self.crls.check(path, &root.key, self.algorithms.all);
            }
        }
        said
    }

    fn identify(&self, leaf: &CertificateDer<'_>, expects: &Expects) -> Result<Identity, Refusal> {
        let facts = Facts::read(leaf).map_err(Refusal::BadCertificate)?;
        let uri = match &*facts.uris {
            [Some(uri)] => uri,
            uris => {
                return Err(Refusal::BadCertificate(format!(
                    "it has {} URIs among its subject alternative names, and needs exactly one",
                    uris.len()
                )));
            }
        };
        let wrong = |found: String| Refusal::WrongIdentity {
            found,
            wanted: expects.wanted(&self.domain),
        };
        let found: Identity = uri.parse().map_err(|_| wrong(shown(uri)))?;
        if expects.accepts(&self.domain, &found) {
            Ok(found)
        } else {
            Err(wrong(found.to_string()))
        }
    }
}

/// webpki's error in the words of this crate.
fn refusal_of(error: webpki::Error) -> Refusal {
    match error {
        webpki::Error::CertExpired { .. } => Refusal::Expired,
        webpki::Error::CertNotValidYet { .. } => Refusal::NotYetValid,
        webpki::Error::CertRevoked => Refusal::Revoked,
        // A CA of the same name with another key is another CA.
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            Refusal::UnknownCa
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => {
            Refusal::BadCertificate("it is for another purpose (extended key usage)".to_owned())
        }
        other => Refusal::BadCertificate(other.to_string()),
    }
}

/// Judges servers for clients, and clients for servers.
#[derive(Debug)]
pub(crate) struct Verifier {
    pub(crate) authority: Arc<Authority>,
    pub(crate) expects: Expects,
}

impl Verifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        purpose: Purpose,
        now: UnixTime,
    ) -> Result<(), Error> {
        Refusal::forget();
        let mut chain = Vec::with_capacity(intermediates.len().saturating_add(1));
        chain.push(leaf.clone());
        chain.extend(intermediates.iter().cloned());
        match self.authority.judge(&chain, &self.expects, purpose, now) {
            Ok(_) => Ok(()),
            Err(refusal) => Err(refusal.into_tls()),
        }
    }

    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.authority.algorithms)
    }
}

/// TLS 1.2 is not spoken, so nothing of it is ever to be verified.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, Purpose::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authority.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    /// None: the roots are nobody's business before a certificate was shown.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, Purpose::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authority.algorithms.supported_schemes()
    }
}
