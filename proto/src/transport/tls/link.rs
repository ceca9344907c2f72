//! How an end speaks.

use slat_trust::{Credentials, Expects};

/// How one end of TCP connections speaks, and to whom. Unix sockets need none.
#[derive(Clone, Debug, Default)]
pub enum Link {
    /// In the clear: nobody is authenticated.
    #[default]
    Plain,
    /// By TLS 1.3.
    Tls {
        /// Who this end is, and whose certificates it takes.
        credentials: Credentials,
        /// Who has to be at the other end.
        expects: Expects,
    },
}

impl Link {
    /// By TLS with `credentials` where there are some, to whoever `expects` names.
    #[must_use]
    pub fn new(credentials: Option<&Credentials>, expects: Expects) -> Self {
        match credentials {
            Some(credentials) => Self::Tls {
                credentials: credentials.clone(),
                expects,
            },
            None => Self::Plain,
        }
    }
}
