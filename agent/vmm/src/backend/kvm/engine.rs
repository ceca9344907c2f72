//! Which engine tells what a VM wrote: the kernel's bitmaps or its dirty rings.
//!
//! The spec's wish is kept to, or refused by name. Without a wish the host decides, by what it has
//! and by the VM's size: a harvest of a bitmap costs what the memory's size costs, also when
//! nothing was written, one of rings what was written. docs/benchmarks.md has the figures.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use slat_proto::model::{DirtyEngine, VmSpec};

use super::{
    super::{BackendError, traits::EngineInUse},
    refuse::unsupported,
    ring::{self, Rings},
    slots::Log,
};

/// From this size on, a VM without a wish gets rings where the host has them: there a look at a
/// bitmap without a dirty page takes most of a millisecond, a twentieth of what an idle VM's
/// downtime may be.
pub(super) const RINGS_FROM: u64 = 256 << 30;

/// How a VM shall log, and with what; tests vary it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    /// What the spec asks for.
    pub(super) wish: Option<DirtyEngine>,
    /// The VM's memory.
    pub(super) memory_bytes: u64,
    /// Bitmaps are cleared by calls of their own, where the kernel has that (Linux 5.0).
    pub(super) manual_protect: bool,
    /// Rings are used where the kernel has them.
    pub(super) rings: bool,
    /// Entries of a ring at most.
    pub(super) ring_entries: usize,
}

impl Choice {
    /// For a VM as its spec has it.
    pub(super) fn of(spec: &VmSpec) -> Self {
        Self {
            wish: spec.dirty_engine,
            memory_bytes: spec.memory_bytes,
            manual_protect: true,
            rings: true,
            ring_entries: ring::ENTRIES,
        }
    }

    /// The engine, and why.
    fn decide(&self, has_rings: bool) -> Result<(DirtyEngine, String), BackendError> {
        let gib = RINGS_FROM >> 30;
        Ok(match self.wish {
            Some(DirtyEngine::Ring) if !has_rings => return Err(no_rings()),
            Some(wish) => (wish, "asked for".to_owned()),
            None if !has_rings => (
                DirtyEngine::Bitmap,
                "this host's KVM has no dirty rings".to_owned(),
            ),
            None if self.memory_bytes < RINGS_FROM => (
                DirtyEngine::Bitmap,
                format!("the VM has less than {gib} GiB"),
            ),
            None => (DirtyEngine::Ring, format!("the VM has {gib} GiB or more")),
        })
    }

    /// Readies a VM that has no vCPUs yet.
    pub(super) fn enable(&self, vm: &Arc<VmFd>) -> Result<(Log, EngineInUse), BackendError> {
        let (engine, reason) = self.decide(self.rings && ring::is_offered(vm))?;
        let log = match engine {
            DirtyEngine::Bitmap => Log::bitmap(vm, self.manual_protect)?,
            DirtyEngine::Ring => {
                Log::Rings(Rings::enable(vm, self.ring_entries)?.ok_or_else(no_rings)?)
            }
        };
        let reason = match &log {
            Log::Rings(rings) => format!("{reason}; {} entries a vCPU", rings.entries()),
            Log::Bitmap { .. } => reason,
        };
        Ok((log, EngineInUse { engine, reason }))
    }
}

fn no_rings() -> BackendError {
    unsupported("keep a dirty ring: this host's kernel has no KVM_CAP_DIRTY_LOG_RING")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(
        wish: Option<DirtyEngine>,
        memory_bytes: u64,
        has_rings: bool,
    ) -> Result<DirtyEngine, String> {
        let choice = Choice {
            wish,
            memory_bytes,
            manual_protect: true,
            rings: true,
            ring_entries: ring::ENTRIES,
        };
        let decided = choice.decide(has_rings);
        decided
            .map(|(engine, _)| engine)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_wish_is_kept_or_refused_and_without_one_the_host_decides() {
        use DirtyEngine::{Bitmap, Ring};
        let (small, large) = (1 << 30, RINGS_FROM);
        for (wish, memory, has_rings, engine) in [
            (Some(Bitmap), large, true, Bitmap),
            (Some(Ring), small, true, Ring),
            (None, small, true, Bitmap),
            (None, large, true, Ring),
            (None, large, false, Bitmap),
        ] {
            assert_eq!(decide(wish, memory, has_rings), Ok(engine));
        }
        let refused = decide(Some(Ring), large, false).unwrap_err();
        assert!(refused.contains("KVM_CAP_DIRTY_LOG_RING"), "{refused}");
    }
}
