//! Who is let in and who is not, and what each hears: over real sockets, often enough that no race
//! between an alert and the end of a connection stays unseen.

use std::sync::{Arc, Mutex};

use slat_proto::{
    Reason,
    transport::{Access, Caller, Endpoint, Link, Permit, Role, connect, connect_by},
    v1::{
        self,
        fleet_service_client::FleetServiceClient,
        fleet_service_server::{FleetService, FleetServiceServer},
    },
};
use slat_trust::{Expects, Identity, Kind, Refusal};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};
use tonic::{Request, Response, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    rig::{LONG, endpoint},
    secure::{End, Pki, TIMES, by_hand, check, open_to_all, refused, trust_also},
};

/// An endpoint of this server.
fn secure(link: Link) -> End {
    End::serve(endpoint().gate(link, Access::default()))
}

/// One line a connection, all of this result.
async fn lines(end: End, times: usize, result: &str) {
    // The last caller may have heard it before the line is written.
    end.audits_so_many(times).await;
    let lines = end.stop();
    assert_eq!(lines.len(), times, "{lines:#?}");
    for line in lines {
        assert_eq!(line["result"], result, "{line:?}");
        assert!(line["peer"].starts_with("127.0.0.1:"), "{line:?}");
    }
}

/// Keeps who called.
#[derive(Clone, Default)]
struct Keeps(Arc<Mutex<Vec<(Caller, Permit)>>>);

impl Keeps {
    fn keep<T>(&self, request: &Request<T>) {
        let (caller, permit) = (request.extensions().get(), request.extensions().get());
        let kept: (&Caller, &Permit) = (caller.unwrap(), permit.unwrap());
        self.0
            .lock()
            .unwrap()
            .push((kept.0.clone(), kept.1.clone()));
    }
}

#[tonic::async_trait]
impl FleetService for Keeps {
    async fn register_host(
        &self,
        request: Request<v1::RegisterHostRequest>,
    ) -> Result<Response<v1::RegisterHostResponse>, Status> {
        self.keep(&request);
        Ok(Response::new(v1::RegisterHostResponse::default()))
    }

    async fn report_host(
        &self,
        request: Request<v1::ReportHostRequest>,
    ) -> Result<Response<v1::ReportHostResponse>, Status> {
        self.keep(&request);
        Ok(Response::new(v1::ReportHostResponse::default()))
    }
}

#[tokio::test]
async fn a_good_caller_is_known_to_the_service() {
    let pki = Pki::new("example.org");
    let (server, agent) = (
        pki.issue(Kind::Server, "main"),
        pki.issue(Kind::Agent, "host-a"),
    );
    let keeps = Keeps::default();
    let endpoint = Endpoint::new()
        .service(FleetServiceServer::new(keeps.clone()))
        .gate(open_to_all(&server), Access::default());
    let end = End::serve(endpoint);
    for expects in [
        Expects::Anyone,
        Expects::Kinds(&[Kind::Server]),
        Expects::Named(Kind::Server, "main".to_owned()),
        Expects::Exactly(server.identity()),
    ] {
        let channel = connect_by(&end.address, &Link::new(Some(&agent), expects)).unwrap();
        let request = v1::RegisterHostRequest::default();
        let mut fleet = FleetServiceClient::new(channel);
        timeout(LONG, fleet.register_host(request))
            .await
            .unwrap()
            .unwrap();
    }
    let calls = keeps.0.lock().unwrap().clone();
    assert_eq!(calls.len(), 4);
    for (caller, permit) in calls {
        let identity = "spiffe://example.org/slat/agent/host-a";
        assert_eq!(caller.identity.as_deref(), Some(identity));
        assert_eq!(caller.agent(), Some("host-a"));
        assert!(caller.peer.starts_with("127.0.0.1:"), "{caller:?}");
        assert_eq!(permit, Permit::of(Role::Agent));
    }
    let lines = end.stop();
    assert_eq!(lines.len(), 4, "{lines:#?}");
    for line in lines {
        assert_eq!(line["role"], "agent");
        assert_eq!(line["result"], "OK");
        assert_eq!(line["method"], "slat.v1.FleetService/RegisterHost");
    }
}

#[tokio::test]
async fn a_caller_out_of_its_time_or_by_another_ca_hears_why() {
    let pki = Pki::new("example.org");
    let server = pki.issue(Kind::Server, "main");
    for (begins, ends, reason) in [
        (-240, -120, Reason::CertificateExpired),
        (3600, 7200, Reason::CertificateNotYetValid),
    ] {
        let caller = pki.agent_within(begins, ends);
        let end = secure(open_to_all(&server));
        let error = refused(&end, &open_to_all(&caller), reason).await;
        let address = end.address.to_string();
        assert_eq!(error.metadata["address"], address, "{error:?}");
        assert!(error.message.contains("of this caller"), "{error:?}");
        lines(end, TIMES, reason.as_str()).await;
    }
    // The caller trusts the server, the server does not trust the caller.
    let other = Pki::new("example.org");
    let caller = other.issue(Kind::Agent, "host-a");
    trust_also(&caller, &server);
    let end = secure(open_to_all(&server));
    let reason = Reason::CertificateUnknownCa;
    let error = refused(&end, &open_to_all(&caller), reason).await;
    assert!(error.message.contains("of this caller"), "{error:?}");
    lines(end, TIMES, reason.as_str()).await;
}

#[tokio::test]
async fn a_revoked_caller_hears_so() {
    let pki = Pki::new("example.org");
    let (server, agent) = (
        pki.issue(Kind::Server, "main"),
        pki.issue(Kind::Agent, "host-a"),
    );
    let end = secure(open_to_all(&server));
    check(&end, &open_to_all(&agent)).await.unwrap();
    pki.revoke("agent/host-a", &[&server]);
    let reason = Reason::CertificateRevoked;
    refused(&end, &open_to_all(&agent), reason).await;
    // Whom nobody revoked is let in as before.
    let other = pki.issue(Kind::Agent, "host-b");
    check(&end, &open_to_all(&other)).await.unwrap();
    lines(end, TIMES, reason.as_str()).await;
}

#[tokio::test]
async fn a_caller_without_a_certificate_hears_so() {
    let pki = Pki::new("example.org");
    let server = pki.issue(Kind::Server, "main");
    let end = secure(open_to_all(&server));
    for attempt in 0..TIMES {
        let said = match by_hand(&end, None, b"h2").await {
            Ok(mut stream) => {
                let mut byte = [0];
                timeout(LONG, stream.read(&mut byte)).await.unwrap()
            }
            Err(error) => Err(error),
        };
        let error = said.unwrap_err();
        let refusal = Refusal::of_io(&error);
        assert_eq!(
            refusal,
            Some(Refusal::NoCertificate),
            "attempt {attempt}: {error}"
        );
    }
    lines(end, TIMES, Reason::CertificateRequired.as_str()).await;
}

#[tokio::test]
async fn an_accepting_end_that_is_another_or_bad_is_not_spoken_to() {
    let pki = Pki::new("example.org");
    let agent = pki.issue(Kind::Agent, "host-a");
    let caller = pki.issue(Kind::Server, "main");
    let exactly: Identity = "spiffe://example.org/slat/agent/host-b".parse().unwrap();
    for expects in [
        Expects::Kinds(&[Kind::Server]),
        Expects::Named(Kind::Agent, "host-b".to_owned()),
        Expects::Named(Kind::User, "host-a".to_owned()),
        Expects::Exactly(exactly),
    ] {
        let end = secure(open_to_all(&agent));
        let link = Link::new(Some(&caller), expects.clone());
        let error = refused(&end, &link, Reason::IdentityWrong).await;
        let found = "spiffe://example.org/slat/agent/host-a";
        assert_eq!(error.metadata["found"], found, "{expects:?}: {error:?}");
        lines(end, TIMES, "IDENTITY_WRONG").await;
    }
    for (begins, ends, reason) in [
        (-240, -120, Reason::CertificateExpired),
        (3600, 7200, Reason::CertificateNotYetValid),
    ] {
        let end = secure(open_to_all(&pki.agent_within(begins, ends)));
        let error = refused(&end, &open_to_all(&caller), reason).await;
        assert!(error.message.contains("shown there"), "{error:?}");
        lines(end, TIMES, reason.as_str()).await;
    }
    let end = secure(open_to_all(&agent));
    pki.revoke("agent/host-a", &[&caller]);
    refused(&end, &open_to_all(&caller), Reason::CertificateRevoked).await;
    lines(end, TIMES, "CERTIFICATE_REVOKED").await;
    let foreign = Pki::new("example.org").issue(Kind::Agent, "host-a");
    let end = secure(open_to_all(&foreign));
    refused(&end, &open_to_all(&caller), Reason::CertificateUnknownCa).await;
    lines(end, TIMES, "CERTIFICATE_UNKNOWN_CA").await;
}

#[tokio::test]
async fn another_domain_is_another_world_even_where_its_ca_is_trusted() {
    let (pki, other) = (Pki::new("example.org"), Pki::new("example.net"));
    let server = pki.issue(Kind::Server, "main");
    let caller = other.issue(Kind::Agent, "host-a");
    trust_also(&server, &caller);
    trust_also(&caller, &server);
    let end = secure(open_to_all(&server));
    refused(&end, &open_to_all(&caller), Reason::IdentityWrong).await;
    lines(end, TIMES, "IDENTITY_WRONG").await;
    // A caller that takes any server is refused by the server.
    let end = secure(open_to_all(&server));
    for attempt in 0..TIMES {
        let said = match by_hand(&end, Some(caller.dir()), b"h2").await {
            Ok(mut stream) => {
                let mut byte = [0];
                timeout(LONG, stream.read(&mut byte)).await.unwrap()
            }
            Err(error) => Err(error),
        };
        let refusal = Refusal::of_io(&said.unwrap_err()).unwrap();
        assert_eq!(refusal.word(), "wrong_identity", "attempt {attempt}");
    }
    lines(end, TIMES, "IDENTITY_WRONG").await;
}

#[tokio::test]
async fn who_speaks_in_the_clear_to_tls_hears_so_in_its_own_words() {
    let pki = Pki::new("example.org");
    let end = secure(open_to_all(&pki.issue(Kind::Server, "main")));
    for attempt in 0..TIMES {
        let channel = connect(&end.address).unwrap();
        let asked = HealthClient::new(channel)
            .check(HealthCheckRequest::default())
            .await;
        let error = slat_proto::ApiError::from(asked.unwrap_err());
        assert_eq!(
            error.reason,
            Reason::TlsRequired,
            "attempt {attempt}: {error:?}"
        );
    }
    lines(end, TIMES, "TLS_REQUIRED").await;
    let end = secure(open_to_all(&pki.issue(Kind::Server, "main")));
    for attempt in 0..TIMES {
        let mut stream = end.tcp().await;
        let ask =
            b"POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\nwhat is more is here";
        stream.write_all(ask).await.unwrap();
        let mut answer = Vec::new();
        let read = timeout(LONG, stream.read_to_end(&mut answer))
            .await
            .unwrap();
        read.unwrap_or_else(|error| panic!("attempt {attempt}: {error}"));
        let answer = String::from_utf8(answer).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 426 "),
            "attempt {attempt}: {answer}"
        );
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            answer.contains(&format!("Content-Length: {}\r\n", body.len())),
            "{answer}"
        );
    }
    lines(end, TIMES, "TLS_REQUIRED").await;
}

#[tokio::test]
async fn who_speaks_tls_to_an_end_without_hears_so() {
    let pki = Pki::new("example.org");
    let end = secure(Link::Plain);
    let caller = pki.issue(Kind::User, "admin");
    refused(&end, &open_to_all(&caller), Reason::TlsUnexpected).await;
    let lines = end.stop();
    assert!(lines.is_empty(), "{lines:#?}");
}

/// A hello of TLS 1.2, as clients sent it.
fn hello_of_1_2() -> Vec<u8> {
    let extensions = [
        &[0, 10, 0, 4, 0, 2, 0, 23][..], // the group secp256r1
        &[0, 13, 0, 4, 0, 2, 4, 3],      // ECDSA with SHA-256
    ]
    .concat();
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    hello.extend((extensions.len() as u16).to_be_bytes());
    hello.extend(extensions);
    let mut message = vec![1];
    message.extend(&(hello.len() as u32).to_be_bytes()[1..]);
    message.extend(hello);
    let mut record = vec![0x16, 3, 1];
    record.extend((message.len() as u16).to_be_bytes());
    record.extend(message);
    record
}

#[tokio::test]
async fn who_speaks_an_older_tls_is_told_so() {
    let pki = Pki::new("example.org");
    let end = secure(open_to_all(&pki.issue(Kind::Server, "main")));
    let mut stream = end.tcp().await;
    stream.write_all(&hello_of_1_2()).await.unwrap();
    let mut answer = Vec::new();
    let read = timeout(LONG, stream.read_to_end(&mut answer)).await;
    read.unwrap().unwrap();
    // An alert, fatal: protocol_version.
    assert_eq!(answer.first(), Some(&0x15), "{answer:?}");
    assert!(answer.ends_with(&[2, 70]), "{answer:?}");
    drop(stream);
    lines(end, 1, "TLS_UNEXPECTED").await;
}
