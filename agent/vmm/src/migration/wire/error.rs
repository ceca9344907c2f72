//! Failures of the data path.

use std::io;

use slat_proto::{ApiError, Reason};

/// Metadata of an error that the other side told.
pub(crate) const TOLD: &str = "told_by";

/// A failure of the data path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum WireError {
    /// A header or payload that the protocol does not allow.
    #[error("bad frame: {field}: {message}")]
    Corrupt {
        field: &'static str,
        message: String,
    },
    /// A frame of another version than the one that was agreed on.
    #[error("bad frame: protocol version {found}, {agreed} was agreed on")]
    Version { found: u32, agreed: u32 },
    /// A run outside its slot.
    #[error("slot {slot}, page {page:#x} + {pages}: outside the declared slots")]
    OutOfSlot { slot: u32, page: u64, pages: u64 },
    /// The connection broke or ended.
    #[error("connection: {0}")]
    Io(#[source] io::Error),
    /// One end refused the other's TLS, or a record was not what the other end sent.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Aborted(ApiError),
}

impl WireError {
    pub(crate) fn corrupt(field: &'static str, message: impl ToString) -> Self {
        Self::Corrupt {
            field,
            message: message.to_string(),
        }
    }
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        let tls = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            Some(tls) => Self::Tls(tls.clone()),
            None => Self::Io(error),
        }
    }
}

/// What TLS refused, as the caller is told.
fn refused(error: &rustls::Error, message: String) -> ApiError {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    let (reason, advice) = match error {
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. })
        | Error::AlertReceived(Alert::CertificateExpired) => (
            Reason::CertificateExpired,
            "the key of the page streams has ended: migrate again, and compare both hosts' clocks",
        ),
        Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            (Reason::CertificateNotYetValid, "compare both hosts' clocks")
        }
        Error::NoCertificatesPresented | Error::AlertReceived(Alert::CertificateRequired) => (
            Reason::CertificateRequired,
            "the other end is not a VM's process of this migration",
        ),
        Error::InvalidCertificate(_)
        | Error::AlertReceived(
            Alert::AccessDenied
            | Alert::BadCertificate
            | Alert::CertificateUnknown
            | Alert::DecryptError,
        ) => (
            Reason::IdentityWrong,
            "the other end has not the key that the grant names: migrate again; if it repeats, somebody else answers at the data port",
        ),
        Error::PeerIncompatible(_)
        | Error::AlertReceived(Alert::ProtocolVersion | Alert::HandshakeFailure)
        | Error::InvalidMessage(_) => (
            Reason::TlsUnexpected,
            "bring both hosts to the same version of slat, and start both agents alike",
        ),
        _ => (
            Reason::StreamCorrupt,
            "migrate again; if it repeats, see what stands between both hosts",
        ),
    };
    let told = ApiError::new(reason, message).with("advice", advice);
    match reason {
        Reason::StreamCorrupt => told.with("field", "tls"),
        _ => told,
    }
}

fn lost(message: &str) -> ApiError {
    ApiError::new(Reason::ConnectionLost, message).with(
        "advice",
        "migrate again; if it repeats, see the log of the other host and the network between both",
    )
}

impl From<WireError> for ApiError {
    fn from(error: WireError) -> Self {
        let message = error.to_string();
        match error {
            WireError::Corrupt { field, .. } => {
                ApiError::new(Reason::StreamCorrupt, message).with("field", field)
            }
            WireError::Version { found, agreed } => {
                ApiError::new(Reason::StateVersionUnsupported, message)
                    .with("found", found)
                    .with("agreed", agreed)
            }
            WireError::OutOfSlot { slot, page, .. } => {
                ApiError::new(Reason::PageOutOfSlot, message)
                    .with("slot", slot)
                    .with("page", page)
            }
            WireError::Io(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                ApiError::new(
                    Reason::ProgressStalled,
                    "the other side neither sends nor takes data",
                )
            }
            WireError::Io(source) if source.kind() == io::ErrorKind::UnexpectedEof => lost(
                "the other side closed the connection in mid-migration: its process ended, or its host did",
            ),
            WireError::Io(_) => lost(&message),
            WireError::Tls(error) => refused(&error, message),
            WireError::Aborted(error) => error.with(TOLD, "the other side"),
        }
    }
}
