//! The dashboard: one page at `/`, made for looking, and the JSON it polls.
//!
//! Everything comes from this process: page, script and style are files in `assets/`, the charts
//! are plotly.js as the `plotly` crate carries it. The Content-Security-Policy allows nothing else;
//! names reach the page as JSON and the page writes them as text. Read-only.
//!
//! * `/api/state` totals, what is wrong, running and last migrations, now;
//! * `/api/rates?of=vms|hosts&rate=faults&window=600&top=10` the busiest with their rates by time,
//!   and how many more there are (see [`crate::history`]);
//! * `/api/vms`, `/api/hosts`, `/api/migrations` with `q`, `state`, `mark`, `of`, `sort`, `offset`,
//!   `limit`: a slice of a list, and how many match (see [`query`]);
//! * `/api/migrations/{id}` one migration with its iterations, decisions and points.
//!
//! Each answer is bounded, whatever the size of the fleet: the page never gets all of it. Times are
//! milliseconds since 1970 and durations seconds, null where nothing is known.

mod moves;
mod plotly;
mod problems;
mod query;
mod rows;
mod snapshot;
mod why;

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use serde_json::{Value, json};
use slat_proto::{
    Reason,
    model::{MigrationName, now},
};

use self::{
    query::{Select, Slice},
    snapshot::{Cache, Snapshot},
};
use crate::{
    fleet::Fleet,
    history::{Asked, Busiest, History, Of, Rate},
    migration::Migrations,
};

const PAGE: &str = include_str!("assets/index.html");
const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, content type, contents.
const ASSETS: [(&str, &str, &str); 8] = [
    ("/assets/app.js", SCRIPT, include_str!("assets/app.js")),
    ("/assets/dom.js", SCRIPT, include_str!("assets/dom.js")),
    (
        "/assets/charts.js",
        SCRIPT,
        include_str!("assets/charts.js"),
    ),
    (
        "/assets/overview.js",
        SCRIPT,
        include_str!("assets/overview.js"),
    ),
    ("/assets/lists.js", SCRIPT, include_str!("assets/lists.js")),
    ("/assets/move.js", SCRIPT, include_str!("assets/move.js")),
    (
        "/assets/app.css",
        "text/css; charset=utf-8",
        include_str!("assets/app.css"),
    ),
    (
        "/assets/icon.svg",
        "image/svg+xml",
        include_str!("assets/icon.svg"),
    ),
];

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Running migrations of a summary, the longest running first, and ended ones, newest first.
const RUNNING: usize = 50;
const LAST: usize = 12;
/// Lines of one chart.
const TOP: usize = 10;
const MAX_TOP: usize = 20;

/// What the page shows.
#[derive(Clone)]
pub(crate) struct Pages {
    fleet: Arc<Fleet>,
    migrations: Arc<Migrations>,
    history: Arc<History>,
    version: Arc<str>,
    cache: Arc<Cache>,
}

impl Pages {
    pub(crate) fn new(
        fleet: Arc<Fleet>,
        migrations: Arc<Migrations>,
        history: Arc<History>,
        version: &str,
    ) -> Self {
        Self {
            fleet,
            migrations,
            history,
            version: version.into(),
            cache: Arc::default(),
        }
    }

    async fn snapshot(&self) -> Arc<Snapshot> {
        self.cache
            .get(&self.fleet, &self.migrations, &self.history)
            .await
    }
}

/// The routes.
pub(crate) fn router(pages: Pages) -> Router {
    let mut router = Router::new().route("/", get(|| async { asset(HTML, PAGE) }));
    for (path, kind, body) in ASSETS {
        router = router.route(path, get(move || async move { asset(kind, body) }));
    }
    router
        .route("/assets/plotly.min.js", get(charts))
        .route("/api/state", get(state))
        .route("/api/rates", get(rates))
        .route("/api/vms", get(vms))
        .route("/api/hosts", get(hosts))
        .route("/api/migrations", get(migrations))
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

fn live(value: Value) -> Response {
    guarded(([(header::CACHE_CONTROL, "no-store")], Json(value)).into_response())
}

async fn state(State(pages): State<Pages>) -> Response {
    let snapshot = pages.snapshot().await;
    let row = |migration| moves::row(migration, &pages.history);
    let running: Vec<Value> = snapshot.running.iter().take(RUNNING).map(row).collect();
    let last: Vec<Value> = snapshot.ended.iter().take(LAST).map(row).collect();
    live(json!({
        "now": rows::millis(Some(&now())),
        "version": &*pages.version,
        "report_interval_seconds": pages.fleet.interval().as_secs_f64(),
        "totals": rows::totals(&snapshot),
        "problems": problems::problems(&snapshot),
        "running": running,
        "last": last,
        "error": snapshot.error,
    }))
}

/// Which rates are asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Chart {
    /// `vms` or `hosts`.
    of: String,
    /// See [`Rate::word`].
    rate: String,
    /// Seconds up to now; 0: all that is kept.
    window: u64,
    /// Lines at most; 0: ten.
    top: usize,
    /// Part of a name or of its host's name.
    q: String,
}

async fn rates(State(pages): State<Pages>, Query(chart): Query<Chart>) -> Response {
    let Some(rate) = Rate::parse(&chart.rate) else {
        let words: Vec<&str> = Rate::ALL.into_iter().map(Rate::word).collect();
        return refused("rate", &words.join(", "));
    };
    let asked = Asked {
        of: match chart.of.as_str() {
            "vms" => Of::Vms,
            "hosts" => Of::Hosts,
            _ => return refused("of", "vms, hosts"),
        },
        rate,
        window: match chart.window {
            0 => crate::history::KEEP,
            seconds => Duration::from_secs(seconds.clamp(10, 3600)),
        },
        top: match chart.top {
            0 => TOP,
            top => top.min(MAX_TOP),
        },
    };
    let q = chart.q.trim().to_lowercase();
    let wanted =
        |_: &str, name: &str, host: &str| q.is_empty() || name.contains(&q) || host.contains(&q);
    let Busiest {
        start,
        step,
        lines,
        total,
        rest,
        left_out,
    } = pages.history.busiest(&asked, wanted);
    let more = total - lines.len();
    let lines: Vec<Value> = lines
        .into_iter()
        .map(|line| {
            let values: Vec<Value> = line
                .values
                .into_iter()
                .map(|value| value.map_or(Value::Null, rows::rounded))
                .collect();
            json!({
                "key": line.key,
                "name": line.name,
                "host": line.host,
                "mean": rows::rounded(line.mean),
                "now": line.now.map(rows::rounded),
                "values": values,
            })
        })
        .collect();
    live(json!({
        "start": start,
        "step": step,
        "unit": rate.unit(),
        "lines": lines,
        "total": total,
        "more": more,
        "more_mean": rows::rounded(rest),
        "left_out": left_out,
    }))
}

fn refused(field: &str, words: &str) -> Response {
    let body = json!({
        "reason": Reason::BadParameter.as_str(),
        "message": format!("{field} is one of {words}"),
    });
    guarded((StatusCode::BAD_REQUEST, Json(body)).into_response())
}

fn slice<T>(slice: Slice<T>, row: impl Fn(T) -> Value) -> Response {
    let rows: Vec<Value> = slice.rows.into_iter().map(row).collect();
    live(json!({ "matched": slice.matched, "offset": slice.offset, "rows": rows }))
}

async fn vms(State(pages): State<Pages>, Query(select): Query<Select>) -> Response {
    let snapshot = pages.snapshot().await;
    slice(select.vms(&snapshot), |vm| rows::vm(vm, &snapshot))
}

async fn hosts(State(pages): State<Pages>, Query(select): Query<Select>) -> Response {
    let snapshot = pages.snapshot().await;
    slice(select.hosts(&snapshot), |host| rows::host(host, &snapshot))
}

async fn migrations(State(pages): State<Pages>, Query(select): Query<Select>) -> Response {
    let snapshot = pages.snapshot().await;
    slice(select.migrations(&snapshot), |migration| {
        moves::row(migration, &pages.history)
    })
}

async fn migration(State(pages): State<Pages>, Path(id): Path<String>) -> Response {
    let found = match MigrationName::from_id(&id) {
        Ok(name) => pages.migrations.get(&name).await,
        Err(error) => Err(error),
    };
    match found {
        Ok(migration) => live(moves::detail(&migration, &pages.history)),
        Err(error) => {
            let status = match error.reason {
                Reason::NoSuchMigration => StatusCode::NOT_FOUND,
                Reason::BadParameter => StatusCode::BAD_REQUEST,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            let body = json!({ "reason": error.reason.as_str(), "message": error.message });
            guarded((status, Json(body)).into_response())
        }
    }
}
