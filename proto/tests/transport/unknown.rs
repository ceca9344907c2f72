//! Paths and methods that nobody serves, and what reflection says is served.

use std::collections::BTreeSet;

use slat_proto::{Reason, transport::Address};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::rig::{address, call_raw, channel, endpoint, framed, serve};

/// The status line of an HTTP/1 answer.
pub(crate) async fn http(to: &Address, request: &str) -> String {
    let mut stream = TcpStream::connect(to.to_string()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
}

#[tokio::test]
async fn unknown_paths_are_404_and_unknown_methods_have_a_reason() {
    let served = serve(endpoint()).await;
    let to = address(&served);
    for path in [
        "/",
        "/nothing",
        "/slat.v1.Nothing/Get",
        "/slat.v1.VmService/GetVm",
    ] {
        let answer = http(&to, &get(path)).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{path}: {answer}");
    }
    let answer = http(&to, &get("/slat.v1.FleetService/ReportHost")).await;
    assert!(answer.starts_with("HTTP/1.1 415 "), "{answer}");
    for path in [
        "/slat.v1.FleetService/Nothing",
        "/slat.v1.VmService/GetVm",
        "/other.Package/Method",
    ] {
        let error = call_raw(&to, path, framed(&[])).await.unwrap_err();
        assert_eq!(error.reason, Reason::NoSuchMethod, "{path}");
        assert_eq!(error.metadata["method"], path);
    }
    served.stop().await;
}

#[tokio::test]
async fn health_is_said_over_http_and_turned_by_its_switch() {
    let served = serve(endpoint()).await;
    let to = address(&served);
    for path in ["/healthz", "/readyz", "/livez"] {
        assert!(http(&to, &get(path)).await.starts_with("HTTP/1.1 200 "));
    }
    let trouble = slat_proto::ApiError::new(Reason::DiskFull, "/state is full");
    served.health().not_serving(trouble).await;
    for path in ["/healthz", "/readyz"] {
        let answer = http(&to, &get(path)).await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.contains("DISK_FULL: /state is full"), "{answer}");
    }
    assert!(http(&to, &get("/livez")).await.starts_with("HTTP/1.1 200 "));
    served.health().serving().await;
    assert!(
        http(&to, &get("/healthz"))
            .await
            .starts_with("HTTP/1.1 200 ")
    );
    served.stop().await;
}

#[tokio::test]
async fn reflection_lists_what_the_endpoint_serves_and_nothing_else() {
    let served = serve(endpoint()).await;
    let mut reflection = ServerReflectionClient::new(channel(&served));
    let (sender, requests) = tokio::sync::mpsc::channel(1);
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    sender.send(ask).await.unwrap();
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let answers = reflection.server_reflection_info(requests).await;
    let answer = answers.unwrap().into_inner().message().await.unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.unwrap().message_response else {
        panic!("no list");
    };
    let names: BTreeSet<String> = list.service.into_iter().map(|one| one.name).collect();
    let expected = [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "slat.v1.FleetService",
    ];
    assert_eq!(names, expected.map(str::to_owned).into());
    drop(sender);
    served.stop().await;
}

#[tokio::test]
async fn a_unix_socket_takes_any_authority() {
    let directory = slat_test_dir::TestDir::new();
    let path = directory.path().join("vm.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let served = endpoint().serve_unix(listener).await;
    let raw = path.display().to_string();
    for authority in [raw.as_str(), &raw.replace('/', "%2F"), "localhost", ""] {
        let answer = ask_as(&path, authority).await;
        // The answer's headers: `grpc-status: 0` comes after them, and no RST_STREAM.
        assert!(answer.contains(&1), "{authority}: {answer:?}");
        assert!(!answer.contains(&3), "{authority}: {answer:?}");
    }
    served.stop().await;
}

/// Health, asked by hand under that authority; the kinds of frames that come back until the stream
/// is over.
async fn ask_as(path: &std::path::Path, authority: &str) -> Vec<u8> {
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    };
    let mut block = vec![0x83, 0x86];
    for (name, value) in [
        (":path", "/grpc.health.v1.Health/Check"),
        (":authority", authority),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame(4, 0, 0, &[]));
    sent.extend(frame(1, 4, 1, &block));
    sent.extend(frame(0, 1, 1, &[0; 5]));
    let mut stream = tokio::net::UnixStream::connect(path).await.unwrap();
    stream.write_all(&sent).await.unwrap();
    let mut kinds = Vec::new();
    loop {
        let mut header = [0; 9];
        let read = tokio::time::timeout(crate::rig::LONG, stream.read_exact(&mut header)).await;
        if read.unwrap().is_err() {
            return kinds;
        }
        let mut payload =
            vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        kinds.push(header[3]);
        let of_the_call = header[8] == 1;
        if of_the_call && (header[3] == 3 || header[4] & 1 == 1) {
            return kinds;
        }
    }
}
