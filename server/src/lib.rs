//! The control plane: hosts report to it, VMs are reached through it, migrations are carried out by
//! it.
//!
//! From the bottom:
//! * `store`: what must survive (migrations, the fleet as last seen), in redb;
//! * `clock`: what hosts' clocks are off by;
//! * `grants`: the keys that sign leave for migrations;
//! * `fleet`: hosts, VMs, heartbeats, placement, and the way to each agent;
//! * `history`: the last minutes of counters; [`metrics`](mod@metrics): what is counted;
//! * [`migration`]: the pure protocol and the reconcilers that drive it;
//! * `fence`: hosts are fenced by a hook, and doubts resolved by that;
//! * `api`: one file a service; `dashboard`: the page and its JSON; `http`: metrics and health;
//!   `gauges`: what is set once a second.
//!
//! [`Server::start`] puts them on one port: gRPC and plain HTTP. The server is never in the path of
//! a blackout: it can be stopped or killed at any moment of a migration and finds the true outcome
//! when it starts again.
//!
//! # Tasks
//! [`Server`] owns them all: the listener, the gauges, the store's probe, one reconciler per
//! migration (through `Migrations`), the watches, what writes the fleet to the store and what calls
//! agents back. [`Server::stop`] ends them and returns when they have ended.

mod api;
mod clock;
mod dashboard;
mod fence;
mod fleet;
mod gauges;
mod grants;
mod history;
mod http;
pub mod metrics;
pub mod migration;
mod phase;
mod store;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    net::SocketAddr,
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use slat_proto::transport::{Access, Endpoint, EndpointHandle, Link};
use slat_trust::{Credentials, Expects};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    api::{Services, Watches},
    fence::Fences,
    fleet::{Fleet, call_back, remember},
    grants::Grants,
    history::History,
    migration::Migrations,
    store::BlockingStore,
};

pub use crate::{fence::FenceHook, http::Render, migration::Retention, store::StoreError};

/// How long a fence may take.
const LONGEST_FENCE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// How a server is to run.
#[derive(Clone)]
pub struct ServerConfig {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Directory of its store; made with mode 0700 when missing.
    pub state_dir: PathBuf,
    /// How often agents are told to report.
    pub report_interval: Duration,
    /// A host that was not heard from for longer is UNREACHABLE. `None`: three report intervals.
    pub host_silence: Option<Duration>,
    /// Which ended migrations are kept.
    pub retention: Retention,
    /// Who this server is, and whom it takes; `None`: it serves anybody, in the clear.
    pub credentials: Option<Credentials>,
    /// What callers may do.
    pub access: Access,
    /// What fences hosts; `None`: nothing does.
    pub fence: Option<FenceHook>,
    /// Process-wide Prometheus text, from the recorder that the process installed. `None`: /metrics
    /// says that there is no recorder.
    pub render: Option<Render>,
    /// Slat's version, shown and exported.
    pub version: String,
}

impl fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerConfig")
            .field("listen", &self.listen)
            .field("state_dir", &self.state_dir)
            .field("report_interval", &self.report_interval)
            .field("host_silence", &self.host_silence)
            .field("retention", &self.retention)
            .field("credentials", &self.credentials)
            .field("fence", &self.fence)
            .field("render", &self.render.is_some())
            .field("version", &self.version)
            .finish()
    }
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The store cannot be used.
    #[error("the server's store: {0}")]
    Store(#[from] StoreError),
    /// The keys that sign grants cannot be used.
    #[error("the keys that sign grants: {0}")]
    Keys(String),
    /// The configuration is out of range.
    #[error("{0}")]
    Config(&'static str),
}

/// A running control plane. See the crate.
pub struct Server {
    endpoint: EndpointHandle,
    address: SocketAddr,
    migrations: Arc<Migrations>,
    watches: Watches,
    fences: Arc<Fences>,
    store: BlockingStore,
    /// Gauges, health, and the store's probe.
    keeping: [JoinHandle<()>; 3],
    /// What remembers the fleet, and what calls its agents back.
    keepers: TaskTracker,
    stop: CancellationToken,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Opens the store, takes up unfinished migrations and listens.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn start(config: ServerConfig) -> Result<Self, ServerError> {
        if !(Duration::from_millis(10)..=Duration::from_secs(3600))
            .contains(&config.report_interval)
        {
            return Err(ServerError::Config(
                "the report interval is 10 ms to 3600 s",
            ));
        }
        let silence = config.report_interval * 2..=Duration::from_secs(3600);
        if config.host_silence.is_some_and(|it| !silence.contains(&it)) {
            return Err(ServerError::Config(
                "the host silence is two report intervals to 3600 s",
            ));
        }
        if let Some(hook) = &config.fence {
            if !hook.program.is_absolute() {
                return Err(ServerError::Config("the fence hook is an absolute path"));
            }
            if !LONGEST_FENCE.contains(&hook.timeout) {
                return Err(ServerError::Config("a fence may take 1 s to 3600 s"));
            }
        }
        let directory = config.state_dir.clone();
        let store = tokio::task::spawn_blocking(move || BlockingStore::open(&directory))
            .await
            .map_err(|source| StoreError::Open {
                path: config.state_dir.clone(),
                source: source.into(),
            })??;
        Self::start_on(config, store).await
    }

    /// [`Server::start`] on a store that is open.
    async fn start_on(config: ServerConfig, store: BlockingStore) -> Result<Self, ServerError> {
        // Bound before anything is taken up: a second server on the port must not move a VM.
        let listen_failed = |source| ServerError::Listen {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(listen_failed)?;
        let address = listener.local_addr().map_err(listen_failed)?;

        metrics::describe(&config.version);
        let fleet = Fleet::new(
            config.report_interval,
            config.host_silence,
            config.credentials.clone(),
        );
        fleet.restore(store.with(|store| store.seen()).await?)?;
        let history = Arc::new(History::new(config.report_interval));
        let state_dir = config.state_dir.clone();
        let opening = move || Grants::open(&state_dir, Arc::new(SystemTime::now));
        let grants = tokio::task::spawn_blocking(opening).await;
        let grants = grants.map_err(|error| ServerError::Keys(error.to_string()))?;
        let grants = Arc::new(grants.map_err(|error| ServerError::Keys(error.to_string()))?);
        let migrations = Migrations::start(
            Arc::clone(&fleet),
            store.clone(),
            Arc::clone(&history),
            Arc::clone(&grants),
            config.retention,
        )
        .await?;
        let fences = Fences::new(config.fence, Arc::clone(&fleet), Arc::clone(&migrations));
        let watches = Watches::default();
        let services = Services {
            fleet: Arc::clone(&fleet),
            migrations: Arc::clone(&migrations),
            store: store.clone(),
            history: Arc::clone(&history),
            watches: watches.clone(),
            grants: Arc::clone(&grants),
            fences: Arc::clone(&fences),
        };
        let pages = dashboard::router(dashboard::Pages::new(
            Arc::clone(&fleet),
            Arc::clone(&migrations),
            history,
            &config.version,
        ));
        let link = Link::new(config.credentials.as_ref(), Expects::Anyone);
        let endpoint = services
            .add_to(Endpoint::new().entry().gate(link, config.access))
            .http(pages)
            .http(http::router(config.render))
            .serve_tcp(listener)
            .await;
        let endpoint = match endpoint {
            Ok(endpoint) => endpoint,
            Err(source) => {
                migrations.stop().await;
                store.finish().await;
                return Err(listen_failed(source));
            }
        };
        let stop = CancellationToken::new();
        let keepers = TaskTracker::new();
        keepers.spawn(remember(Arc::clone(&fleet), store.clone(), stop.clone()));
        keepers.spawn(call_back(Arc::clone(&fleet), stop.clone()));
        keepers.spawn(grants.keep(stop.clone()));
        keepers.close();
        let keeping = [
            tokio::spawn(gauges::keep(fleet, Arc::clone(&migrations))),
            tokio::spawn(store::tell(store.clone(), endpoint.health())),
            tokio::spawn(store::probe(store.clone())),
        ];
        tracing::info!(%address, "the server listens");
        Ok(Self {
            endpoint,
            address,
            migrations,
            watches,
            fences,
            store,
            keeping,
            keepers,
            stop,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops: watches and reconcilers first, so that their streams end, then the listener.
    /// Migrations go on without it.
    pub async fn stop(self) {
        for task in &self.keeping {
            task.abort();
        }
        // A hook that runs is killed: who ordered it is answered while the endpoint lives.
        self.fences.stop().await;
        self.migrations.stop().await;
        self.watches.stop().await;
        self.endpoint.stop().await;
        // After the last report.
        self.stop.cancel();
        self.keepers.wait().await;
        self.store.finish().await;
        for task in self.keeping {
            // An aborted task's error says so and nothing else.
            drop(task.await);
        }
    }
}
