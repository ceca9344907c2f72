//! Channels to endpoints. A channel connects lazily and again after a loss.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

use super::{address::Address, channel::TracedChannel};
use crate::ApiError;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent peer on a network is pinged this often, and given up after as long again.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// A channel to `address`. Nothing is sent until the first call; a lost connection is made again by
/// the next one.
///
/// # Errors
/// BAD_PARAMETER when the address makes no URI.
pub fn connect(address: &Address) -> Result<TracedChannel, ApiError> {
    let invalid = |_| ApiError::bad_parameter("address", "makes no URI").with("address", address);
    let channel = match address {
        Address::Tcp(host) => {
            let endpoint = Endpoint::from_shared(format!("http://{host}")).map_err(invalid)?;
            settings(endpoint)
                .tcp_keepalive(Some(KEEPALIVE))
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE)
                .connect_lazy()
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
