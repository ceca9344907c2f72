//! Whether a VM that is announced could live on this host: a port, filled by the binary, since only
//! the code of VM processes knows backends and CPUs.

use std::sync::Arc;

use slat_proto::{ApiError, v1};

/// Compares what a VM's source said of itself with this host. Takes nothing; may block on the
/// kernel.
pub type Admit =
    Arc<dyn Fn(&v1::PrepareIncomingRequest) -> Result<v1::ChosenVersions, ApiError> + Send + Sync>;
