//! Whether an endpoint serves, as gRPC health and `/healthz` say it: one switch behind both.
//!
//! The switch is turned by whoever knows that the process cannot do its work, and by the end of
//! the endpoint. Locking: the state is one watch channel; gRPC health is set after it.

use axum::{
    Router,
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio::sync::watch;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::ApiError;

/// Turns an endpoint's health. Clones turn the same one.
#[derive(Clone, Debug)]
pub struct Health {
    reporter: HealthReporter,
    names: Vec<&'static str>,
    trouble: watch::Sender<Option<ApiError>>,
}

impl Health {
    pub(super) fn new(reporter: HealthReporter) -> Self {
        Self {
            reporter,
            names: Vec::new(),
            trouble: watch::Sender::new(None),
        }
    }

    pub(super) fn add(&mut self, name: &'static str) {
        self.names.push(name);
    }

    /// Services that it speaks for.
    pub(super) fn names(&self) -> &[&'static str] {
        &self.names
    }

    /// SERVING, for every service and for the endpoint as a whole.
    pub async fn serving(&self) {
        self.trouble.send_replace(None);
        self.tell(ServingStatus::Serving).await;
    }

    /// NOT_SERVING, because of `trouble`.
    pub async fn not_serving(&self, trouble: ApiError) {
        self.trouble.send_replace(Some(trouble));
        self.tell(ServingStatus::NotServing).await;
    }

    async fn tell(&self, status: ServingStatus) {
        // The empty name is the endpoint as a whole.
        for name in std::iter::once("").chain(self.names.iter().copied()) {
            self.reporter.set_service_status(name, status).await;
        }
    }

    /// `/healthz` and `/readyz`: 200, or 503 with the reason while it does not serve. `/livez`: the
    /// process answers.
    pub(super) fn router(&self) -> Router {
        let state = self.trouble.subscribe();
        let health = move || {
            let answer = answer(state.borrow().as_ref());
            async move { answer }
        };
        Router::new()
            .route("/healthz", get(health.clone()))
            .route("/readyz", get(health))
            .route("/livez", get(|| async { "ok\n" }))
    }
}

fn answer(trouble: Option<&ApiError>) -> Response {
    match trouble {
        None => "ok\n".into_response(),
        Some(error) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{}: {error}\n", error.reason),
        )
            .into_response(),
    }
}
