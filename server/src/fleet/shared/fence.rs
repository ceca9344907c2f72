//! A host is fenced: what the rest of the server asks of the table about it.

use std::{sync::Arc, time::Instant};

use slat_proto::{ApiError, v1};

use super::{super::fenced::Fenceable, Fleet};

/// A fence of a host runs: no migration begins from it or to it until this is dropped.
#[must_use]
pub(crate) struct BeingFenced {
    fleet: Arc<Fleet>,
    host: String,
}

impl Drop for BeingFenced {
    fn drop(&mut self) {
        self.fleet.table().fence_ends(&self.host);
    }
}

impl Fleet {
    /// A fence of a host begins. One at a time.
    pub(crate) fn fence_begins(self: &Arc<Self>, host: &str) -> BeingFenced {
        self.table().fence_begins(host);
        BeingFenced {
            fleet: Arc::clone(self),
            host: host.to_owned(),
        }
    }

    /// The last fences of the hosts of a migration that is to begin, by their ids; empty: none.
    ///
    /// # Errors
    /// HOST_FENCED: one of them is being fenced.
    pub(crate) fn begin_after(&self, hosts: [&str; 2]) -> Result<[String; 2], ApiError> {
        self.table().begin_after(hosts)
    }

    /// A host that may be fenced, as it is given to a hook.
    ///
    /// # Errors
    /// NO_SUCH_HOST, HOST_IN_USE.
    pub(crate) fn may_fence(&self, host: &str, force: bool) -> Result<Fenceable, ApiError> {
        self.table().may_fence(host, force, Instant::now())
    }

    /// Whether the last start of a host's agent is fenced, on disk or not yet.
    pub(crate) fn is_fenced(&self, host: &str) -> bool {
        self.table().is_fenced(host)
    }

    /// A host's last fence, on disk or not yet.
    pub(crate) fn fence_of(&self, host: &str) -> Option<v1::Fence> {
        self.table().fence_of(host, false)
    }

    /// A host's last fence, once it is on disk. Nothing else may be decided by.
    pub(crate) fn stored_fence(&self, host: &str) -> Option<v1::Fence> {
        self.table().fence_of(host, true)
    }

    /// A host was fenced: shown from now on, and its incarnation refused. Nothing may be decided by
    /// it before [`Fleet::settled`] has said that it is on disk.
    ///
    /// # Errors
    /// NO_SUCH_HOST: it was deleted meanwhile. FENCE_FAILED: its agent was started anew, and
    /// nothing is noted.
    pub(crate) fn fence(&self, host: &str, fence: v1::Fence) -> Result<(), ApiError> {
        self.change(|table| table.fence(host, fence))
    }

    /// The fence of this id is on disk.
    pub(crate) fn fence_is_stored(&self, host: &str, id: &str) {
        self.table().fence_is_stored(host, id);
    }
}
