//! Connections that say nothing, stop half-way, or are too many.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::rig::{LONG, channel, endpoint, serve};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Reads to the end; how long that took.
async fn closed_after(stream: &mut TcpStream) -> Duration {
    let begun = Instant::now();
    let mut bytes = Vec::new();
    // A reset ends it as well as an end.
    drop(stream.read_to_end(&mut bytes).await);
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_never_asks_is_closed() {
    let served = serve(endpoint()).await;
    let to = served.address().unwrap();
    let with_settings = [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
    for half in [
        &b""[..],
        b"PRI * HT",
        PREFACE,
        &with_settings,
        b"GET /metrics HTTP/1.1\r\nhost: ",
    ] {
        let mut stream = TcpStream::connect(to).await.unwrap();
        stream.write_all(half).await.unwrap();
        let after = closed_after(&mut stream).await;
        let text = String::from_utf8_lossy(half);
        assert!(after >= Duration::from_secs(9), "{text}: {after:?}");
        assert!(after <= Duration::from_secs(20), "{text}: {after:?}");
    }
    served.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_asks_no_more_is_closed() {
    let served = serve(endpoint()).await;
    let mut stream = TcpStream::connect(served.address().unwrap()).await.unwrap();
    let ask = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    stream.write_all(ask).await.unwrap();
    let after = closed_after(&mut stream).await;
    assert!(after >= Duration::from_secs(30), "{after:?}");
    assert!(after <= Duration::from_secs(310), "{after:?}");
    served.stop().await;
}

#[tokio::test]
async fn a_connection_too_many_takes_the_place_of_an_idle_one() {
    let served = serve(endpoint().max_connections(2)).await;
    let to = served.address().unwrap();
    let mut first = TcpStream::connect(to).await.unwrap();
    let mut health = HealthClient::new(channel(&served));
    // Whoever has a request running keeps its place.
    let watch = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut watch = watch.into_inner();
    watch.message().await.unwrap();
    let mut second = HealthClient::new(channel(&served));
    timeout(LONG, second.check(HealthCheckRequest::default()))
        .await
        .unwrap()
        .unwrap();
    let closed = timeout(LONG, closed_after(&mut first)).await;
    assert!(closed.is_ok(), "the silent one is still there");

    // Two with requests running: no place for a third.
    let held = second.watch(HealthCheckRequest::default()).await.unwrap();
    let mut third = TcpStream::connect(to).await.unwrap();
    assert!(timeout(LONG, closed_after(&mut third)).await.is_ok());
    drop((watch, held));
    served.stop().await;
}
