//! One tower layer around every served call: a span with the caller's trace as parent, and the RED
//! metric `rpc_server_call_duration_seconds{rpc_method, rpc_status_code}` (OpenTelemetry's
//! `rpc.server.call.duration`).
//!
//! The duration of a streaming call ends when its response headers are ready, not when the stream
//! ends. Method labels are bounded: a path that is no method of this package, of health or of
//! reflection is `_OTHER`.

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

use super::{methods::known, trace::remote_context};
use crate::code_name;

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

fn method_label(path: &str) -> &'static str {
    known(path).unwrap_or("_OTHER")
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
                // Turned away before gRPC began: no such path.
                Ok(response) if !response.status().is_success() => Code::Unimplemented,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_method_of_a_known_package_is_one_series_with_all_others() {
        for path in [
            "/slat.v1.VmService/A1",
            "/slat.v1.VmService/A2",
            "/slat.v1.Nothing/GetVm",
            "/grpc.health.v1.Health/Chek",
            "/metrics",
            "/",
        ] {
            assert_eq!(method_label(path), "_OTHER", "{path}");
        }
        assert_eq!(
            method_label("/slat.v1.VmService/GetVm"),
            "slat.v1.VmService/GetVm"
        );
    }
}
