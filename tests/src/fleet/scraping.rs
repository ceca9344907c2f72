//! Pages of a fleet's endpoints that are no RPC: metrics.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};
use slat_proto::transport::{Address, Link};

use super::Fleet;
use crate::wait::PATIENCE;

impl Fleet {
    /// The metrics of an endpoint, as Prometheus reads them: with the user's certificate where the
    /// fleet speaks TLS.
    ///
    /// # Errors
    /// When it does not answer with them.
    pub async fn metrics(&self, endpoint: &Address) -> anyhow::Result<String> {
        let Address::Tcp(address) = endpoint.clone() else {
            bail!("{endpoint} has no metrics");
        };
        let link = self.link();
        tokio::task::spawn_blocking(move || page(&address, &link, "/metrics")).await?
    }
}

/// A page by HTTP/1.1.
fn page(address: &str, link: &Link, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let asks = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    match link {
        Link::Plain => {
            stream.write_all(asks.as_bytes())?;
            stream.read_to_string(&mut answer)?;
        }
        Link::Tls {
            credentials,
            expects,
        } => {
            let mut config = (*credentials.connector(expects.clone())).clone();
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            // Not looked at: who is there is in the certificate.
            let name = "slat.invalid".try_into()?;
            let session = rustls::ClientConnection::new(Arc::new(config), name)?;
            let mut stream = rustls::StreamOwned::new(session, stream);
            stream.write_all(asks.as_bytes())?;
            stream.read_to_string(&mut answer)?;
        }
    }
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{address}{path}: {head}");
    Ok(body.to_owned())
}
