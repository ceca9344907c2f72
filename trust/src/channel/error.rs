//! Why there is no key, or no TLS with it.

/// Why a migration's key could not be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The kernel gives no random numbers, or the key they made is none.
    #[error("no key could be made")]
    Key,
    /// The certificate could not be made.
    #[error("the key's certificate could not be made: {0}")]
    Certificate(String),
    /// TLS could not be set up with it.
    #[error("no TLS with the key: {0}")]
    Tls(#[from] rustls::Error),
}
