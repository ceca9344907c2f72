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
