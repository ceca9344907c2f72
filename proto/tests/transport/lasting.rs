//! Connections that last while certificates, lists and roles change, and connections that are too
//! many.

use std::time::{Duration, Instant};

use slat_proto::{
    ApiError, Reason,
    transport::{Access, Link, Permit, Role, Scope, TracedChannel, Users, connect_by},
    v1::{self, host_service_client::HostServiceClient},
};
use slat_trust::{Kind, pki::Validity};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tonic::Streaming;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};

use crate::{
    rig::{LONG, endpoint},
    secure::{End, Pki, check, open_to_all, page},
};

/// How often a peer is judged again, at the least.
const LOOK: Duration = Duration::from_secs(2);

fn secure(link: Link, access: &Access) -> End {
    End::serve(endpoint().gate(link, access.clone()))
}

/// A call whose answer goes on, over a connection of its own.
async fn watch(end: &End, link: &Link) -> (TracedChannel, Streaming<HealthCheckResponse>) {
    let channel = connect_by(&end.address, link).unwrap();
    let asked = HealthClient::new(channel.clone());
    let answer = asked.clone().watch(HealthCheckRequest::default()).await;
    let mut watch = answer.unwrap().into_inner();
    watch.message().await.unwrap();
    (channel, watch)
}

async fn again(channel: &TracedChannel) -> Result<(), ApiError> {
    let mut asked = HealthClient::new(channel.clone());
    let answer = timeout(LONG, asked.check(HealthCheckRequest::default())).await;
    answer.unwrap().map(drop).map_err(ApiError::from)
}

/// The end of a stream that was cut off.
async fn cut(watch: &mut Streaming<HealthCheckResponse>) -> ApiError {
    let said = timeout(LONG, watch.message()).await.unwrap();
    said.unwrap_err().into()
}

#[tokio::test]
async fn whoever_is_revoked_loses_the_connection_that_it_has() {
    let pki = Pki::new("example.org");
    let (server, agent) = (
        pki.issue(Kind::Server, "main"),
        pki.issue(Kind::Agent, "host-a"),
    );
    // There is room for one.
    let endpoint = endpoint().max_connections(1);
    let end = End::serve(endpoint.gate(open_to_all(&server), Access::default()));
    let (channel, mut stream) = watch(&end, &open_to_all(&agent)).await;
    pki.revoke("agent/host-a", &[&server]);
    cut(&mut stream).await;
    let error = again(&channel).await.unwrap_err();
    assert_eq!(error.reason, Reason::CertificateRevoked, "{error:?}");
    end.audits(|line| {
        let said = |field: &str| line.get(field).map_or("", String::as_str);
        said("cause") == "revoked"
            && said("peer") == "spiffe://example.org/slat/agent/host-a"
            && said("address").starts_with("127.0.0.1:")
    })
    .await;
    // The accepting end has room again: its own end of that connection is gone.
    let other = pki.issue(Kind::Agent, "host-b");
    let (_channel, _stream) = watch(&end, &open_to_all(&other)).await;
}

#[tokio::test]
async fn a_caller_ends_what_it_has_with_one_who_is_revoked() {
    let pki = Pki::new("example.org");
    let (server, agent) = (
        pki.issue(Kind::Server, "main"),
        pki.issue(Kind::Agent, "host-a"),
    );
    // Issued before: with the list as it was.
    let other = pki.issue(Kind::Agent, "host-b");
    let endpoint = endpoint().max_connections(1);
    let end = End::serve(endpoint.gate(open_to_all(&server), Access::default()));
    let (channel, mut stream) = watch(&end, &open_to_all(&agent)).await;
    pki.revoke("server/main", &[&agent]);
    let error = cut(&mut stream).await;
    assert!(error.message.contains("revoked"), "{error:?}");
    let error = again(&channel).await.unwrap_err();
    assert_eq!(error.reason, Reason::CertificateRevoked, "{error:?}");
    // Who has not heard of it takes the one place.
    let until = Instant::now() + LONG;
    while let Err(error) = check(&end, &open_to_all(&other)).await {
        assert!(Instant::now() < until, "{error:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_certificate_that_ends_takes_its_connection_along() {
    let pki = Pki::new("example.org");
    let server = pki.issue(Kind::Server, "main");
    let end = secure(open_to_all(&server), &Access::default());
    let agent = pki.agent_within(-60, 10);
    let (channel, mut stream) = watch(&end, &open_to_all(&agent)).await;
    again(&channel).await.unwrap();
    cut(&mut stream).await;
    let error = again(&channel).await.unwrap_err();
    assert_eq!(error.reason, Reason::CertificateExpired, "{error:?}");
    end.audits(|line| line.get("cause").is_some_and(|cause| cause == "expired"))
        .await;
}

#[tokio::test]
async fn a_renewal_drops_nothing_and_counts_for_the_next_connection() {
    let pki = Pki::new("example.org");
    let (server, of_server) = pki.issue_for(Kind::Server, "main", None);
    let (agent, of_agent) = pki.issue_for(Kind::Agent, "host-a", None);
    let end = secure(open_to_all(&server), &Access::default());
    let (channel, mut stream) = watch(&end, &open_to_all(&agent)).await;
    for credentials in [&server, &agent] {
        let validity = Validity::usual(Kind::Agent).unwrap();
        pki.ca.renew(credentials.dir(), Some(validity)).unwrap();
        assert!(credentials.refresh().unwrap());
        assert_eq!(credentials.generation(), 2);
    }
    // Both ends judge again meanwhile, and say nothing.
    let quiet = timeout(2 * LOOK, stream.message()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    let trouble = ApiError::new(Reason::VmState, "it stops");
    end.health.not_serving(trouble).await;
    let told = timeout(LONG, stream.message()).await.unwrap();
    assert!(told.unwrap().is_some(), "the stream goes on");
    assert_eq!(end.audited(), Vec::default());
    // What was replaced is revoked: the old connection ends, and the next one has the new ones.
    pki.revoke(&of_agent.serial, &[&server]);
    cut(&mut stream).await;
    again(&channel).await.unwrap();
    pki.revoke(&of_server.serial, &[&agent]);
    check(&end, &open_to_all(&agent)).await.unwrap();
}

/// Reads to the end, however it comes.
async fn closed(stream: &mut TcpStream) {
    let mut bytes = Vec::new();
    let read = timeout(LONG, stream.read_to_end(&mut bytes)).await;
    assert!(read.is_ok(), "it is still open");
}

#[tokio::test]
async fn a_silent_handshake_has_a_place_and_loses_it() {
    let pki = Pki::new("example.org");
    let (server, agent) = (
        pki.issue(Kind::Server, "main"),
        pki.issue(Kind::Agent, "host-a"),
    );
    let endpoint = endpoint().max_connections(2);
    let end = End::serve(endpoint.gate(open_to_all(&server), Access::default()));
    // Alone it is closed when its time is over.
    let mut silent = end.tcp().await;
    let mut half = end.tcp().await;
    half.write_all(&[0x16, 3, 1, 2, 0, 1]).await.unwrap();
    let begun = Instant::now();
    closed(&mut silent).await;
    closed(&mut half).await;
    assert!(begun.elapsed() >= Duration::from_secs(3), "too soon");
    // Where the places are few it makes room for who speaks.
    let (_channel, _stream) = watch(&end, &open_to_all(&agent)).await;
    let mut silent = end.tcp().await;
    let begun = Instant::now();
    let (_channel, _other) = watch(&end, &open_to_all(&agent)).await;
    closed(&mut silent).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "it was evicted");
}

#[tokio::test]
async fn half_open_handshakes_keep_nobody_out() {
    let pki = Pki::new("example.org");
    let (server, agent) = (
        pki.issue(Kind::Server, "main"),
        pki.issue(Kind::Agent, "host-a"),
    );
    let endpoint = endpoint().max_connections(100);
    let end = End::serve(endpoint.gate(open_to_all(&server), Access::default()));
    let mut half = Vec::new();
    for _ in 0..100 {
        let mut stream = end.tcp().await;
        stream.write_all(&[0x16, 3, 1, 2, 0, 1]).await.unwrap();
        half.push(stream);
    }
    let begun = Instant::now();
    check(&end, &open_to_all(&agent)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4), "it had to wait");
}

#[tokio::test]
async fn who_calls_too_often_hears_when_to_call_again() {
    let pki = Pki::new("example.org");
    let server = pki.issue(Kind::Server, "main");
    let end = secure(open_to_all(&server), &Access::default());
    let admin = open_to_all(&pki.issue(Kind::User, "admin"));
    let channel = connect_by(&end.address, &admin).unwrap();
    // A burst is 500 and 100 more come each second: this many at once are too many.
    let mut refused = None;
    let until = Instant::now() + LONG;
    while refused.is_none() {
        assert!(Instant::now() < until, "nobody is refused");
        let mut calls = JoinSet::new();
        for _ in 0..400 {
            let mut hosts = HostServiceClient::new(channel.clone());
            calls.spawn(async move { hosts.list_hosts(v1::ListHostsRequest::default()).await });
        }
        for answer in calls.join_all().await {
            let error = ApiError::from(answer.unwrap_err());
            match error.reason {
                Reason::RateLimited => refused = Some(error),
                reason => assert_eq!(reason, Reason::NoSuchMethod, "{error:?}"),
            }
        }
    }
    let refused = refused.unwrap();
    let wait: u64 = refused.metadata["retry_after_ms"].parse().unwrap();
    assert!((1..=20).contains(&wait), "{refused:?}");
    assert_eq!(
        refused.metadata["identity"],
        "spiffe://example.org/slat/user/admin"
    );
    // Another one's calls are its own.
    let agent = pki.issue(Kind::Agent, "host-a");
    check(&end, &open_to_all(&agent)).await.unwrap();
}

#[tokio::test]
async fn one_identity_has_so_many_connections() {
    let pki = Pki::new("example.org");
    let server = pki.issue(Kind::Server, "main");
    let end = secure(open_to_all(&server), &Access::default());
    let agent = open_to_all(&pki.issue(Kind::Agent, "host-a"));
    let mut held = Vec::new();
    for _ in 0..16 {
        held.push(watch(&end, &agent).await);
    }
    let error = check(&end, &agent).await.unwrap_err();
    assert_eq!(error.reason, Reason::PeerUnreachable, "{error:?}");
    let is_it = |line: &std::collections::BTreeMap<String, String>| {
        line["result"] == "RATE_LIMITED" && line["peer"] == "spiffe://example.org/slat/agent/host-a"
    };
    end.audits(is_it).await;
    let other = open_to_all(&pki.issue(Kind::Agent, "host-b"));
    check(&end, &other).await.unwrap();
    // A place that is given back is there for the next one.
    held.pop();
    let until = Instant::now() + LONG;
    while let Err(error) = check(&end, &agent).await {
        assert!(Instant::now() < until, "{error:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_role_that_changes_counts_on_an_open_connection() {
    let pki = Pki::new("example.org");
    let server = pki.issue(Kind::Server, "main");
    let access = Access::default();
    let end = secure(open_to_all(&server), &access);
    let bob = pki.issue(Kind::User, "bob");
    let (channel, mut stream) = watch(&end, &open_to_all(&bob)).await;
    // The endpoint serves no such service: whoever may call hears that.
    let calls = async |channel: &TracedChannel| {
        let mut hosts = HostServiceClient::new(channel.clone());
        let looks = hosts.list_hosts(v1::ListHostsRequest::default()).await;
        let works = hosts.cordon_host(v1::CordonHostRequest::default()).await;
        let reason = |status: tonic::Status| ApiError::from(status).reason;
        (reason(looks.unwrap_err()), reason(works.unwrap_err()))
    };
    let (no, passes) = (Reason::Permission, Reason::NoSuchMethod);
    for (role, expected) in [
        (None, (no, no)),
        (Some(Role::Viewer), (passes, no)),
        (Some(Role::Admin), (passes, passes)),
        (Some(Role::Operator), (passes, no)),
        (None, (no, no)),
    ] {
        let users = role.map(|role| ("bob".to_owned(), Permit::of(role)));
        access.set_users(users.into_iter().collect::<Users>());
        assert_eq!(calls(&channel).await, expected, "{role:?}");
    }
    // It was one connection all the time.
    let trouble = ApiError::new(Reason::VmState, "it stops");
    end.health.not_serving(trouble).await;
    let told = timeout(LONG, stream.message()).await.unwrap();
    assert!(told.unwrap().is_some());
    let lines = end.stop();
    let roles: Vec<_> = lines.iter().map(|line| line["role"].as_str()).collect();
    let expected = [
        "none", "none", "viewer", "viewer", "admin", "admin", "operator", "operator", "none",
        "none",
    ];
    assert_eq!(roles, expected);
}

#[tokio::test]
async fn pages_are_for_those_who_may_look() {
    let pki = Pki::new("example.org");
    let server = pki.issue(Kind::Server, "main");
    let access = Access::default();
    let viewer = [("vera".to_owned(), Permit::of(Role::Viewer))];
    access.set_users(viewer.into_iter().collect());
    let pages = axum::Router::new()
        .route("/", axum::routing::get(|| async { "the page\n" }))
        .route("/metrics", axum::routing::get(|| async { "up 1\n" }));
    let endpoint = endpoint().http(pages);
    let end = End::serve(endpoint.gate(open_to_all(&server), access));
    let (vera, nobody, agent) = (
        pki.issue(Kind::User, "vera"),
        pki.issue(Kind::User, "nobody"),
        pki.issue(Kind::Agent, "host-a"),
    );
    let (ok, no) = ("HTTP/1.1 200 OK", "HTTP/1.1 403 Forbidden");
    for (caller, path, expected) in [
        (&vera, "/healthz", ok),
        (&agent, "/healthz", ok),
        (&nobody, "/healthz", ok),
        (&agent, "/livez", ok),
        (&agent, "/readyz", ok),
        (&vera, "/metrics", ok),
        (&vera, "/", ok),
        (&agent, "/metrics", no),
        (&agent, "/", no),
        (&nobody, "/metrics", no),
        (&nobody, "/", no),
        (&server, "/metrics", ok),
    ] {
        let said = page(&end, caller.dir(), path).await;
        assert_eq!(said, expected, "{path} for {}", caller.identity());
    }
    let refused = end.stop();
    assert_eq!(refused.len(), 4, "{refused:#?}");
    assert!(refused.iter().all(|line| line["result"] == "PERMISSION"));
}

#[tokio::test]
async fn who_is_limited_by_labels_is_sent_to_whom_knows_them() {
    let pki = Pki::new("example.org");
    let server = pki.issue(Kind::Server, "main");
    let access = Access::default();
    let scope = Scope {
        vms: "team=web".parse().unwrap(),
        ..Scope::default()
    };
    let limited = Permit {
        role: Some(Role::Operator),
        scope,
    };
    access.set_users([("bob".to_owned(), limited)].into_iter().collect());
    let pages = || {
        let page = axum::routing::get(|| async { "up 1\n" });
        axum::Router::new().route("/metrics", page)
    };
    let bob = pki.issue(Kind::User, "bob");
    for (refuses, reason) in [(true, Reason::Permission), (false, Reason::NoSuchMethod)] {
        let mut endpoint = endpoint().http(pages());
        if refuses {
            endpoint = endpoint.refuses_limited();
        }
        let end = End::serve(endpoint.gate(open_to_all(&server), access.clone()));
        let channel = connect_by(&end.address, &open_to_all(&bob)).unwrap();
        let mut hosts = HostServiceClient::new(channel);
        let looks = hosts.list_hosts(v1::ListHostsRequest::default()).await;
        let error = ApiError::from(looks.unwrap_err());
        assert_eq!(error.reason, reason, "{error:?}");
        if refuses {
            let advice = &error.metadata["advice"];
            assert!(advice.contains("ask the server"), "{error:?}");
        }
        // What shows everything is for nobody who may not see everything.
        let said = page(&end, bob.dir(), "/metrics").await;
        assert_eq!(said, "HTTP/1.1 403 Forbidden");
        check(&end, &open_to_all(&bob)).await.unwrap();
        let said = page(&end, bob.dir(), "/healthz").await;
        assert_eq!(said, "HTTP/1.1 200 OK");
    }
}
