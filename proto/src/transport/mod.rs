//! Endpoints: how a `slat.v1` service is reached and served.
//!
//! [`Address`] names an endpoint, [`connect`] opens a channel to it, [`Endpoint`] collects services
//! and serves them on a TCP or Unix socket with health, reflection, request metrics and trace
//! context, until it is told to stop and its requests ended.
//!
//! | file | what |
//! |---|---|
//! | `address`, `connect`, `channel`, `retry` | the client's end: deadlines, retries, errors |
//! | `access` | what a caller may do: its role, its limits |
//! | `tls` | how both ends of TCP connections know each other |
//! | `serve`, `health` | an endpoint, and whether it serves |
//! | `accept`, `connection` | its connections: their number and their time-outs |
//! | `guest`, `options` | a connection whose caller is known; options of sockets |
//! | `guard`, `body`, `methods`, `expiry` | what is refused before a service sees it |
//! | `caller` | who calls, for services |
//! | `authority` | names in requests at a Unix socket |
//! | `layer`, `trace` | metrics and traces of calls |
//! | `audit` | who changed what: one line a changing call |

mod accept;
mod access;
mod address;
mod audit;
mod authority;
mod body;
mod caller;
mod channel;
mod connect;
mod connection;
mod expiry;
mod guard;
mod guest;
mod health;
mod layer;
mod methods;
mod options;
mod refusals;
mod retry;
mod serve;
mod tls;
mod trace;

pub use access::{Access, Permit, Role, Scope, Users, access_table, role_may};
pub use address::Address;
pub use caller::Caller;
pub use channel::TracedChannel;
pub use connect::{connect, connect_by};
pub use expiry::begun_within;
pub use health::Health;
pub use layer::{RpcMetrics, RpcMetricsLayer};
pub use serve::{Endpoint, EndpointHandle};
pub use tls::Link;
