//! The page before a large fleet: 2,000 VMs on 200 hosts, made by fake agents that register and
//! report like any other, with migrations in every phase.
//!
//! `cargo test -p slat-server --test crowd -- --ignored look --nocapture` keeps it up for looking,
//! for `SLAT_LOOK_SECONDS` (600) at `SLAT_LOOK_LISTEN` (127.0.0.1:7499).

mod browser;
mod fleet;
#[path = "../support/mod.rs"]
mod support;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use fleet::Crowd;

/// The body of a GET, and how long it took.
async fn get(server: SocketAddr, path: &str) -> (String, Duration) {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(server).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
    (body.to_owned(), begun.elapsed())
}

async fn json(server: SocketAddr, path: &str) -> Value {
    serde_json::from_str(&get(server, path).await.0).unwrap()
}

/// Waits until an answer is as wanted, without keeping the server busy with asking.
async fn until(server: SocketAddr, path: &str, wanted: impl Fn(&Value) -> bool) {
    let asked = async {
        while !wanted(&json(server, path).await) {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(120), asked).await;
    assert!(waited.is_ok(), "{path} is never as wanted");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_bounded_and_the_busiest_of_two_thousand_is_in_it() {
    let mut crowd = Crowd::start("127.0.0.1:0").await;
    crowd.join(0..200).await;
    let at = crowd.address();
    // Rates need two reports of every host.
    until(at, "/api/rates?of=vms&rate=faults", |found| {
        found["total"] == 2000
    })
    .await;

    let busiest = json(at, "/api/rates?of=vms&rate=faults&window=60").await;
    assert_eq!(busiest["lines"][0]["name"], fleet::BUSIEST);
    assert_eq!(
        (busiest["more"].as_u64(), &busiest["unit"]),
        (Some(1990), &"faults/s".into())
    );
    let hosts = json(at, "/api/rates?of=hosts&rate=faults").await;
    assert_eq!(hosts["lines"][0]["name"], fleet::BUSIEST_HOST);
    assert_eq!(hosts["more"], 190);
    // Not only the VMs that come first by name or by age.
    let list = json(at, "/api/vms?sort=faults&limit=1").await;
    assert_eq!(list["rows"][0]["name"], fleet::BUSIEST);
    assert_eq!(list["matched"], 2000);
    let found = json(at, "/api/vms?q=h150").await;
    assert_eq!(
        (&found["matched"], found["rows"].as_array().unwrap().len()),
        (&10.into(), 10)
    );

    for path in [
        "/api/state",
        "/api/rates?of=vms&rate=faults&top=100000",
        "/api/rates?of=hosts&rate=flushes&top=100000",
        "/api/vms?limit=100000",
        "/api/hosts?limit=100000",
        "/api/migrations?limit=100000",
    ] {
        let (body, took) = get(at, path).await;
        println!("{path}: {} bytes in {took:?}", body.len());
        assert!(body.len() < 200_000, "{path}: {} bytes", body.len());
    }
    crowd.stop().await;
}

/// No check: the page of a large fleet, to be opened in a browser by hand. It ends after
/// `SLAT_LOOK_SECONDS`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "serves until its time is up, for looking"]
async fn look() {
    let listen = std::env::var("SLAT_LOOK_LISTEN").unwrap_or("127.0.0.1:7499".into());
    let seconds = std::env::var("SLAT_LOOK_SECONDS").map_or(600, |text| text.parse().unwrap());
    let mut crowd = Crowd::start(&listen).await;
    crowd.migrations().await;
    crowd.join((0..200).filter(|host| *host != 180)).await;
    println!("http://{}/", crowd.address());
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    crowd.stop().await;
}
