//! What Slat reads in a certificate itself: its time and its URIs. Signatures, chains and purposes
//! are webpki's.

use std::time::{Duration, SystemTime};

use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
    time::ASN1Time,
};

/// Of one certificate.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    /// In hexadecimal digits.
    pub(crate) serial: String,
    /// The names of the holder and of the issuer, as they are encoded.
    pub(crate) subject: Vec<u8>,
    pub(crate) issuer: Vec<u8>,
    /// The holder's key, as its SubjectPublicKeyInfo.
    pub(crate) key: Vec<u8>,
    /// Every URI among the subject alternative names; `None` for one that is no text.
    pub(crate) uris: Vec<Option<String>>,
}

/// GeneralName's number for a URI.
const URI: u32 = 6;

/// Seconds of the calendar as this machine's time.
fn at(time: ASN1Time) -> SystemTime {
    let seconds = time.timestamp();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let at = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    at.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Two digits for each byte, without the zero that only says that a number is positive.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let significant = bytes.strip_prefix(&[0]).unwrap_or(bytes);
    significant
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

impl Facts {
    /// Reads them; the error says why not.
    pub(crate) fn read(der: &[u8]) -> Result<Self, String> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| "it is no X.509 certificate".to_owned())?;
        if !rest.is_empty() {
            return Err("bytes follow it".to_owned());
        }
        let names = certificate.subject_alternative_name().map_err(|_| {
            "its subject alternative names cannot be read, or are there twice".to_owned()
        })?;
        let mut uris = Vec::new();
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::URI(uri) => uris.push(Some((*uri).to_owned())),
                GeneralName::Invalid(tag, _) if tag.0 == URI => uris.push(None),
                _ => {}
            }
        }
        Ok(Self {
            not_before: at(certificate.validity.not_before),
            not_after: at(certificate.validity.not_after),
            serial: hex(certificate.raw_serial()),
            subject: certificate.subject().as_raw().to_owned(),
            issuer: certificate.issuer().as_raw().to_owned(),
            key: certificate.public_key().raw.to_owned(),
            uris,
        })
    }
}
