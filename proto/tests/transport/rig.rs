//! An endpoint with one small service, and calls made by hand.

use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use slat_proto::{
    ApiError,
    transport::{Address, Endpoint, EndpointHandle, TracedChannel, connect},
    v1::{
        self,
        fleet_service_server::{FleetService, FleetServiceServer},
    },
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, body::Body};
use tower::ServiceExt as _;

/// No wait of these tests is longer.
pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) struct Fleet;

#[tonic::async_trait]
impl FleetService for Fleet {
    async fn register_host(
        &self,
        _: Request<v1::RegisterHostRequest>,
    ) -> Result<Response<v1::RegisterHostResponse>, Status> {
        Ok(Response::new(v1::RegisterHostResponse::default()))
    }

    async fn report_host(
        &self,
        _: Request<v1::ReportHostRequest>,
    ) -> Result<Response<v1::ReportHostResponse>, Status> {
        Ok(Response::new(v1::ReportHostResponse::default()))
    }
}

pub(crate) fn endpoint() -> Endpoint {
    Endpoint::new().service(FleetServiceServer::new(Fleet))
}

pub(crate) async fn serve(endpoint: Endpoint) -> EndpointHandle {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    endpoint.serve_tcp(listener).await.unwrap()
}

pub(crate) fn address(handle: &EndpointHandle) -> Address {
    handle.address().unwrap().to_string().parse().unwrap()
}

pub(crate) fn channel(handle: &EndpointHandle) -> TracedChannel {
    connect(&address(handle)).unwrap()
}

/// Calls `path` with raw bytes as its body, over a plain channel; the answer's status.
pub(crate) async fn call_raw(to: &Address, path: &str, body: Vec<u8>) -> Result<(), ApiError> {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{to}"))
        .unwrap()
        .connect_lazy();
    let request = http::Request::post(format!("http://{to}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Full::new(body.into())))
        .unwrap();
    let answer = channel.oneshot(request).await.unwrap();
    let (parts, body) = answer.into_parts();
    let status = Status::from_header_map(&parts.headers);
    let status = match status {
        Some(status) => status,
        None => {
            let whole = body.collect().await.unwrap();
            Status::from_header_map(whole.trailers().unwrap()).unwrap()
        }
    };
    match status.code() {
        tonic::Code::Ok => Ok(()),
        _ => Err(status.into()),
    }
}

/// One message as it is framed.
pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    bytes.extend(message);
    bytes
}
