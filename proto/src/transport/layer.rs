//! One tower layer around every served call: a span with the caller's trace as parent, and the RED
//! metric `rpc_server_call_duration_seconds{rpc_method, rpc_status_code}` (OpenTelemetry's
//! `rpc.server.call.duration`).
//!
//! The duration of a streaming call ends when its response headers are ready, not when the stream
//! ends. Method labels are bounded: anything but a path of this package, health or reflection is
//! `_OTHER`.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use tonic::Code;
use tower::{Layer, Service};
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::trace::remote_context;

/// Wraps services in [`RpcMetrics`].
#[derive(Clone, Copy, Debug, Default)]
pub struct RpcMetricsLayer;

/// Measures and traces the calls of the service inside.
#[derive(Clone, Debug)]
pub struct RpcMetrics<S>(S);

impl<S> Layer<S> for RpcMetricsLayer {
    type Service = RpcMetrics<S>;
    fn layer(&self, inner: S) -> RpcMetrics<S> {
        RpcMetrics(inner)
    }
}

fn method_label(path: &str) -> String {
    let path = path.trim_start_matches('/');
    let known = ["slat.v1.", "grpc.health.v1.", "grpc.reflection."];
    if known.iter().any(|prefix| path.starts_with(prefix)) && path.len() <= 80 {
        path.to_owned()
    } else {
        "_OTHER".to_owned()
    }
}

impl<S, B, R> Service<http::Request<B>> for RpcMetrics<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let method = method_label(request.uri().path());
        let span = tracing::debug_span!("rpc", otel.name = %method, otel.kind = "server");
        // Without an active span (filtered out) there is nothing to attach the parent to; that is
        // no failure of the call.
        drop(span.set_parent(remote_context(request.headers())));
        let started = Instant::now();
        let future = self.0.call(request).instrument(span);
        Box::pin(async move {
            let result = future.await;
            let code = match &result {
                // A unary failure is trailers-only: its status is in the headers. Its absence means
                // the call went on.
                Ok(response) => response
                    .headers()
                    .get("grpc-status")
                    .map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes())),
                Err(_) => Code::Internal,
            };
            metrics::histogram!(
                "rpc_server_call_duration_seconds",
                "rpc_method" => method,
                "rpc_status_code" => code_name(code)
            )
            .record(started.elapsed().as_secs_f64());
            result
        })
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
