//! A process whose descriptor table is full: calls say so, and the endpoint goes on when there are
//! descriptors again. A process of its own, for the limit is the whole process's.

use std::{fs::File, time::Duration};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use slat_proto::{
    ApiError, Reason,
    transport::{Endpoint, TracedChannel, connect},
};
use tokio::{net::TcpListener, time::timeout};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const LONG: Duration = Duration::from_secs(30);

async fn check(channel: TracedChannel) -> Result<(), ApiError> {
    let mut health = HealthClient::new(channel);
    let answer = timeout(LONG, health.check(HealthCheckRequest::default())).await;
    answer.unwrap().map(drop).map_err(ApiError::from)
}

#[tokio::test]
async fn a_full_table_is_named_and_passes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::new().serve_tcp(listener).await.unwrap();
    let address = endpoint.address().unwrap().to_string().parse().unwrap();
    // Kept: its end would give descriptors back.
    let first = connect(&address).unwrap();
    check(first.clone()).await.unwrap();

    let maximum = getrlimit(Resource::Nofile).maximum;
    let low = Rlimit {
        current: Some(64),
        maximum,
    };
    setrlimit(Resource::Nofile, low).unwrap();
    let mut held: Vec<File> = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        held.push(file);
    }
    // No descriptor for the client's end.
    let error = check(connect(&address).unwrap()).await.unwrap_err();
    assert_eq!(error.reason, Reason::DescriptorsExhausted, "{error}");
    assert!(error.metadata["advice"].contains("LimitNOFILE"));

    // One for the client's end, none for the server's: until another is free.
    held.pop();
    let waiting = tokio::spawn(check(connect(&address).unwrap()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished());
    held.clear();
    waiting.await.unwrap().unwrap();
    drop(first);
    endpoint.stop().await;
}
