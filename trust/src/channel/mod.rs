//! The TLS of one migration's page streams.
//!
//! A VM's process has no credential of its host. For each migration it makes a key of its own
//! ([`ChannelKey`]), in memory, with a certificate that it signs itself. Its agent vouches for it:
//! the SHA-256 of its SubjectPublicKeyInfo travels by the control plane and stands in the server's
//! grants ([`crate::grant`]). Each end pins exactly the other's key.
//!
//! # Protocol
//! TLS 1.3 and nothing before it; both ends show a certificate; no tickets, no resumption, no early
//! data. Of a certificate the key counts, and its time; names and issuers say nothing here. The
//! signature of the handshake proves that the peer has the key.
//!
//! A handshake says who is there. What a connection is for it says itself, by a [`token`] that is
//! made from the migration's ticket and from the secrets of this one handshake: on any other
//! connection it is worth nothing.

mod error;
mod key;
mod pinned;
mod token;

pub use error::ChannelError;
pub use key::{ChannelKey, Extraction};
pub use token::{EXPORTER, TOKEN, same, token};
