//! A server whose disk fails: what its health says, and that it comes back by itself.

mod deleting;
mod fencing;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    transport::connect,
    v1::{self, fleet_service_client::FleetServiceClient},
};
use tokio::time::timeout;

use crate::{
    Server, ServerConfig,
    store::tests::{EIO, ENOSPC, Fault},
};

const LONG: Duration = Duration::from_secs(30);

async fn get(to: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let ask = move || {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    tokio::task::spawn_blocking(ask).await.unwrap()
}

/// Asks until health says so.
async fn until_health_is(to: SocketAddr, code: &str) -> String {
    let wanted = format!("HTTP/1.1 {code} ");
    let asking = async {
        loop {
            let answer = get(to, "/healthz").await;
            if answer.starts_with(&wanted) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LONG, asking).await.expect("health stays as it is")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_write_does_not_serve_and_comes_back_with_its_disk() {
    let directory = slat_test_dir::TestDir::new();
    let fault = Fault::default();
    let config = ServerConfig {
        credentials: None,
        access: slat_proto::transport::Access::default(),
        listen: "127.0.0.1:0".parse().unwrap(),
        state_dir: directory.path().to_owned(),
        report_interval: Duration::from_secs(1),
        host_silence: None,
        render: None,
        version: "test".to_owned(),
        retention: crate::Retention::default(),
        fence: None,
    };
    let server = Server::start_on(config, fault.open(directory.path()));
    let server = server.await.unwrap();
    let to = server.address();
    let channel = connect(&to.to_string().parse().unwrap()).unwrap();
    let mut fleet = FleetServiceClient::new(channel);
    let host = |name: &str| v1::RegisterHostRequest {
        host: Some(v1::Host {
            name: format!("hosts/{name}"),
            address: "127.0.0.1:1".into(),
            incarnation: "one".into(),
            ..Default::default()
        }),
    };
    fleet.register_host(host("a")).await.unwrap();
    until_health_is(to, "200").await;

    for (errno, reason) in [(ENOSPC, Reason::DiskFull), (EIO, Reason::Store)] {
        fault.set(errno);
        let refused = fleet.register_host(host("b")).await.unwrap_err();
        let error = ApiError::from(refused);
        assert_eq!(error.reason, reason, "{error}");
        let answer = until_health_is(to, "503").await;
        assert!(answer.contains(reason.as_str()), "{answer}");
        // The process itself is well, and what needs no disk goes on.
        assert!(get(to, "/livez").await.starts_with("HTTP/1.1 200 "));

        fault.set(0);
        until_health_is(to, "200").await;
        fleet.register_host(host("b")).await.unwrap();
    }
    server.stop().await;
}
