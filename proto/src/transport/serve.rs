//! Serving an endpoint: services with health, reflection and the request layer, on a TCP or a Unix
//! listener.
//!
//! A TCP endpoint speaks gRPC and plain HTTP (metrics, dashboard) on one port. The
//! [`EndpointHandle`] owns the serving task: [`EndpointHandle::stop`] sets health to NOT_SERVING,
//! takes no new connection, gives running requests a moment and ends.

use std::{future::IntoFuture, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::JoinHandle,
};
use tonic::{
    server::NamedService,
    service::{Routes, RoutesBuilder},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::layer::RpcMetricsLayer;
use crate::v1;

/// How long requests may go on after a stop. Watches end sooner: their owners close them.
const DRAIN: Duration = Duration::from_secs(2);

/// Collects the services of one endpoint.
#[derive(Debug)]
pub struct Endpoint {
    routes: RoutesBuilder,
    health: HealthReporter,
    names: Vec<&'static str>,
    http: axum::Router,
}

impl Endpoint {
    /// An endpoint with health and reflection.
    ///
    /// # Panics
    /// Never: the descriptor sets are this build's own.
    #[must_use]
    pub fn new() -> Self {
        let (health, health_service) = tonic_health::server::health_reporter();
        let mut routes = Routes::builder();
        routes.add_service(health_service);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        routes.add_service(reflection().build_v1().expect("our own descriptor sets"));
        routes.add_service(
            reflection()
                .build_v1alpha()
                .expect("our own descriptor sets"),
        );
        Self {
            routes,
            health,
            names: Vec::new(),
            http: axum::Router::new(),
        }
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
        self.names.push(S::NAME);
        self
    }

    /// Adds plain HTTP routes (TCP endpoints: metrics, dashboard).
    #[must_use]
    pub fn http(mut self, router: axum::Router) -> Self {
        self.http = self.http.merge(router);
        self
    }

    /// Serves on `listener` until stopped.
    ///
    /// # Errors
    /// When the listener's own address cannot be read.
    pub async fn serve_tcp(self, listener: TcpListener) -> std::io::Result<EndpointHandle> {
        let address = listener.local_addr()?;
        let (router, health, names) = self.finish().await;
        let (stop, stopped) = watch::channel(false);
        let server =
            axum::serve(tapped(listener), router).with_graceful_shutdown(wait(stopped.clone()));
        let task = tokio::spawn(drain(server.into_future(), stopped));
        Ok(EndpointHandle {
            stop,
            task,
            health,
            names,
            address: Some(address),
        })
    }

    /// Serves on a Unix socket until stopped.
    pub async fn serve_unix(self, listener: UnixListener) -> EndpointHandle {
        let (router, health, names) = self.finish().await;
        let (stop, stopped) = watch::channel(false);
        let server = axum::serve(listener, router).with_graceful_shutdown(wait(stopped.clone()));
        let task = tokio::spawn(drain(server.into_future(), stopped));
        EndpointHandle {
            stop,
            task,
            health,
            names,
            address: None,
        }
    }

    async fn finish(self) -> (axum::Router, HealthReporter, Vec<&'static str>) {
        let Self {
            routes,
            health,
            names,
            http,
        } = self;
        for name in &names {
            health
                .set_service_status(*name, ServingStatus::Serving)
                .await;
        }
        let grpc = routes.routes().into_axum_router().layer(RpcMetricsLayer);
        (http.merge(grpc), health, names)
    }
}

impl Default for Endpoint {
    fn default() -> Self {
        Self::new()
    }
}

/// Small requests wait for nothing: Nagle's delay off.
fn tapped(
    listener: TcpListener,
) -> impl axum::serve::Listener<Io = tokio::net::TcpStream, Addr = SocketAddr> {
    use axum::serve::ListenerExt;
    listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY refused");
        }
    })
}

async fn wait(mut stopped: watch::Receiver<bool>) {
    // An error means the handle is gone: that is a stop too.
    drop(stopped.wait_for(|stop| *stop).await);
}

async fn drain(server: impl Future<Output = std::io::Result<()>>, stopped: watch::Receiver<bool>) {
    let deadline = async {
        wait(stopped).await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = server => if let Err(error) = result { tracing::error!(%error, "an endpoint failed") },
        () = deadline => tracing::debug!("requests outlived the endpoint's drain"),
    }
}

/// Owns an endpoint that is being served.
#[derive(Debug)]
pub struct EndpointHandle {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    health: HealthReporter,
    names: Vec<&'static str>,
    address: Option<SocketAddr>,
}

impl EndpointHandle {
    /// The TCP address it is bound to; `None` for a Unix socket.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Stops serving; returns when the last request has ended or its time is up.
    pub async fn stop(self) {
        for name in &self.names {
            self.health
                .set_service_status(*name, ServingStatus::NotServing)
                .await;
        }
        self.stop.send_replace(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "an endpoint's task failed");
        }
    }
}
