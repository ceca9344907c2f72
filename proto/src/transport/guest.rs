//! A connection whose caller is known, and by what an endpoint knows it.

use std::sync::Arc;

use super::{
    access::{Access, Permit, Place},
    caller::Caller,
    refusals::Refusals,
    tls::Link,
};

/// By what an endpoint knows its callers, and what they may do.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate {
    pub(super) link: Link,
    pub(super) access: Access,
    pub(super) refusals: Arc<Refusals>,
}

/// A connection whose caller is known.
pub(super) struct Guest<S> {
    pub(super) stream: S,
    pub(super) caller: Caller,
    /// What a caller may whose role does not come from its identity.
    pub(super) permit: Permit,
    /// It said that it speaks HTTP/2.
    pub(super) http2: bool,
    /// Its place among those of its identity.
    pub(super) place: Option<Place>,
}
