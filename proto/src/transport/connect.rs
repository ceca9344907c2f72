//! Channels to endpoints. A channel connects lazily and again after a loss. How it knows who is at
//! the other end is [`super::tls`]'s.

use std::{sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

use super::{
    address::Address,
    channel::TracedChannel,
    tls::{self, Link},
};
use crate::ApiError;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// And with its handshake.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// A silent peer on a network is pinged this often, and given up after as long again.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// A channel to `address` in the clear. Nothing is sent until the first call; a lost connection is
/// made again by the next one.
///
/// # Errors
/// BAD_PARAMETER when the address makes no URI.
pub fn connect(address: &Address) -> Result<TracedChannel, ApiError> {
    connect_by(address, &Link::Plain)
}

/// A channel to `address`, by `link` when that is a TCP address. As [`connect`].
///
/// # Errors
/// BAD_PARAMETER when the address makes no URI.
pub fn connect_by(address: &Address, link: &Link) -> Result<TracedChannel, ApiError> {
    let invalid = |_| ApiError::bad_parameter("address", "makes no URI").with("address", address);
    let channel = match address {
        Address::Tcp(host) => {
            let endpoint = Endpoint::from_shared(format!("http://{host}")).map_err(invalid)?;
            let endpoint = settings(endpoint)
                .tcp_keepalive(Some(KEEPALIVE))
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE);
            match link {
                Link::Plain => endpoint.connect_lazy(),
                Link::Tls {
                    credentials,
                    expects,
                } => {
                    let (credentials, expects) = (credentials.clone(), expects.clone());
                    let host: Arc<str> = host.as_str().into();
                    // The endpoint's own time limit is for a connection alone, not a handshake.
                    endpoint
                        .connect_timeout(TLS_TIMEOUT)
                        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                            let (host, credentials, expects) =
                                (Arc::clone(&host), credentials.clone(), expects.clone());
                            async move {
                                let called = tls::call(&host, &credentials, &expects);
                                called.await.map(TokioIo::new)
                            }
                        }))
                }
            }
        }
        Address::Unix(path) => {
            let path = path.clone();
            let connector = tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            });
            // The URI is never resolved: the connector knows the path.
            let endpoint = Endpoint::from_static("http://unix.invalid");
            settings(endpoint).connect_with_connector_lazy(connector)
        }
    };
    Ok(TracedChannel::new(channel, address.clone()))
}

fn settings(endpoint: Endpoint) -> Endpoint {
    endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true)
}
