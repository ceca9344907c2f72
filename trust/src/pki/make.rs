//! Keys, roots, certificates and revocation lists, in memory: ECDSA on P-256 throughout.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::{
    PkiError,
    record::{Issued, seconds},
};
use crate::{Identity, Kind, x509::hex};

/// How long a root is valid, and a revocation list.
const ROOT_LIFETIME: Duration = Duration::from_secs(3650 * DAY);
const CRL_LIFETIME: Duration = Duration::from_secs(90 * DAY);
/// Clocks of hosts differ: what is made now is valid a little earlier.
const SKEW: Duration = Duration::from_secs(5 * 60);
const DAY: u64 = 24 * 3600;

/// The time that a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From.
    pub not_before: SystemTime,
    /// To.
    pub not_after: SystemTime,
}

impl Validity {
    /// From now on; a few minutes earlier, because clocks differ.
    ///
    /// # Errors
    /// When that is beyond the calendar.
    pub fn from_now(lifetime: Duration) -> Result<Self, PkiError> {
        let now = SystemTime::now();
        let not_after = now.checked_add(lifetime);
        Ok(Self {
            not_before: now.checked_sub(SKEW).unwrap_or(now),
            not_after: not_after.ok_or(PkiError::Time("it ends beyond the calendar"))?,
        })
    }

    /// As long as is usual for the kind: 90 days, for users 30.
    ///
    /// # Errors
    /// None while clocks are right.
    pub fn usual(kind: Kind) -> Result<Self, PkiError> {
        Self::from_now(usual_lifetime(kind))
    }
}

/// How long a certificate of a kind is valid when nothing else is asked for.
#[must_use]
pub fn usual_lifetime(kind: Kind) -> Duration {
    match kind {
        Kind::Agent | Kind::Server => Duration::from_secs(90 * DAY),
        Kind::User => Duration::from_secs(30 * DAY),
    }
}

/// A private key. When it is dropped its encoded bytes are zeroised, and so is the PEM that it was
/// given out as; ring's key pair within, which signs, is not.
pub(crate) struct Key(Zeroizing<KeyPair>);

impl Key {
    pub(crate) fn new() -> Result<Self, PkiError> {
        KeyPair::generate()
            .map(|key| Self(Zeroizing::new(key)))
            .map_err(failed)
    }

    pub(crate) fn from_pem(pem: &[u8]) -> Result<Self, PkiError> {
        let text = std::str::from_utf8(pem)
            .map_err(|_| PkiError::Make("the CA's key is no PEM".to_owned()))?;
        KeyPair::from_pem(text)
            .map(|key| Self(Zeroizing::new(key)))
            .map_err(failed)
    }

    pub(crate) fn pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    /// Whether it is the key of a certificate.
    pub(crate) fn is_of(&self, certificate: &CertificateDer<'_>) -> bool {
        use rcgen::PublicKeyData;
        webpki::EndEntityCert::try_from(certificate).is_ok_and(|certificate| {
            certificate.subject_public_key_info().as_ref() == self.0.subject_public_key_info()
        })
    }
}

/// Nothing of a key is in rcgen's errors.
fn failed(error: rcgen::Error) -> PkiError {
    PkiError::Make(error.to_string())
}

/// 128 bits of chance, but for the first two, which keep it positive and of one length.
fn serial() -> Result<[u8; 16], PkiError> {
    let mut bytes = [0; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| PkiError::Make("the kernel gives no random bytes".to_owned()))?;
    bytes[0] = (bytes[0] & 0x3f) | 0x40;
    Ok(bytes)
}

fn calendar(time: SystemTime) -> Result<OffsetDateTime, PkiError> {
    let beyond = PkiError::Time("it is beyond the calendar");
    let seconds =
        i64::try_from(seconds(time)).map_err(|_| PkiError::Time("it is beyond the calendar"))?;
    let at = OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| beyond)?;
    // Four digits of a year are what a certificate has.
    if at.year() > 9999 {
        return Err(PkiError::Time("it ends after the year 9999"));
    }
    Ok(at)
}

/// A root: its certificate and key.
pub(crate) struct Root {
    pub(crate) pem: String,
    pub(crate) der: CertificateDer<'static>,
    pub(crate) key: Key,
    params: CertificateParams,
}

impl Root {
    /// A new one, self-signed. Its name has a part of its serial number, so that roots of one
    /// domain are told apart, and each one's revocation list is not taken for another's.
    pub(crate) fn new(domain: &str) -> Result<Self, PkiError> {
        let key = Key::new()?;
        let serial = serial()?;
        let validity = Validity::from_now(ROOT_LIFETIME)?;
        let mut params = CertificateParams::default();
        let names = &mut params.distinguished_name;
        *names = rcgen::DistinguishedName::new();
        let part: String = hex(&serial).chars().take(8).collect();
        names.push(DnType::OrganizationName, domain);
        names.push(DnType::CommonName, format!("Slat CA {part}"));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.subject_alt_names = vec![uri(&format!("spiffe://{domain}"))?];
        params.not_before = calendar(validity.not_before)?;
        params.not_after = calendar(validity.not_after)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&*key.0).map_err(failed)?;
        Ok(Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            key,
            params,
        })
    }

    /// This root's name and key, vouched for by an older root until that one ends. With it, who
    /// trusts the older one alone trusts what this one issues.
    pub(crate) fn crossed_by(
        &self,
        older: &CertificateDer<'_>,
        key: &Key,
        older_ends: SystemTime,
    ) -> Result<String, PkiError> {
        let issuer = Issuer::from_ca_cert_der(older, &*key.0).map_err(failed)?;
        let mut params = self.params.clone();
        params.serial_number = Some(SerialNumber::from_slice(&serial()?));
        params.not_after = params.not_after.min(calendar(older_ends)?);
        params.use_authority_key_identifier_extension = true;
        let signed = params.signed_by(&*self.key.0, &issuer).map_err(failed)?;
        Ok(signed.pem())
    }
}

fn uri(text: &str) -> Result<SanType, PkiError> {
    text.try_into().map(SanType::URI).map_err(failed)
}

/// A certificate for `identity`, with a new key.
pub(crate) fn leaf(
    root: &CertificateDer<'_>,
    root_key: &Key,
    root_serial: &str,
    identity: &Identity,
    validity: Validity,
) -> Result<(Issued, String, Key), PkiError> {
    let issuer = Issuer::from_ca_cert_der(root, &*root_key.0).map_err(failed)?;
    let key = Key::new()?;
    let serial = serial()?;
    let mut params = CertificateParams::default();
    let names = &mut params.distinguished_name;
    *names = rcgen::DistinguishedName::new();
    names.push(
        DnType::CommonName,
        format!("{} {}", identity.kind(), identity.name()),
    );
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.subject_alt_names = vec![uri(&identity.to_string())?];
    params.not_before = calendar(validity.not_before)?;
    params.not_after = calendar(validity.not_after)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match identity.kind() {
        // Agents and servers call each other.
        Kind::Agent | Kind::Server => vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ],
        Kind::User => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&*key.0, &issuer).map_err(failed)?;
    let issued = Issued {
        serial: hex(&serial),
        identity: identity.clone(),
        root: root_serial.to_owned(),
        not_before: validity.not_before,
        not_after: validity.not_after,
        revoked: None,
        replaced_by: None,
    };
    Ok((issued, certificate.pem(), key))
}

/// A root's list of what is revoked and would still be valid.
pub(crate) fn crl(
    root: &CertificateDer<'_>,
    root_key: &Key,
    revoked: &[&Issued],
) -> Result<String, PkiError> {
    let issuer = Issuer::from_ca_cert_der(root, &*root_key.0).map_err(failed)?;
    let now = SystemTime::now();
    let mut revoked_certs = Vec::with_capacity(revoked.len());
    for record in revoked {
        revoked_certs.push(RevokedCertParams {
            serial_number: SerialNumber::from(bytes(&record.serial)),
            revocation_time: calendar(record.revoked.unwrap_or(now))?,
            reason_code: None,
            invalidity_date: None,
        });
    }
    // Lists of one root are numbered by when they were made.
    let number = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_micros());
    let ends = now.checked_add(CRL_LIFETIME).unwrap_or(now);
    let list = CertificateRevocationListParams {
        this_update: calendar(now)?,
        next_update: calendar(ends)?,
        crl_number: SerialNumber::from(number.to_be_bytes().to_vec()),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(&issuer)
        .and_then(|list| list.pem())
        .map_err(failed)
}

/// A serial number's bytes. Its digits come in pairs.
fn bytes(serial: &str) -> Vec<u8> {
    serial
        .as_bytes()
        .chunks(2)
        .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}
