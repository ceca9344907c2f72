//! Plain HTTP beside the gRPC services: `/metrics` (Prometheus text). Rendering is the recorder's;
//! nothing is measured or computed for a scrape. Health is the endpoint's own: it says 503 while
//! the store cannot be written (see `store`).

use std::sync::Arc;

use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};

/// Renders the process's metrics as Prometheus text.
pub type Render = Arc<dyn Fn() -> String + Send + Sync>;

const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The routes.
pub(crate) fn router(render: Option<Render>) -> Router {
    Router::new().route(
        "/metrics",
        get(move || {
            let render = render.clone();
            async move { metrics(render) }
        }),
    )
}

fn metrics(render: Option<Render>) -> Response {
    match render {
        Some(render) => ([(header::CONTENT_TYPE, PROMETHEUS_TEXT)], render()).into_response(),
        None => (
            StatusCode::NOT_FOUND,
            "this process has no metrics recorder\n",
        )
            .into_response(),
    }
}
