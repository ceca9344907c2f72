//! Messages that are too large or are none, at both ends.

use axum::{Router, response::IntoResponse, routing::post};
use slat_proto::{
    ApiError, Reason,
    codec::MAX_MESSAGE,
    transport::{Address, Endpoint, connect},
    v1::{
        self,
        fleet_service_client::FleetServiceClient,
        transfer_service_client::TransferServiceClient,
        transfer_service_server::{TransferService, TransferServiceServer},
    },
};
use tonic::{Request, Response, Status};

use crate::rig::{address, call_raw, channel, endpoint, framed, serve};

const REPORT: &str = "/slat.v1.FleetService/ReportHost";

#[tokio::test]
async fn a_server_names_a_request_that_is_too_large_or_none() {
    let served = serve(endpoint()).await;
    let to = address(&served);
    // Only the length: the message itself is never waited for.
    let mut large = vec![0];
    large.extend((MAX_MESSAGE as u32 + 1).to_be_bytes());
    large.extend([0; 1000]);
    let error = call_raw(&to, REPORT, large).await.unwrap_err();
    assert_eq!(error.reason, Reason::MessageTooLarge);
    assert_eq!(error.metadata["limit_bytes"], MAX_MESSAGE.to_string());
    assert_eq!(error.metadata["size_bytes"], (MAX_MESSAGE + 1).to_string());

    let error = call_raw(&to, REPORT, framed(&[0xff; 9])).await.unwrap_err();
    assert_eq!(error.reason, Reason::MessageUndecodable);
    assert!(!error.metadata["advice"].is_empty());

    // Far beyond the four MiB that both ends would have by themselves.
    let message = prost::Message::encode_to_vec(&v1::ReportHostRequest {
        incarnation: "x".repeat(20 << 20),
        ..Default::default()
    });
    call_raw(&to, REPORT, framed(&message)).await.unwrap();
    served.stop().await;
}

#[tokio::test]
async fn a_client_refuses_to_send_what_no_server_would_take() {
    let served = serve(endpoint()).await;
    let mut client = FleetServiceClient::new(channel(&served));
    let report = |bytes: usize| v1::ReportHostRequest {
        incarnation: "x".repeat(bytes),
        ..Default::default()
    };
    client.report_host(report(20 << 20)).await.unwrap();
    let status = client.report_host(report(MAX_MESSAGE)).await.unwrap_err();
    assert_eq!(ApiError::from(status).reason, Reason::MessageTooLarge);
    served.stop().await;
}

/// A server whose every answer is these bytes.
async fn answering(bytes: Vec<u8>) -> Address {
    let answer = move || {
        let bytes = bytes.clone();
        async move { ([("content-type", "application/grpc")], bytes).into_response() }
    };
    let router = Router::new().route(REPORT, post(answer));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string().parse().unwrap();
    // Ends with the test's runtime.
    tokio::spawn(axum::serve(listener, router).into_future());
    address
}

async fn answer_to_a_report(bytes: Vec<u8>) -> ApiError {
    let to = answering(bytes).await;
    let mut client = FleetServiceClient::new(connect(&to).unwrap());
    let answer = client.report_host(v1::ReportHostRequest::default()).await;
    answer.unwrap_err().into()
}

#[tokio::test]
async fn a_client_names_an_answer_that_is_too_large_or_none() {
    let mut large = vec![0];
    large.extend((MAX_MESSAGE as u32 + 1).to_be_bytes());
    let error = answer_to_a_report(large).await;
    assert_eq!(error.reason, Reason::MessageTooLarge);
    assert_eq!(error.metadata["limit_bytes"], MAX_MESSAGE.to_string());
    let error = answer_to_a_report(framed(&[0xff; 9])).await;
    assert_eq!(error.reason, Reason::MessageUndecodable);
}

/// Answers more than one message may have.
struct Talker;

#[tonic::async_trait]
impl TransferService for Talker {
    async fn describe_outgoing(
        &self,
        _: Request<v1::DescribeOutgoingRequest>,
    ) -> Result<Response<v1::DescribeOutgoingResponse>, Status> {
        Err(Status::internal("not asked"))
    }

    async fn prepare_incoming(
        &self,
        _: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::PrepareIncomingResponse>, Status> {
        Err(Status::internal("not asked"))
    }

    async fn start_outgoing(
        &self,
        _: Request<v1::StartOutgoingRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        Err(Status::internal("not asked"))
    }

    async fn get_transfer(
        &self,
        _: Request<v1::GetTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        Ok(Response::new(large()))
    }

    type WatchTransferStream = tokio_stream::Iter<std::vec::IntoIter<Result<v1::Transfer, Status>>>;

    async fn watch_transfer(
        &self,
        _: Request<v1::WatchTransferRequest>,
    ) -> Result<Response<Self::WatchTransferStream>, Status> {
        let said = vec![Ok(v1::Transfer::default()), Ok(large())];
        Ok(Response::new(tokio_stream::iter(said)))
    }

    async fn cancel_transfer(
        &self,
        _: Request<v1::CancelTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        Err(Status::internal("not asked"))
    }

    async fn adopt_transfer(
        &self,
        _: Request<v1::AdoptTransferRequest>,
    ) -> Result<Response<v1::AdoptTransferResponse>, Status> {
        Err(Status::internal("not asked"))
    }

    async fn resolve_transfer(
        &self,
        _: Request<v1::ResolveTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        Err(Status::internal("not asked"))
    }

    async fn release_transfer(
        &self,
        _: Request<v1::ReleaseTransferRequest>,
    ) -> Result<Response<v1::ReleaseTransferResponse>, Status> {
        Err(Status::internal("not asked"))
    }
}

fn large() -> v1::Transfer {
    v1::Transfer {
        vm: "x".repeat(MAX_MESSAGE),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_server_says_by_name_that_its_answer_is_too_large() {
    let served = serve(Endpoint::new().service(TransferServiceServer::new(Talker))).await;
    let mut client = TransferServiceClient::new(channel(&served));
    let status = client.get_transfer(v1::GetTransferRequest::default()).await;
    let error = ApiError::from(status.unwrap_err());
    assert_eq!(error.reason, Reason::MessageTooLarge);
    assert_eq!(error.metadata["limit_bytes"], MAX_MESSAGE.to_string());
    // The server's own word, not what the client made of it.
    let to = address(&served);
    let status = call_raw(&to, "/slat.v1.TransferService/GetTransfer", framed(&[])).await;
    assert_eq!(status.unwrap_err(), error);

    let request = v1::WatchTransferRequest::default();
    let mut stream = client.watch_transfer(request).await.unwrap().into_inner();
    stream.message().await.unwrap();
    let ended = ApiError::from(stream.message().await.unwrap_err());
    assert_eq!(ended.reason, Reason::MessageTooLarge);
    served.stop().await;
}
