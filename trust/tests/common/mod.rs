//! A CA, directories of files that it issued, and handshakes in memory.
#![allow(dead_code, reason = "each test file takes a part")]

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConfig, ServerConnection,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use slat_trust::{Credentials, Refusal};
use time::OffsetDateTime;

pub(crate) const DOMAIN: &str = "example.org";
pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn uri(kind: &str, name: &str) -> String {
    format!("spiffe://{DOMAIN}/slat/{kind}/{name}")
}

/// What a certificate is to say.
pub(crate) struct Wanted {
    pub(crate) uris: Vec<String>,
    pub(crate) not_before: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
    pub(crate) purposes: Vec<ExtendedKeyUsagePurpose>,
    pub(crate) serial: u8,
}

impl Wanted {
    pub(crate) fn new(uri: &str) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            uris: vec![uri.to_owned()],
            not_before: now - DAY,
            not_after: now + DAY,
            purposes: Vec::new(),
            serial: 7,
        }
    }
}

/// A CA made without Slat's own library.
pub(crate) struct Ca {
    pub(crate) pem: String,
    pub(crate) issuer: Issuer<'static, KeyPair>,
}

pub(crate) fn san(uri: &str) -> SanType {
    SanType::URI(uri.try_into().expect("ASCII"))
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let now = OffsetDateTime::now_utc();
        Self::between(name, now - 10 * DAY, now + 10 * DAY)
    }

    pub(crate) fn between(
        name: &str,
        not_before: OffsetDateTime,
        not_after: OffsetDateTime,
    ) -> Self {
        let key = KeyPair::generate().expect("a key");
        let params = ca_params(name, not_before, not_after);
        let pem = params.self_signed(&key).expect("a root").pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// A CA that this one stands above; its `pem` is its own certificate.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let now = OffsetDateTime::now_utc();
        let params = ca_params(name, now - DAY, now + DAY);
        let pem = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate and its key, in PEM.
    pub(crate) fn issue(&self, wanted: &Wanted) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.subject_alt_names = wanted.uris.iter().map(|uri| san(uri)).collect();
        params.not_before = wanted.not_before;
        params.not_after = wanted.not_after;
        params.serial_number = Some(SerialNumber::from_slice(&[wanted.serial]));
        params.extended_key_usages = wanted.purposes.clone();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        (certificate.pem(), key.serialize_pem())
    }

    /// A list that revokes these serial numbers.
    pub(crate) fn revoke(&self, serials: &[u8]) -> String {
        self.revoke_in(serials, 1)
    }

    /// The same, as the list of this number.
    pub(crate) fn revoke_in(&self, serials: &[u8], number: u8) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &u8| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&[*serial]),
            revocation_time: now - DAY,
            reason_code: None,
            invalidity_date: None,
        };
        CertificateRevocationListParams {
            // All alike but for a part of a second, which no list has.
            this_update: OffsetDateTime::from_unix_timestamp(
                (now - DAY).unix_timestamp() / 3600 * 3600,
            )
            .expect("a time"),
            next_update: now + DAY,
            crl_number: SerialNumber::from_slice(&[number]),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .expect("a list")
        .pem()
        .expect("PEM")
    }

    /// Writes what `wanted` says into `dir`, with this CA as the only root.
    pub(crate) fn fill(&self, dir: &Path, wanted: &Wanted) {
        let (certificate, key) = self.issue(wanted);
        write_set(dir, &self.pem, &certificate, &key);
    }

    /// The credentials of `uri` in a directory of their own below `dir`.
    pub(crate) fn credentials(&self, dir: &Path, uri: &str) -> Credentials {
        self.wanted(dir, &Wanted::new(uri))
    }

    pub(crate) fn wanted(&self, dir: &Path, wanted: &Wanted) -> Credentials {
        let mut nth = 0;
        let own = loop {
            let own = dir.join(format!("end-{nth}"));
            if fs::create_dir(&own).is_ok() {
                break own;
            }
            nth += 1;
        };
        self.fill(&own, wanted);
        Credentials::load(&own).expect("credentials")
    }
}

fn ca_params(
    name: &str,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = not_before;
    params.not_after = not_after;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

pub(crate) fn write_set(dir: &Path, ca: &str, certificate: &str, key: &str) {
    write_key(&dir.join("tls.key"), key);
    fs::write(dir.join("ca.crt"), ca).expect("ca.crt");
    fs::write(dir.join("tls.crt"), certificate).expect("tls.crt");
}

pub(crate) fn write_key(path: &Path, key: &str) {
    fs::write(path, key).expect("a key's file");
    chmod(path, 0o600);
}

pub(crate) fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// How a handshake ended at one end.
pub(crate) type End = Result<(), rustls::Error>;

/// A handshake in memory: how it ended for the client, and for the server. Each end's last words
/// reach the other, also those after it failed.
pub(crate) fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> (End, End) {
    let name = ServerName::try_from("any.name").expect("a name");
    let mut client = ClientConnection::new(client, name).expect("a client");
    let mut server = ServerConnection::new(server).expect("a server");
    let (mut client_end, mut server_end) = (Ok(()), Ok(()));
    for _ in 0..20 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).expect("memory");
        }
        feed(&mut server, &bytes, &mut server_end);
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).expect("memory");
        }
        feed_client(&mut client, &bytes, &mut client_end);
    }
    if client_end.is_ok() && server_end.is_ok() {
        assert!(!client.is_handshaking() && !server.is_handshaking());
        assert_eq!(
            client.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
        // It carries data.
        client.writer().write_all(b"ping").expect("memory");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("memory");
        feed(&mut server, &bytes, &mut server_end);
        let mut got = [0; 4];
        server.reader().read_exact(&mut got).expect("four bytes");
        assert_eq!(&got, b"ping");
    }
    (client_end, server_end)
}

fn feed(server: &mut ServerConnection, mut bytes: &[u8], end: &mut End) {
    while !bytes.is_empty() {
        if server.read_tls(&mut bytes).is_err() {
            return;
        }
        if let Err(error) = server.process_new_packets()
            && end.is_ok()
        {
            *end = Err(error);
        }
    }
}

fn feed_client(client: &mut ClientConnection, mut bytes: &[u8], end: &mut End) {
    while !bytes.is_empty() {
        if client.read_tls(&mut bytes).is_err() {
            return;
        }
        if let Err(error) = client.process_new_packets()
            && end.is_ok()
        {
            *end = Err(error);
        }
    }
}

/// What an end says it was refused for.
pub(crate) fn refused(end: &End) -> Refusal {
    let error = end.as_ref().expect_err("the handshake succeeded");
    Refusal::of(error).unwrap_or_else(|| panic!("no refusal: {error}"))
}

/// A client's judgement that takes any server.
#[derive(Debug)]
pub(crate) struct TakesAll;

impl ServerCertVerifier for TakesAll {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        panic!("TLS 1.2");
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The first record of a client that speaks TLS 1.2 and no other.
pub(crate) fn tls12_hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]); // random
    body.push(0); // session
    body.extend([0, 2, 0xc0, 0x2b]); // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
    body.extend([1, 0]); // no compression
    let extensions = [
        &[0, 10, 0, 4, 0, 2, 0, 23][..], // secp256r1
        &[0, 11, 0, 2, 1, 0],            // uncompressed points
        &[0, 13, 0, 4, 0, 2, 4, 3],      // ecdsa_secp256r1_sha256
        &[0, 23, 0, 0],                  // extended master secret
    ]
    .concat();
    body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    body.extend(extensions);
    let mut record = vec![22, 3, 1];
    record.extend(u16::try_from(body.len() + 4).unwrap().to_be_bytes());
    record.extend([1, 0]);
    record.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
    record.extend(body);
    record
}

/// What a server answers that chooses TLS 1.2.
pub(crate) fn tls12_server_hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]); // random
    body.push(0); // no session
    body.extend([0xc0, 0x2b, 0]); // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, no compression
    body.extend([0, 4, 0, 23, 0, 0]); // extended master secret
    let mut record = vec![22, 3, 3];
    record.extend(u16::try_from(body.len() + 4).unwrap().to_be_bytes());
    record.extend([2, 0]);
    record.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
    record.extend(body);
    record
}
