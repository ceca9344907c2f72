//! Why a connection is refused, in words that operators, metrics and alerts agree on.
//!
//! TLS tells the other end a number only, an alert; [`Refusal::alert`] and
//! [`Refusal::told_by_peer`] are the two directions. rustls takes the alert from the kind of error
//! that a verifier returns, and the kind with the right alert has no room for more. So the verifier
//! notes the whole refusal for its thread, and [`Refusal::of`], asked on the same thread about the
//! error of that handshake, hands it out once. Asked elsewhere, the refusal is the same without
//! its details. Each judgement on a thread forgets the note of the one before.

use std::{cell::RefCell, io};

use rustls::{AlertDescription, CertificateError, InvalidMessage, OtherError, PeerIncompatible};

/// Why one end does not speak with the other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No certificate was shown.
    #[error("no certificate was shown")]
    NoCertificate,
    /// No trusted CA stands behind the certificate.
    #[error("the certificate is from a CA that is not trusted here")]
    UnknownCa,
    /// Its time is over, or that of a CA above it.
    #[error("the certificate has expired")]
    Expired,
    /// Its time has not begun.
    #[error("the certificate is not valid yet")]
    NotYetValid,
    /// A revocation list names it.
    #[error("the certificate has been revoked")]
    Revoked,
    /// It is good, and is another's.
    #[error("{}", wrong_identity(found, wanted))]
    WrongIdentity {
        /// Who it is; empty when only the other end knows.
        found: String,
        /// Who was to be there; empty when only the other end knows.
        wanted: String,
    },
    /// It cannot be read, or holds what no certificate of Slat's holds.
    #[error("the certificate is not as it has to be: {0}")]
    BadCertificate(String),
    /// The other end does not speak TLS.
    #[error("the other end does not speak TLS")]
    NotTls,
    /// The other end speaks no TLS 1.3.
    #[error("the other end does not speak TLS 1.3")]
    Version,
}

fn wrong_identity(found: &str, wanted: &str) -> String {
    match (found, wanted) {
        ("", "") => "the certificate is not of one who is expected there".to_owned(),
        ("", wanted) => format!("the certificate is not of {wanted}"),
        (found, "") => format!("the certificate is of {found}, who is not expected here"),
        (found, wanted) => format!("the certificate is of {found}, expected was {wanted}"),
    }
}

thread_local! {
    /// What the last judgement on this thread refused.
    static NOTED: RefCell<Option<Refusal>> = const { RefCell::new(None) };
}

/// Replaces what is noted for this thread.
fn note(refusal: Option<Refusal>) -> Option<Refusal> {
    NOTED.with(|noted| match noted.try_borrow_mut() {
        Ok(mut noted) => std::mem::replace(&mut *noted, refusal),
        Err(_) => None,
    })
}

impl Refusal {
    /// A label for metrics.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::UnknownCa => "unknown_ca",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Revoked => "revoked",
            Self::WrongIdentity { .. } => "wrong_identity",
            Self::BadCertificate(_) => "bad_certificate",
            Self::NotTls => "not_tls",
            Self::Version => "version",
        }
    }

    /// What the other end is told.
    #[must_use]
    pub fn alert(&self) -> AlertDescription {
        match self {
            Self::NoCertificate => AlertDescription::CertificateRequired,
            Self::UnknownCa => AlertDescription::UnknownCA,
            Self::Expired => AlertDescription::CertificateExpired,
            Self::NotYetValid => AlertDescription::CertificateUnknown,
            Self::Revoked => AlertDescription::CertificateRevoked,
            Self::WrongIdentity { .. } => AlertDescription::AccessDenied,
            Self::BadCertificate(_) => AlertDescription::BadCertificate,
            Self::NotTls => AlertDescription::DecodeError,
            Self::Version => AlertDescription::ProtocolVersion,
        }
    }

    /// What the other end's alert says about the certificate of this end.
    #[must_use]
    pub fn told_by_peer(alert: AlertDescription) -> Option<Self> {
        Some(match alert {
            AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
                Self::NoCertificate
            }
            AlertDescription::UnknownCA => Self::UnknownCa,
            AlertDescription::CertificateExpired => Self::Expired,
            AlertDescription::CertificateUnknown => Self::NotYetValid,
            AlertDescription::CertificateRevoked => Self::Revoked,
            AlertDescription::AccessDenied => Self::WrongIdentity {
                found: String::new(),
                wanted: String::new(),
            },
            AlertDescription::BadCertificate | AlertDescription::UnsupportedCertificate => {
                Self::BadCertificate("so says the other end".to_owned())
            }
            AlertDescription::ProtocolVersion => Self::Version,
            _ => return None,
        })
    }

    /// What an error of a handshake means: the judgement of this end, or the alert of the other.
    /// `None` when it is about something else. Details of this end's judgement are there when it is
    /// asked on the thread that the handshake failed on, once.
    #[must_use]
    pub fn of(error: &rustls::Error) -> Option<Self> {
        let plain = match error {
            rustls::Error::AlertReceived(alert) => return Self::told_by_peer(*alert),
            rustls::Error::NoCertificatesPresented => return Some(Self::NoCertificate),
            rustls::Error::InvalidCertificate(error) => Self::of_certificate(error)?,
            rustls::Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::InvalidEmptyPayload
                | InvalidMessage::MessageTooLarge,
            ) => return Some(Self::NotTls),
            rustls::Error::PeerIncompatible(
                PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::SupportedVersionsExtensionRequired,
            ) => return Some(Self::Version),
            _ => return None,
        };
        match note(None) {
            Some(noted) if noted.word() == plain.word() => Some(noted),
            _ => Some(plain),
        }
    }

    fn of_certificate(error: &CertificateError) -> Option<Self> {
        Some(match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Self::NotYetValid
            }
            CertificateError::Revoked => Self::Revoked,
            CertificateError::UnknownIssuer => Self::UnknownCa,
            CertificateError::ApplicationVerificationFailure => Self::WrongIdentity {
                found: String::new(),
                wanted: String::new(),
            },
            CertificateError::Other(OtherError(other)) => {
                return other.downcast_ref::<Self>().cloned();
            }
            other => Self::BadCertificate(other.to_string()),
        })
    }

    /// Whether an I/O error wraps what the other end said: an alert.
    #[must_use]
    pub fn is_by_peer(error: &io::Error) -> bool {
        let inner = error.get_ref();
        let inner = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
        matches!(inner, Some(rustls::Error::AlertReceived(_)))
    }

    /// The same of what an I/O error wraps, however deep.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Option<Self> {
        Self::of_chain(error)
    }

    /// The same of an error, of what it wraps and of its sources: a failed call's, for example.
    #[must_use]
    pub fn of_chain(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut error = error;
        loop {
            if let Some(refusal) = error.downcast_ref::<Self>() {
                return Some(refusal.clone());
            }
            if let Some(error) = error.downcast_ref::<rustls::Error>() {
                return Self::of(error);
            }
            // The source of an I/O error is the source of what it wraps, not what it wraps.
            error = match error.downcast_ref::<io::Error>().map(io::Error::get_ref) {
                Some(wrapped) => wrapped?,
                None => error.source()?,
            };
        }
    }

    /// As rustls's error, which sends [`Self::alert`]; the whole of it is noted for this thread.
    pub(crate) fn into_tls(self) -> rustls::Error {
        let error = match &self {
            Self::NoCertificate => rustls::Error::NoCertificatesPresented,
            Self::UnknownCa => CertificateError::UnknownIssuer.into(),
            Self::Expired => CertificateError::Expired.into(),
            Self::Revoked => CertificateError::Revoked.into(),
            Self::WrongIdentity { .. } => CertificateError::ApplicationVerificationFailure.into(),
            // rustls says certificate_unknown for any error that is not its own.
            Self::NotYetValid => {
                CertificateError::Other(OtherError(std::sync::Arc::new(self.clone()))).into()
            }
            Self::BadCertificate(_) | Self::NotTls | Self::Version => {
                CertificateError::BadEncoding.into()
            }
        };
        note(Some(self));
        error
    }

    /// Nothing is noted for this thread from here on.
    pub(crate) fn forget() {
        note(None);
    }
}
