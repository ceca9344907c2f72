//! Each refusal by a TLS 1.3 handshake: the end that refuses says why, and the other end is told by
//! an alert that means the same.

mod common;

use std::sync::Arc;

use common::{Ca, DAY, DOMAIN, Wanted, handshake, refused, uri};
use rcgen::ExtendedKeyUsagePurpose;
use rustls::{AlertDescription, ClientConfig, ClientConnection, ServerConnection, version::TLS13};
use rustls_pki_types::ServerName;
use slat_test_dir::TestDir;
use slat_trust::{Credentials, Expects, Kind, Refusal};
use time::OffsetDateTime;

/// A CA, an agent and a server that trust it.
struct Pair {
    dir: TestDir,
    ca: Ca,
    agent: Credentials,
    server: Credentials,
}

fn pair() -> Pair {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    let agent = ca.credentials(dir.path(), &uri("agent", "host-a"));
    let server = ca.credentials(dir.path(), &uri("server", "main"));
    Pair {
        dir,
        ca,
        agent,
        server,
    }
}

/// `bad` connects to a good server, then a good client connects to `bad`. Both times `bad` is
/// refused with `word` by the other end, and told so by `alert`.
fn refused_as_client_and_server(
    pair: &Pair,
    bad: &Credentials,
    expects: &Expects,
    word: &str,
    alert: AlertDescription,
) {
    let told = Refusal::told_by_peer(alert).expect("an alert about a certificate");
    // A server accepts anyone of its domain, so a kind or name is refused by clients only.
    if *expects == Expects::Anyone {
        let (client, server) = handshake(bad.connector(Expects::Anyone), pair.server.acceptor());
        let refusal = refused(&server);
        assert_eq!(refusal.word(), word, "the server: {refusal}");
        assert_eq!(refusal.alert(), alert);
        assert_eq!(client, Err(rustls::Error::AlertReceived(alert)));
        assert_eq!(refused(&client), told);
    }
    let (client, server) = handshake(pair.agent.connector(expects.clone()), bad.acceptor());
    let refusal = refused(&client);
    assert_eq!(refusal.word(), word, "the client: {refusal}");
    assert_eq!(refusal.alert(), alert);
    assert_eq!(server, Err(rustls::Error::AlertReceived(alert)));
    assert_eq!(refused(&server), told);
    // A connection that lasts is judged alike.
    let chain = chain_of(bad);
    let judged = pair.agent.judge(&chain, expects).expect_err("refused");
    assert_eq!(judged.word(), word);
}

/// The own chain, as a peer gets it.
fn chain_of(of: &Credentials) -> Vec<rustls_pki_types::CertificateDer<'static>> {
    use rustls_pki_types::pem::PemObject;
    let pem = std::fs::read(of.dir().join("tls.crt")).expect("tls.crt");
    rustls_pki_types::CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .expect("PEM")
}

#[test]
fn both_ends_know_each_other() {
    let pair = pair();
    let agent = pair.agent.identity();
    for expects in [
        Expects::Anyone,
        Expects::Kinds(&[Kind::Agent, Kind::Server]),
        Expects::Exactly(pair.server.identity()),
        Expects::Named(Kind::Server, "main".to_owned()),
    ] {
        let ends = handshake(pair.agent.connector(expects), pair.server.acceptor());
        assert_eq!(ends, (Ok(()), Ok(())));
    }
    let judged = pair.server.judge(&chain_of(&pair.agent), &Expects::Anyone);
    assert_eq!(judged, Ok(agent));
    assert_eq!(pair.agent.trouble(), None);
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let pair = pair();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut bare = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    bare.dangerous()
        .set_certificate_verifier(Arc::new(common::TakesAll));
    let (client, server) = handshake(Arc::new(bare), pair.server.acceptor());
    assert_eq!(refused(&server), Refusal::NoCertificate);
    let alert = Refusal::NoCertificate.alert();
    assert_eq!(client, Err(rustls::Error::AlertReceived(alert)));
    assert_eq!(refused(&client), Refusal::NoCertificate);
    assert_eq!(
        pair.server.judge(&[], &Expects::Anyone),
        Err(Refusal::NoCertificate)
    );
}

#[test]
fn another_ca_is_refused_whatever_its_name() {
    let pair = pair();
    for name in ["another root", "root"] {
        let other = Ca::new(name);
        let bad = pair.dir.path().join(name);
        std::fs::create_dir(&bad).expect("a directory");
        other.fill(&bad, &Wanted::new(&uri("agent", "host-a")));
        // It trusts the good ones, so that it is refused and does not refuse.
        std::fs::write(bad.join("ca.crt"), &pair.ca.pem).expect("ca.crt");
        let bad = Credentials::load(&bad).expect("credentials");
        let trouble = bad.trouble().expect("a warning");
        assert!(trouble.contains("not trusted"), "{trouble}");
        let alert = AlertDescription::UnknownCA;
        refused_as_client_and_server(&pair, &bad, &Expects::Anyone, "unknown_ca", alert);
    }
}

#[test]
fn time_is_kept() {
    let pair = pair();
    let now = OffsetDateTime::now_utc();
    let mut wanted = Wanted::new(&uri("agent", "late"));
    wanted.not_before = now - 2 * DAY;
    wanted.not_after = now - DAY;
    let late = pair.ca.wanted(pair.dir.path(), &wanted);
    let alert = AlertDescription::CertificateExpired;
    refused_as_client_and_server(&pair, &late, &Expects::Anyone, "expired", alert);
    assert!(late.trouble().expect("a warning").contains("expired"));

    wanted.not_before = now + DAY;
    wanted.not_after = now + 2 * DAY;
    let early = pair.ca.wanted(pair.dir.path(), &wanted);
    let alert = AlertDescription::CertificateUnknown;
    refused_as_client_and_server(&pair, &early, &Expects::Anyone, "not_yet_valid", alert);
}

#[test]
fn a_root_out_of_its_time_vouches_for_nobody() {
    let dir = TestDir::new();
    let now = OffsetDateTime::now_utc();
    for (not_before, not_after, word) in [
        (now - 3 * DAY, now - 2 * DAY, "expired"),
        (now + 2 * DAY, now + 3 * DAY, "not_yet_valid"),
    ] {
        let ca = Ca::between("root", not_before, not_after);
        let end = ca.credentials(dir.path(), &uri("agent", "host-a"));
        let (client, _) = handshake(end.connector(Expects::Anyone), end.acceptor());
        assert_eq!(refused(&client).word(), word);
    }
}

#[test]
fn what_a_list_names_is_refused() {
    let pair = pair();
    let mut wanted = Wanted::new(&uri("agent", "stolen"));
    wanted.serial = 66;
    let stolen = pair.ca.wanted(pair.dir.path(), &wanted);
    let ends = handshake(stolen.connector(Expects::Anyone), pair.server.acceptor());
    assert_eq!(ends, (Ok(()), Ok(())));
    for of in [&pair.agent, &pair.server] {
        // A list of another CA stands before it, and says nothing about this one's.
        let lists = Ca::new("other").revoke(&[7]) + &pair.ca.revoke(&[66]);
        std::fs::write(of.dir().join("crl.pem"), lists).expect("crl.pem");
        assert!(of.refresh().expect("a good set"));
    }
    let alert = AlertDescription::CertificateRevoked;
    refused_as_client_and_server(&pair, &stolen, &Expects::Anyone, "revoked", alert);
    let ends = handshake(
        pair.agent.connector(Expects::Anyone),
        pair.server.acceptor(),
    );
    assert_eq!(ends, (Ok(()), Ok(())));
}

/// What was concatenated, as a CA's tools give it out again and again.
#[test]
fn the_newest_list_of_a_key_counts() {
    let pair = pair();
    let end = |name: &str, serial: u8| {
        let mut wanted = Wanted::new(&uri("agent", name));
        wanted.serial = serial;
        pair.ca.wanted(pair.dir.path(), &wanted)
    };
    let (stolen, held) = (end("stolen", 66), end("held", 67));
    let (old, new) = (pair.ca.revoke_in(&[67], 8), pair.ca.revoke_in(&[66], 9));
    for lists in [format!("{old}{new}"), format!("{new}{old}")] {
        std::fs::write(pair.server.dir().join("crl.pem"), lists).expect("crl.pem");
        assert!(pair.server.refresh().expect("a good set"));
        let (_, server) = handshake(stolen.connector(Expects::Anyone), pair.server.acceptor());
        assert_eq!(refused(&server), Refusal::Revoked);
        let ends = handshake(held.connector(Expects::Anyone), pair.server.acceptor());
        assert_eq!(ends, (Ok(()), Ok(())), "the newer list has it no more");
    }
}

/// A CA that got a new key under its old name: the lists of both keys stand in one file.
#[test]
fn a_list_counts_for_the_key_that_signed_it() {
    let pair = pair();
    let anew = Ca::new("root");
    let mut ends = Vec::new();
    for (nth, ca) in [&pair.ca, &anew].into_iter().enumerate() {
        for (serial, name) in [(66, "stolen"), (7, "good")] {
            let mut wanted = Wanted::new(&uri("agent", &format!("{name}-{nth}")));
            wanted.serial = serial;
            let end = ca.wanted(pair.dir.path(), &wanted);
            let both = format!("{}{}", pair.ca.pem, anew.pem);
            std::fs::write(end.dir().join("ca.crt"), both).expect("ca.crt");
            end.refresh().expect("a good set");
            ends.push((serial, end));
        }
    }
    let (old, new) = (pair.ca.revoke(&[66]), anew.revoke(&[66]));
    let server = pair.server;
    let both = format!("{}{}", pair.ca.pem, anew.pem);
    std::fs::write(server.dir().join("ca.crt"), both).expect("ca.crt");
    for lists in [format!("{old}{new}"), format!("{new}{old}")] {
        std::fs::write(server.dir().join("crl.pem"), lists).expect("crl.pem");
        assert!(server.refresh().expect("a good set"));
        for (serial, end) in &ends {
            let judged = handshake(end.connector(Expects::Anyone), server.acceptor());
            if *serial == 66 {
                assert_eq!(refused(&judged.1), Refusal::Revoked, "{end:?}");
            } else {
                assert_eq!(judged, (Ok(()), Ok(())), "{end:?}");
            }
        }
    }
    // The list of one key says nothing of the other's certificates.
    std::fs::write(server.dir().join("crl.pem"), new).expect("crl.pem");
    assert!(server.refresh().expect("a good set"));
    let judged = handshake(ends[0].1.connector(Expects::Anyone), server.acceptor());
    assert_eq!(judged, (Ok(()), Ok(())));
}

/// Nobody who reads the list knows the intermediate before a peer shows it.
#[test]
fn a_list_of_an_intermediate_is_asked() {
    let pair = pair();
    let between = pair.ca.intermediate("between");
    let mut wanted = Wanted::new(&uri("agent", "stolen"));
    wanted.serial = 66;
    let (certificate, key) = between.issue(&wanted);
    let dir = pair.dir.path().join("stolen");
    std::fs::create_dir(&dir).expect("a directory");
    let chain = certificate + &between.pem;
    common::write_set(&dir, &pair.ca.pem, &chain, &key);
    let stolen = Credentials::load(&dir).expect("credentials");
    // Another's, of the same name and newer, stands before it.
    let lists = Ca::new("between").revoke_in(&[7], 9) + &between.revoke(&[66]);
    for (lists, is_good) in [(between.revoke(&[7]), true), (lists, false)] {
        std::fs::write(pair.server.dir().join("crl.pem"), lists).expect("crl.pem");
        assert!(pair.server.refresh().expect("a good set"));
        let (_, server) = handshake(stolen.connector(Expects::Anyone), pair.server.acceptor());
        assert_eq!(server.is_ok(), is_good);
        assert!(is_good || refused(&server) == Refusal::Revoked);
    }
}

#[test]
fn another_kind_name_or_domain_is_refused() {
    let pair = pair();
    let alert = AlertDescription::AccessDenied;
    let user = pair.ca.credentials(pair.dir.path(), &uri("user", "main"));
    for expects in [
        Expects::Kinds(&[Kind::Agent, Kind::Server]),
        Expects::Exactly(pair.server.identity()),
        Expects::Named(Kind::Server, "main".to_owned()),
    ] {
        refused_as_client_and_server(&pair, &user, &expects, "wrong_identity", alert);
    }
    let other = pair
        .ca
        .credentials(pair.dir.path(), &uri("server", "spare"));
    for expects in [
        Expects::Exactly(pair.server.identity()),
        Expects::Named(Kind::Server, "main".to_owned()),
    ] {
        refused_as_client_and_server(&pair, &other, &expects, "wrong_identity", alert);
    }
    let (client, _) = handshake(
        pair.agent
            .connector(Expects::Exactly(pair.server.identity())),
        other.acceptor(),
    );
    let wanted = uri("server", "main");
    let found = uri("server", "spare");
    assert_eq!(refused(&client), Refusal::WrongIdentity { found, wanted });
    // What was noted is told once; then the refusal has no details.
    assert_eq!(
        refused(&client),
        Refusal::WrongIdentity {
            found: String::new(),
            wanted: String::new()
        }
    );
    let foreign = "spiffe://example.net/slat/server/main";
    let foreign = pair.ca.credentials(pair.dir.path(), foreign);
    for expects in [Expects::Anyone, Expects::Exactly(foreign.identity())] {
        refused_as_client_and_server_of_another_domain(&pair, &foreign, &expects);
    }
}

/// Each end refuses the other, so the client, which judges first, is looked at; and the server
/// when the client takes anybody.
fn refused_as_client_and_server_of_another_domain(
    pair: &Pair,
    foreign: &Credentials,
    expects: &Expects,
) {
    let alert = AlertDescription::AccessDenied;
    let (client, server) = handshake(pair.agent.connector(expects.clone()), foreign.acceptor());
    assert_eq!(refused(&client).word(), "wrong_identity");
    assert_eq!(server, Err(rustls::Error::AlertReceived(alert)));
    let mut open = ClientConfig::clone(&foreign.connector(Expects::Anyone));
    open.dangerous()
        .set_certificate_verifier(Arc::new(common::TakesAll));
    let (client, server) = handshake(Arc::new(open), pair.server.acceptor());
    let refusal = refused(&server);
    assert_eq!(
        refusal,
        Refusal::WrongIdentity {
            found: foreign.identity().to_string(),
            wanted: format!("an identity of {DOMAIN}"),
        }
    );
    assert_eq!(client, Err(rustls::Error::AlertReceived(alert)));
}

/// Files that this crate would not load as its own, so rustls alone makes the bad end.
fn bad_end(ca: &Ca, wanted: &Wanted) -> (Arc<ClientConfig>, Arc<rustls::ServerConfig>) {
    use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let (certificate, key) = ca.issue(wanted);
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(common::TakesAll))
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .expect("a client");
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a server");
    (Arc::new(client), Arc::new(server))
}

fn refused_as_bad(wanted: &Wanted, why: &str, as_client: bool, as_server: bool) {
    let pair = pair();
    let (bad_client, bad_server) = bad_end(&pair.ca, wanted);
    let alert = AlertDescription::BadCertificate;
    if as_client {
        let (client, server) = handshake(bad_client, pair.server.acceptor());
        let refusal = refused(&server);
        assert_eq!(refusal.word(), "bad_certificate");
        assert!(refusal.to_string().contains(why), "{refusal}");
        assert_eq!(client, Err(rustls::Error::AlertReceived(alert)));
        assert_eq!(refused(&client).word(), "bad_certificate");
    }
    if as_server {
        let (client, server) = handshake(pair.agent.connector(Expects::Anyone), bad_server);
        let refusal = refused(&client);
        assert_eq!(refusal.word(), "bad_certificate");
        assert!(refusal.to_string().contains(why), "{refusal}");
        assert_eq!(server, Err(rustls::Error::AlertReceived(alert)));
    }
}

#[test]
fn a_certificate_names_exactly_one_identity() {
    let mut wanted = Wanted::new(&uri("agent", "host-a"));
    wanted.uris.push(uri("server", "main"));
    refused_as_bad(&wanted, "2 URIs", true, true);
    wanted.uris = vec![uri("agent", "host-a"), "https://example.org/".to_owned()];
    refused_as_bad(&wanted, "2 URIs", true, true);
    wanted.uris.clear();
    refused_as_bad(&wanted, "0 URIs", true, true);
}

#[test]
fn a_certificate_serves_its_purpose_only() {
    let mut wanted = Wanted::new(&uri("user", "ann"));
    wanted.purposes = vec![ExtendedKeyUsagePurpose::ClientAuth];
    refused_as_bad(&wanted, "purpose", false, true);
    wanted.purposes = vec![ExtendedKeyUsagePurpose::ServerAuth];
    refused_as_bad(&wanted, "purpose", true, false);
    wanted.purposes = vec![ExtendedKeyUsagePurpose::CodeSigning];
    refused_as_bad(&wanted, "purpose", true, true);

    let pair = pair();
    wanted.purposes = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let ann = pair.ca.wanted(pair.dir.path(), &wanted);
    let ends = handshake(ann.connector(Expects::Anyone), pair.server.acceptor());
    assert_eq!(ends, (Ok(()), Ok(())));
    assert!(pair.server.judge(&chain_of(&ann), &Expects::Anyone).is_ok());
}

#[test]
fn an_identity_that_is_none_of_slats_is_refused() {
    let pair = pair();
    let (bad, _) = bad_end(&pair.ca, &Wanted::new("spiffe://example.org/ns/a/sa/b"));
    let (_, server) = handshake(bad, pair.server.acceptor());
    let refusal = refused(&server).to_string();
    assert!(
        refusal.contains("spiffe://example.org/ns/a/sa/b"),
        "{refusal}"
    );
}

#[test]
fn intermediates_are_followed() {
    let pair = pair();
    let middle = pair.ca.intermediate("middle");
    let (certificate, key) = middle.issue(&Wanted::new(&uri("agent", "host-b")));
    let dir = pair.dir.path().join("b");
    std::fs::create_dir(&dir).expect("a directory");
    common::write_set(&dir, &pair.ca.pem, &(certificate + &middle.pem), &key);
    let agent = Credentials::load(&dir).expect("credentials");
    assert_eq!(agent.trouble(), None);
    let ends = handshake(agent.connector(Expects::Anyone), pair.server.acceptor());
    assert_eq!(ends, (Ok(()), Ok(())));
}

#[test]
fn tls12_is_refused() {
    // The record of a ClientHello of TLS 1.2, as OpenSSL 3 writes it with -tls1_2.
    let hello = common::tls12_hello();
    let pair = pair();
    let mut server = ServerConnection::new(pair.server.acceptor()).expect("a server");
    server.read_tls(&mut &*hello).expect("memory");
    let error = server.process_new_packets().expect_err("refused");
    assert_eq!(Refusal::of(&error), Some(Refusal::Version));
    let mut said = Vec::new();
    while server.wants_write() {
        server.write_tls(&mut said).expect("memory");
    }
    // A fatal alert, protocol_version.
    assert_eq!(said.first(), Some(&21));
    assert_eq!(said.get(5..), Some(&[2, 70][..]));
    assert_eq!(
        Refusal::told_by_peer(AlertDescription::from(70)),
        Some(Refusal::Version)
    );
}

#[test]
fn a_server_of_tls12_is_refused() {
    let pair = pair();
    let name = ServerName::try_from("any.name").expect("a name");
    let config = pair.agent.connector(Expects::Anyone);
    let mut client = ClientConnection::new(config, name).expect("a client");
    client
        .read_tls(&mut &*common::tls12_server_hello())
        .expect("memory");
    let error = client.process_new_packets().expect_err("refused");
    assert_eq!(Refusal::of(&error), Some(Refusal::Version), "{error}");
    // What such a server says when it is the one that refuses.
    let name = ServerName::try_from("any.name").expect("a name");
    let config = pair.agent.connector(Expects::Anyone);
    let mut client = ClientConnection::new(config, name).expect("a client");
    client
        .read_tls(&mut &[21, 3, 3, 0, 2, 2, 70][..])
        .expect("memory");
    let error = client.process_new_packets().expect_err("refused");
    assert_eq!(Refusal::of(&error), Some(Refusal::Version), "{error}");
}

#[test]
fn a_refusal_is_found_in_what_wraps_it() {
    #[derive(Debug, thiserror::Error)]
    #[error("a call failed")]
    struct Call(#[source] std::io::Error);

    let alert = rustls::Error::AlertReceived(AlertDescription::CertificateRevoked);
    let call = Call(std::io::Error::other(std::io::Error::other(alert)));
    assert_eq!(Refusal::of_chain(&call), Some(Refusal::Revoked));
    let own = Call(std::io::Error::other(Refusal::NotTls));
    assert_eq!(Refusal::of_chain(&own), Some(Refusal::NotTls));
    for other in [
        std::io::Error::from(std::io::ErrorKind::ConnectionReset),
        std::io::Error::other("the end"),
        std::io::Error::other(rustls::Error::HandshakeNotComplete),
        std::io::Error::other(rustls::Error::AlertReceived(AlertDescription::CloseNotify)),
    ] {
        assert_eq!(Refusal::of_io(&other), None, "{other}");
        assert_eq!(Refusal::of_chain(&Call(other)), None);
    }
}

#[test]
fn what_is_no_tls_is_refused() {
    let pair = pair();
    for bytes in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"[..],
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ] {
        let mut server = ServerConnection::new(pair.server.acceptor()).expect("a server");
        server.read_tls(&mut &*bytes).expect("memory");
        let error = server.process_new_packets().expect_err("refused");
        assert_eq!(Refusal::of(&error), Some(Refusal::NotTls), "{error}");
    }
    for bytes in [
        &b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\x40\0"[..],
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ] {
        let name = ServerName::try_from("any.name").expect("a name");
        let config = pair.agent.connector(Expects::Anyone);
        let mut client = ClientConnection::new(config, name).expect("a client");
        client.read_tls(&mut &*bytes).expect("memory");
        let error = client.process_new_packets().expect_err("refused");
        assert_eq!(Refusal::of(&error), Some(Refusal::NotTls), "{error}");
        let error = std::io::Error::other(std::io::Error::other(error));
        assert_eq!(Refusal::of_io(&error), Some(Refusal::NotTls));
    }
}
