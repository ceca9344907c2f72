//! Serving an endpoint: services with health, reflection and the request layer, on a TCP or a Unix
//! listener.
//!
//! A TCP endpoint speaks gRPC and plain HTTP (metrics, dashboard) on one port. Reflection lists
//! what the endpoint serves and nothing else. The [`EndpointHandle`] owns the serving task:
//! [`EndpointHandle::stop`] sets health to NOT_SERVING, takes no new connection, gives running
//! requests a moment and ends.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::JoinHandle,
};
use tonic::{
    server::NamedService,
    service::{Routes, RoutesBuilder},
};
use tower::Layer as _;

use super::{
    accept::{MAX_CONNECTIONS, accept},
    access::{Access, AccessGuard},
    audit::Audit,
    connection::wait,
    guard::Guard,
    guest::Gate,
    health::Health,
    layer::RpcMetricsLayer,
    methods::{COMMON, DESCRIPTORS},
    tls::Link,
};
use crate::{ApiError, Reason};

/// How long requests may go on after a stop. Watches end sooner: their owners close them.
const DRAIN: Duration = Duration::from_secs(2);

/// Collects the services of one endpoint.
#[derive(Debug)]
pub struct Endpoint {
    routes: RoutesBuilder,
    health: Health,
    http: axum::Router,
    most: usize,
    entry: bool,
    refuses_limited: bool,
    gate: Gate,
}

impl Endpoint {
    /// An endpoint with health and reflection.
    #[must_use]
    pub fn new() -> Self {
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let mut routes = Routes::builder();
        routes.add_service(health_service);
        Self {
            routes,
            health: Health::new(reporter),
            http: axum::Router::new(),
            most: MAX_CONNECTIONS,
            entry: false,
            refuses_limited: false,
            gate: Gate::default(),
        }
    }

    /// Serves TCP callers by `link` alone, who may do what `access` says.
    #[must_use]
    pub fn gate(mut self, link: Link, access: Access) -> Self {
        self.gate = Gate {
            link,
            access,
            ..Gate::default()
        };
        self
    }

    /// Refuses users who are limited by labels: its services do not know the limits. Without it
    /// they look at [`super::Permit::scope`].
    #[must_use]
    pub fn refuses_limited(mut self) -> Self {
        self.refuses_limited = true;
        self
    }

    /// Adds a generated server, e.g. `VmServiceServer::new(handler)`.
    #[must_use]
    pub fn service<S>(mut self, service: S) -> Self
    where
        S: tower::Service<http::Request<tonic::body::Body>, Error = std::convert::Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: axum::response::IntoResponse,
        S::Future: Send + 'static,
    {
        self.routes.add_service(service);
        self.health.add(S::NAME);
        self
    }

    /// Adds plain HTTP routes (TCP endpoints: metrics, dashboard). `/healthz`, `/readyz` and
    /// `/livez` are there already.
    #[must_use]
    pub fn http(mut self, router: axum::Router) -> Self {
        self.http = self.http.merge(router);
        self
    }

    /// Takes at most `most` connections at a time, instead of 1024.
    #[must_use]
    pub fn max_connections(mut self, most: usize) -> Self {
        self.most = most;
        self
    }

    /// Nobody relays calls to this endpoint: one that says so is audited all the same.
    #[must_use]
    pub fn entry(mut self) -> Self {
        self.entry = true;
        self
    }

    /// Serves on `listener` until stopped.
    ///
    /// # Errors
    /// When the listener's own address cannot be read.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn serve_tcp(self, listener: TcpListener) -> std::io::Result<EndpointHandle> {
        let address = listener.local_addr()?;
        let most = self.most;
        let gate = self.gate.clone();
        let (router, health) = self.finish().await;
        let (stop, stopped) = watch::channel(false);
        let server = accept(listener, (router, gate), most, stopped.clone());
        Ok(EndpointHandle {
            stop,
            task: tokio::spawn(drain(server, stopped)),
            health,
            address: Some(address),
        })
    }

    /// Serves on a Unix socket until stopped.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn serve_unix(self, listener: UnixListener) -> EndpointHandle {
        let most = self.most;
        let gate = self.gate.clone();
        let (router, health) = self.finish().await;
        let (stop, stopped) = watch::channel(false);
        let server = accept(listener, (router, gate), most, stopped.clone());
        EndpointHandle {
            stop,
            task: tokio::spawn(drain(server, stopped)),
            health,
            address: None,
        }
    }

    async fn finish(self) -> (axum::Router, Health) {
        let Self {
            mut routes,
            health,
            http,
            most: _,
            entry,
            refuses_limited,
            gate,
        } = self;
        let access = gate.access;
        let services: BTreeSet<&'static str> =
            COMMON.iter().chain(health.names()).copied().collect();
        let reflection = || {
            let mut builder = tonic_reflection::server::Builder::configure();
            for set in DESCRIPTORS {
                builder = builder.register_encoded_file_descriptor_set(set);
            }
            for name in &services {
                builder = builder.with_service_name(*name);
            }
            builder
        };
        // The descriptors are this build's own: without them there is no reflection, and all else
        // is as ever.
        match reflection().build_v1() {
            Ok(service) => drop(routes.add_service(service)),
            Err(error) => tracing::error!(%error, "no reflection"),
        }
        match reflection().build_v1alpha() {
            Ok(service) => drop(routes.add_service(service)),
            Err(error) => tracing::error!(%error, "no reflection"),
        }
        health.serving().await;
        let guarded = Guard::new(services, routes.routes());
        let allowed = AccessGuard::grpc(guarded, access.clone(), refuses_limited);
        let grpc = RpcMetricsLayer.layer(Audit::new(allowed, entry));
        let pages = http.merge(health.router());
        let pages = pages.layer(tower::layer::layer_fn(move |inner| {
            AccessGuard::http(inner, access.clone())
        }));
        let router = pages.fallback_service(grpc);
        (router, health)
    }
}

impl Default for Endpoint {
    fn default() -> Self {
        Self::new()
    }
}

async fn drain(server: impl Future<Output = ()>, mut stopped: watch::Receiver<bool>) {
    let deadline = async {
        wait(&mut stopped).await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        () = server => {}
        () = deadline => tracing::debug!("requests outlived the endpoint's drain"),
    }
}

/// Owns an endpoint that is being served.
#[derive(Debug)]
pub struct EndpointHandle {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    health: Health,
    address: Option<SocketAddr>,
}

impl EndpointHandle {
    /// The TCP address it is bound to; `None` for a Unix socket.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Its health, to be turned by whoever knows that the process cannot do its work.
    #[must_use]
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Stops serving; returns when the last request has ended or its time is up.
    pub async fn stop(self) {
        let stopping = ApiError::new(Reason::PeerUnreachable, "this endpoint is stopping");
        self.health.not_serving(stopping).await;
        self.stop.send_replace(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "an endpoint's task failed");
        }
    }
}
