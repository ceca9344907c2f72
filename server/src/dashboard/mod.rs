//! The dashboard: one page at `/`, made for looking, and the JSON it polls.
//!
//! Everything comes from this process: page, script and style are files in `assets/`, the charts
//! are plotly.js as the `plotly` crate carries it. The Content-Security-Policy allows nothing else;
//! names reach the page as JSON and the page writes them as text. Read-only.
//!
//! * `/api/state` hosts, VMs, running and last migrations, now;
//! * `/api/history?since=ms` raw counters with their times (see [`crate::history`]); rates are
//!   computed by the page;
//! * `/api/migrations/{id}` one migration with its iterations and decisions, and its points.

mod json;
mod plotly;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use slat_proto::{Reason, model::MigrationName};

use crate::{fleet::Fleet, history::History, migration::Migrations};

const PAGE: &str = include_str!("assets/index.html");
const SCRIPT: &str = include_str!("assets/app.js");
const STYLE: &str = include_str!("assets/app.css");
const ICON: &str = include_str!("assets/icon.svg");

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Migrations shown.
const LAST: i32 = 20;

/// What the page shows.
#[derive(Clone)]
pub(crate) struct Pages {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) migrations: Arc<Migrations>,
    pub(crate) history: Arc<History>,
    pub(crate) version: Arc<str>,
}

#[derive(Debug, Deserialize)]
struct Since {
    /// Milliseconds since 1970; only younger entries come.
    #[serde(default)]
    since: u64,
}

/// The routes.
pub(crate) fn router(pages: Pages) -> Router {
    Router::new()
        .route(
            "/",
            get(|| async { asset("text/html; charset=utf-8", PAGE) }),
        )
        .route(
            "/assets/app.js",
            get(|| async { asset("text/javascript; charset=utf-8", SCRIPT) }),
        )
        .route(
            "/assets/app.css",
            get(|| async { asset("text/css; charset=utf-8", STYLE) }),
        )
        .route(
            "/assets/icon.svg",
            get(|| async { asset("image/svg+xml", ICON) }),
        )
        .route("/assets/plotly.min.js", get(charts))
        .route("/api/state", get(state))
        .route("/api/history", get(history))
        .route("/api/migrations/{id}", get(migration))
        .with_state(pages)
}

fn guarded(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let fixed = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn asset(content_type: &'static str, body: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    guarded((headers, body).into_response())
}

/// The chart library: 4.6 MB that change only with the build, so its tag is its digest and an
/// unchanged copy costs nothing.
async fn charts(request: HeaderMap) -> Response {
    let Some(library) = plotly::library() else {
        return guarded((StatusCode::NOT_FOUND, "no chart library in this build").into_response());
    };
    let headers = [
        (header::CONTENT_TYPE, "text/javascript; charset=utf-8"),
        (header::CACHE_CONTROL, "public, max-age=86400"),
        (header::ETAG, library.etag.as_str()),
    ];
    let known = request
        .get(header::IF_NONE_MATCH)
        .is_some_and(|tag| tag.as_bytes() == library.etag.as_bytes());
    guarded(if known {
        (StatusCode::NOT_MODIFIED, headers).into_response()
    } else {
        (headers, library.source.as_str()).into_response()
    })
}

fn live(value: serde_json::Value) -> Response {
    guarded(([(header::CACHE_CONTROL, "no-store")], Json(value)).into_response())
}

async fn state(State(pages): State<Pages>) -> Response {
    let (migrations, error) = match pages.migrations.list(LAST, "", None, None).await {
        Ok((migrations, _)) => (migrations, None),
        Err(error) => (Vec::new(), Some(error.message)),
    };
    live(json::state(
        &pages.fleet,
        &migrations,
        &pages.version,
        error,
    ))
}

async fn history(State(pages): State<Pages>, Query(query): Query<Since>) -> Response {
    live(pages.history.json(query.since))
}

async fn migration(State(pages): State<Pages>, Path(id): Path<String>) -> Response {
    let found = match MigrationName::from_id(&id) {
        Ok(name) => pages.migrations.get(&name).await,
        Err(error) => Err(error),
    };
    match found {
        Ok(migration) => {
            let mut value = json::migration(&migration);
            value["points"] = pages.history.points(&migration.name);
            live(value)
        }
        Err(error) => {
            let status = match error.reason {
                Reason::NoSuchMigration => StatusCode::NOT_FOUND,
                Reason::BadParameter => StatusCode::BAD_REQUEST,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            let body =
                serde_json::json!({ "reason": error.reason.as_str(), "message": error.message });
            guarded((status, Json(body)).into_response())
        }
    }
}
