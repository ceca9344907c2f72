//! Endpoints: how a `slat.v1` service is reached and served.
//!
//! [`Address`] names an endpoint, [`connect`] opens a channel to it, [`Endpoint`] collects services
//! and serves them on a TCP or Unix socket with health, reflection, request metrics and trace
//! context, until it is told to stop and its requests ended.
//!
//! | file | what |
//! |---|---|
//! | `address`, `connect`, `channel`, `retry` | the client's end: deadlines, retries, errors |
//! | `serve`, `health` | an endpoint, and whether it serves |
//! | `accept`, `connection` | its connections: their number and their time-outs |
//! | `guard`, `body`, `methods`, `expiry` | what is refused before a service sees it |
//! | `authority` | names in requests at a Unix socket |
//! | `layer`, `trace` | metrics and traces of calls |
//! | `audit` | who changed what: one line a changing call |

mod accept;
mod address;
mod audit;
mod authority;
mod body;
mod channel;
mod connect;
mod connection;
mod expiry;
mod guard;
mod health;
mod layer;
mod methods;
mod retry;
mod serve;
mod trace;

pub use address::Address;
pub use channel::TracedChannel;
pub use connect::connect;
pub use expiry::begun_within;
pub use health::Health;
pub use layer::{RpcMetrics, RpcMetricsLayer};
pub use serve::{Endpoint, EndpointHandle};
