//! Addresses of endpoints, and channels to them. A channel connects lazily and again after a loss.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

use super::channel::TracedChannel;
use crate::ApiError;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent peer is pinged this often, and given up after as long again.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Where an endpoint is: `ip:port`, `host:port` or `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = ApiError;

    fn from_str(text: &str) -> Result<Self, ApiError> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(ApiError::bad_parameter("address", "unix: needs a path"));
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let text = text
            .strip_prefix("http://")
            .unwrap_or(text)
            .trim_end_matches('/');
        let port = text.rsplit_once(':').and_then(|(host, port)| {
            (!host.is_empty())
                .then(|| port.parse::<u16>().ok())
                .flatten()
        });
        if port.is_none() || text.contains(['/', ' ', '?', '#', '@']) {
            return Err(ApiError::bad_parameter(
                "address",
                format_args!(
                    "\"{}\" is neither host:port nor unix:/path",
                    text.escape_default()
                ),
            ));
        }
        Ok(Self::Tcp(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

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
            settings(endpoint).connect_lazy()
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
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .tcp_keepalive(Some(KEEPALIVE))
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_print() {
        for text in [
            "127.0.0.1:7400",
            "[::1]:7400",
            "server.example:7400",
            "unix:/run/slat/vm.sock",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!(
            "http://127.0.0.1:7400/"
                .parse::<Address>()
                .unwrap()
                .to_string(),
            "127.0.0.1:7400"
        );
        for text in [
            "",
            "localhost",
            ":80",
            "host:99999",
            "host:80/path",
            "unix:",
            "a b:80",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
