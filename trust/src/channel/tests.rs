//! Handshakes in memory: who is let in, and who is not.

use rustls::{
    AlertDescription, ClientConnection, ConnectionCommon, Error, ServerConnection,
    pki_types::ServerName,
};

use super::*;
use crate::channel::EXPORTER;

const HOUR: Duration = Duration::from_secs(3600);

fn key() -> ChannelKey {
    ChannelKey::generate("u1", "m1", HOUR).unwrap()
}

fn expired() -> ChannelKey {
    let now = SystemTime::now();
    ChannelKey::between("u1", "m1", now - 2 * HOUR, now - HOUR).unwrap()
}

fn carry<A, B>(from: &mut ConnectionCommon<A>, to: &mut ConnectionCommon<B>) -> Result<(), Error> {
    let mut wire = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut wire).unwrap();
    }
    let mut wire = wire.as_slice();
    while !wire.is_empty() {
        to.read_tls(&mut wire).unwrap();
        to.process_new_packets()?;
    }
    Ok(())
}

/// Both ends after a handshake, or what the first that refused says.
fn shake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<(ClientConnection, ServerConnection), Error> {
    let name = ServerName::try_from("slat-pages").unwrap();
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    for _ in 0..5 {
        carry(&mut client, &mut server)?;
        carry(&mut server, &mut client)?;
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok((client, server))
}

fn both(
    client: &ChannelKey,
    server: &ChannelKey,
    (by_client, by_server): ([u8; 32], [u8; 32]),
) -> Result<(ClientConnection, ServerConnection), Error> {
    shake(
        client.client(by_client, Extraction::Never).unwrap(),
        server.server(by_server, Extraction::Never).unwrap(),
    )
}

#[test]
fn two_ends_that_pin_each_other_share_secrets_and_nothing_is_kept_for_another_time() {
    let (client, server) = (key(), key());
    let pins = (server.fingerprint(), client.fingerprint());
    let (one, other) = both(&client, &server, pins).unwrap();
    assert_eq!(
        one.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    assert_eq!(one.tls13_tickets_received(), 0);
    let exported = |connection: &ClientConnection| {
        connection.export_keying_material([0; 32], EXPORTER, Some(b"bound".as_slice()))
    };
    let here: [u8; 32] = exported(&one).unwrap();
    let there = other.export_keying_material([0; 32], EXPORTER, Some(b"bound".as_slice()));
    assert_eq!(here, there.unwrap());
    let (again, _) = both(&client, &server, pins).unwrap();
    assert_eq!(again.handshake_kind(), Some(rustls::HandshakeKind::Full));
    assert_ne!(
        here,
        exported(&again).unwrap(),
        "each handshake has secrets of its own"
    );
}

#[test]
fn another_key_is_refused_at_either_end() {
    let (client, server, other) = (key(), key(), key());
    for pins in [
        (other.fingerprint(), client.fingerprint()),
        (server.fingerprint(), other.fingerprint()),
        (server.fingerprint(), [0; 32]),
    ] {
        let refused = both(&client, &server, pins).unwrap_err();
        assert!(matches!(refused, Error::InvalidCertificate(_)), "{refused}");
    }
}

#[test]
fn a_certificate_whose_time_is_over_is_refused_at_either_end() {
    let (fresh, old) = (key(), expired());
    for (client, server) in [(&fresh, &old), (&old, &fresh)] {
        let refused = both(client, server, (server.fingerprint(), client.fingerprint()));
        let Err(Error::InvalidCertificate(why)) = refused else {
            panic!("it was let in");
        };
        assert!(
            matches!(why, rustls::CertificateError::ExpiredContext { .. }),
            "{why:?}"
        );
    }
}

#[test]
fn a_peer_without_a_certificate_is_refused() {
    let (client, server) = (key(), key());
    let pinned = Arc::new(Pinned {
        key: server.fingerprint(),
        provider: crypto(),
    });
    let bare = ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(pinned)
        .with_no_client_auth();
    let config = server.server(client.fingerprint(), Extraction::Never);
    let refused = shake(Arc::new(bare), config.unwrap()).unwrap_err();
    assert!(
        matches!(refused, Error::NoCertificatesPresented),
        "{refused}"
    );
}

/// A certificate is public: who copies it has not the key.
#[test]
fn a_copied_certificate_without_its_key_is_refused() {
    let (client, server, thief) = (key(), key(), key());
    let copied = ChannelKey {
        certified: Arc::new(CertifiedKey::new(
            client.certified.cert.clone(),
            Arc::clone(&thief.certified.key),
        )),
        fingerprint: client.fingerprint(),
        not_after: client.not_after(),
    };
    let pins = (server.fingerprint(), client.fingerprint());
    let refused = both(&copied, &server, pins).unwrap_err();
    assert!(
        matches!(
            refused,
            Error::InvalidCertificate(rustls::CertificateError::BadSignature)
        ),
        "{refused}"
    );
}

/// The ClientHello of a program that speaks TLS 1.2 and nothing later.
fn hello_of_tls12() -> Vec<u8> {
    let mut hello = vec![3, 3];
    hello.extend_from_slice(&[7; 32]);
    hello.push(0);
    // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256; no compression.
    hello.extend_from_slice(&[0, 2, 0xc0, 0x2b, 1, 0]);
    // Groups: P-256. Signatures: ECDSA with SHA-256. Uncompressed points.
    let extensions = [
        0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3, 0, 11, 0, 2, 1, 0,
    ];
    hello.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
    hello.extend_from_slice(&extensions);
    let mut record = vec![22, 3, 1];
    record.extend_from_slice(&(hello.len() as u16 + 4).to_be_bytes());
    record.extend_from_slice(&[1, 0, 0, hello.len() as u8]);
    record.extend_from_slice(&hello);
    record
}

#[test]
fn tls_1_2_is_refused_and_told_so() {
    let server = key();
    let config = server.server(key().fingerprint(), Extraction::Never);
    let mut server = ServerConnection::new(config.unwrap()).unwrap();
    server.read_tls(&mut hello_of_tls12().as_slice()).unwrap();
    let refused = server.process_new_packets().unwrap_err();
    assert!(matches!(refused, Error::PeerIncompatible(_)), "{refused}");
    let mut alert = Vec::new();
    server.write_tls(&mut alert).unwrap();
    let said = AlertDescription::from(*alert.last().unwrap());
    assert_eq!(said, AlertDescription::ProtocolVersion);
}

#[test]
fn secrets_are_given_out_only_where_the_kernel_is_to_have_them() {
    let (client, server) = (key(), key());
    for (extraction, given) in [(Extraction::Never, false), (Extraction::ToKernel, true)] {
        let (one, _) = shake(
            client.client(server.fingerprint(), extraction).unwrap(),
            server
                .server(client.fingerprint(), Extraction::Never)
                .unwrap(),
        )
        .unwrap();
        assert_eq!(one.dangerous_extract_secrets().is_ok(), given);
    }
}

#[test]
fn a_private_key_is_not_printed() {
    let printed = format!("{:?}", key());
    assert!(printed.len() < 120, "{printed}");
}
