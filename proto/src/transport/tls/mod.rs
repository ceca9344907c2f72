//! TLS at TCP endpoints, both ends.
//!
//! [`Link`] says how an end speaks: in the clear, or by TLS 1.3 with the certificates of a
//! directory. The accepting end asks for a certificate and serves nobody without a good one; the
//! calling end accepts who it expects and nobody else, by identity and never by address.
//!
//! # Who hears what
//! In TLS 1.3 the calling end has ended its handshake before the accepting one has looked at its
//! certificate. So it waits for the first byte behind the handshake (the accepting end's HTTP/2
//! settings, which come unasked) before it sends anything: a refusal arrives as what it is, never
//! as a connection that broke. An accepting end that is spoken to in the clear says so in the
//! caller's own words, HTTP/2 or HTTP/1, and closes slowly.
//!
//! # While a connection lasts
//! Both ends judge their peer again ([`judged`]): whoever is revoked, or whose certificate ends,
//! loses the connections that it has.
//!
//! | file | what |
//! |---|---|
//! | `link` | how an end speaks |
//! | `accept` | the accepting end's handshake, and callers in the clear |
//! | `call` | the calling end's |
//! | `judged` | the peer is judged again |
//! | `told` | refusals as errors of the API |

mod accept;
mod call;
mod judged;
mod link;
mod told;

pub(super) use accept::accept;
pub(super) use call::call;
pub(super) use judged::Judged;
pub use link::Link;
pub(super) use told::{reason, speaks_tls, told};
