//! `slat.v1`: the API of Slat.
//!
//! * [`v1`] is generated from `slat/v1/*.proto` at build time.
//! * [`model`] holds the strict types: names, specs, slots and parameters, validated on receipt.
//!   Code behind an API endpoint works on these, never on raw messages from outside.
//! * [`error`] is the one error every endpoint speaks: a gRPC code with
//!   `ErrorInfo{reason, domain, metadata}`.
//! * [`codec`] is how messages are encoded, and how large one may be.
//! * [`transport`] opens and serves endpoints: TCP or Unix socket, health, reflection, request
//!   metrics, trace context.
//! * [`json`] renders any message as canonical proto JSON for command lines.
//!
//! Nothing here knows of KVM, page tables or stores.

pub mod codec;
pub mod error;
pub mod json;
pub mod model;
pub mod transport;

pub use error::{ApiError, Reason, code_name};

/// The generated messages, clients and servers of package `slat.v1`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    reason = "generated code; its documentation is in the .proto files"
)]
pub mod v1 {
    tonic::include_proto!("slat.v1");

    /// Encoded `FileDescriptorSet` of this package, for reflection and JSON.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/slat_v1.pb"));
}
