//! The server's endpoint, one file a service. Each checks names and parameters with
//! `slat_proto::model` before anything else sees them. What belongs to one VM is forwarded to its
//! owner's agent; what belongs to the fleet is answered here. Who is limited by labels sees its
//! part ([`scope`]).

mod fleet;
mod host;
mod memory;
mod migration;
mod paging;
mod scope;
mod services;
mod snapshot;
mod vm;
mod watch;

pub(crate) use self::services::{Services, Watches};
