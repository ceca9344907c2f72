//! Endpoints: how a `slat.v1` service is reached and served.
//!
//! [`Address`] names an endpoint, [`connect`] opens a channel to it, [`Endpoint`] collects services
//! and serves them on a TCP or Unix socket with health, reflection, request metrics and trace
//! context, until it is told to stop and its requests ended.

mod address;
mod layer;
mod serve;
mod trace;

pub use address::{Address, connect};
pub use layer::{RpcMetrics, RpcMetricsLayer};
pub use serve::{Endpoint, EndpointHandle};
pub use trace::{TraceInterceptor, TracedChannel, traced};
