//! Whether a VM could live on this host: ports, filled by the binary, since only the code of VM
//! processes knows backends, CPUs and guest memory.

use std::sync::Arc;

use slat_proto::{ApiError, model::VmSpec, v1};

/// Compares what a VM's source said of itself with this host. Takes nothing; may block on the
/// kernel.
pub type Admit =
    Arc<dyn Fn(&v1::PrepareIncomingRequest) -> Result<v1::ChosenVersions, ApiError> + Send + Sync>;

/// Compares what a new VM's memory is to be made of with this host. Takes nothing; may block on the
/// kernel.
pub type Fits = fn(&VmSpec) -> Result<(), ApiError>;
