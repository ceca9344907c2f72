//! Who is at the other end: identities in certificates, the credentials of this end, and what a
//! peer is refused for. TLS 1.3 and nothing before it; ring and nothing beside it.
//!
//! This crate stands below all others of Slat and knows no runtime and no RPC: it makes rustls's
//! configurations and judges certificate chains. Private keys never reach an error, a log line or
//! `Debug`.
//!
//! * [`grant`]: leave for one step of one migration, signed by the server.
//! * [`channel`]: the keys and the TLS of one migration's page streams.
//! * [`pki`]: a CA in a directory, for those who have none.
#![forbid(unsafe_code)]

mod chain;
pub mod channel;
mod credentials;
mod crl;
mod error;
mod files;
pub mod grant;
mod identity;
pub mod pki;
mod refusal;
mod set;
mod verify;
mod x509;

pub use chain::ends;
pub use credentials::Credentials;
pub use error::TrustError;
pub use files::read_file;
pub use identity::{Identity, IdentityError, Kind};
pub use refusal::Refusal;
pub use verify::Expects;
