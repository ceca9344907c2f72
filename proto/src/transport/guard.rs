//! What stands before the gRPC services of an endpoint: a request that none of them would
//! understand is answered here, by name.
//!
//! | request | answer |
//! |---|---|
//! | a method that this endpoint serves, as gRPC | the service's |
//! | the same, given up by its caller before it began ([`super::expiry`]) | PEER_UNREACHABLE |
//! | the same, not as gRPC | HTTP 415 |
//! | any other path, as gRPC | NO_SUCH_METHOD |
//! | any other path | HTTP 404 |
//!
//! Request bodies are watched ([`super::body`]): a message above the limit is MESSAGE_TOO_LARGE
//! before it is kept, a request that does not arrive ends. An answer above the limit is
//! MESSAGE_TOO_LARGE too, instead of something that the client would refuse.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::response::{IntoResponse as _, Response};
use http::{Request, StatusCode, header};
use tonic::{Status, service::Routes};
use tower::Service;

use super::{
    body::{BoundedAnswer, Patience, WatchedBody},
    expiry, methods,
};
use crate::{ApiError, Reason};

/// A request of one message has this long to arrive.
const MESSAGE: Duration = Duration::from_secs(60);
/// A client's stream (reflection) has this long from message to message.
const NEXT_MESSAGE: Duration = Duration::from_secs(300);

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    services: Arc<BTreeSet<&'static str>>,
    routes: Routes,
}

impl Guard {
    /// Before `routes`, which serve `services`.
    pub(super) fn new(services: BTreeSet<&'static str>, routes: Routes) -> Self {
        Self {
            services: Arc::new(services),
            routes,
        }
    }

    fn refusal(&self, path: &str, grpc: bool) -> Option<Response> {
        let served = methods::known(path)
            .is_some_and(|method| self.services.contains(methods::service(method)));
        match (served, grpc) {
            (true, true) => None,
            (true, false) => Some(
                (
                    StatusCode::UNSUPPORTED_MEDIA_TYPE,
                    "this path is gRPC: content-type application/grpc\n",
                )
                    .into_response(),
            ),
            (false, true) => Some(
                Status::from(no_such_method(path))
                    .into_http::<axum::body::Body>()
                    .into_response(),
            ),
            (false, false) => Some((StatusCode::NOT_FOUND, "not found\n").into_response()),
        }
    }
}

fn no_such_method(path: &str) -> ApiError {
    // What came from outside is bounded before it is said again.
    let path: String = path.chars().take(120).collect();
    ApiError::new(
        Reason::NoSuchMethod,
        format!("this endpoint does not serve {}", path.escape_default()),
    )
    .with("method", path.escape_default())
    .with(
        "advice",
        "ask another endpoint: migrations are served by the server alone; reflection lists what this one serves",
    )
}

impl Service<Request<axum::body::Body>> for Guard {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<tonic::body::Body>>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, request: Request<axum::body::Body>) -> Self::Future {
        let path = request.uri().path();
        let content = request.headers().get(header::CONTENT_TYPE);
        let grpc = content.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        if let Some(refusal) = self.refusal(path, grpc) {
            return Box::pin(std::future::ready(Ok(refusal)));
        }
        if let Some(late) = expiry::refusal(request.headers()) {
            let refusal = Status::from(late).into_http::<axum::body::Body>();
            return Box::pin(std::future::ready(Ok(refusal)));
        }
        let patience = if path.contains("ServerReflection") {
            Patience::Piece(NEXT_MESSAGE)
        } else {
            Patience::Whole(MESSAGE)
        };
        let request = request.map(|body| {
            tonic::body::Body::new(WatchedBody::new(body, patience, Status::from_error))
        });
        let answer = self.routes.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| axum::body::Body::new(BoundedAnswer::new(body))))
        })
    }
}
