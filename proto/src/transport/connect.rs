//! Channels to endpoints. A channel connects lazily and again after a loss. How it knows who is at
//! the other end is [`super::tls`]'s.

use std::{sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use slat_trust::Expects;
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
/// Behind a Unix socket nobody shows a certificate: where `link` names one peer, there is no way by
/// one.
///
/// # Errors
/// BAD_PARAMETER when the address makes no URI, or is a Unix socket where a peer is named.
pub fn connect_by(address: &Address, link: &Link) -> Result<TracedChannel, ApiError> {
    let invalid = |_| ApiError::bad_parameter("address", "makes no URI").with("address", address);
    if let (Address::Unix(_), Some(peer)) = (address, named(link)) {
        let words = format_args!(
            "is a Unix socket, where nobody shows a certificate: {peer} is to be there"
        );
        return Err(ApiError::bad_parameter("address", words)
            .with("address", address)
            .with("wanted", peer));
    }
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

/// The one who has to be at the other end, where it is one.
fn named(link: &Link) -> Option<String> {
    match link {
        Link::Tls {
            expects: Expects::Exactly(identity),
            ..
        } => Some(identity.to_string()),
        Link::Tls {
            expects: Expects::Named(kind, name),
            ..
        } => Some(format!("{kind}/{name}")),
        _ => None,
    }
}

fn settings(endpoint: Endpoint) -> Endpoint {
    endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true)
}

#[cfg(test)]
mod tests {
    use slat_trust::{Credentials, Kind, pki::Ca};

    use super::*;
    use crate::Reason;

    #[tokio::test]
    async fn no_way_to_a_named_peer_leads_through_a_unix_socket() {
        let dir = slat_test_dir::TestDir::new();
        let ca = Ca::init(&dir.path().join("ca"), "example.org").unwrap();
        let own = dir.path().join("own");
        ca.issue(Kind::Server, "one", None, &own).unwrap();
        let credentials = Credentials::load(&own).unwrap();
        let identity = credentials.identity();
        let wanted = identity.to_string();
        let exactly = (Expects::Exactly(identity), wanted.as_str());
        let agent = Expects::Named(Kind::Agent, "host-a".to_owned());
        let agent = (agent, "agent/host-a");
        let socket: Address = "unix:/run/agent.sock".parse().unwrap();
        let tcp: Address = "127.0.0.1:7401".parse().unwrap();
        for (named, wanted) in [exactly, agent] {
            let link = Link::new(Some(&credentials), named);
            let refused = connect_by(&socket, &link).map(drop).unwrap_err();
            assert_eq!(refused.reason, Reason::BadParameter);
            assert_eq!(refused.metadata["wanted"], wanted);
            connect_by(&tcp, &link).unwrap();
        }
        // Where nobody in particular has to be there, whoever owns the socket's folder says who is.
        let anyone = Link::new(Some(&credentials), Expects::Anyone);
        for link in [anyone, Link::Plain] {
            connect_by(&socket, &link).unwrap();
        }
    }
}
