//! VM specs and migration parameters, written short. Memory is small: each test takes a few seconds
//! in a debug build.

use std::time::Duration;

use slat_proto::{
    model::proto_duration,
    v1::{self, Backend, DirtyEngine, memstress, migration_params, vm_spec::Guest},
};

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// A VM full of random bytes (so that nothing is elided in transfer) that dirties `rate` bytes a
/// second at random.
#[must_use]
pub fn busy(backend: Backend, memory_mib: u64, vcpus: u32, rate: Option<u64>) -> v1::VmSpec {
    v1::VmSpec {
        memory_bytes: memory_mib * MIB,
        vcpus,
        backend: backend.into(),
        guest: Some(Guest::Memstress(v1::Memstress {
            pattern: memstress::Pattern::Random.into(),
            dirty_rate_bytes_per_second: rate,
            fill: memstress::Fill::Random.into(),
            seed: 7,
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// The usual one: 64 MiB, one vCPU, 1 MiB a second.
#[must_use]
pub fn usual(backend: Backend) -> v1::VmSpec {
    busy(backend, 64, 1, Some(MIB))
}

/// The same, whose written pages are told by that engine.
#[must_use]
pub fn asking(spec: v1::VmSpec, engine: DirtyEngine) -> v1::VmSpec {
    v1::VmSpec {
        dirty_engine: engine.into(),
        ..spec
    }
}

/// No limit.
#[must_use]
pub fn fast() -> v1::MigrationParams {
    v1::MigrationParams::default()
}

/// However slow this machine is: for tests that judge no downtime. Digests of all memory are part
/// of it, and an emulated host takes long for them.
#[must_use]
pub fn patient() -> v1::MigrationParams {
    v1::MigrationParams {
        max_downtime: Some(proto_duration(Duration::from_secs(20))),
        ..Default::default()
    }
}

/// So slow that its first iteration outlasts what a test does to it: 64 MiB take 16 s.
#[must_use]
pub fn crawling() -> v1::MigrationParams {
    paced(4 * MIB)
}

/// Slow enough to be disturbed, quick enough to be waited for: 64 MiB take 4 s.
#[must_use]
pub fn strolling() -> v1::MigrationParams {
    paced(16 * MIB)
}

/// At most that many bytes a second.
#[must_use]
pub fn paced(bytes_per_second: u64) -> v1::MigrationParams {
    v1::MigrationParams {
        max_bandwidth_bytes_per_second: bytes_per_second,
        ..Default::default()
    }
}

/// With digests compared.
#[must_use]
pub fn verified(
    params: v1::MigrationParams,
    verify: migration_params::Verify,
) -> v1::MigrationParams {
    v1::MigrationParams {
        verify: verify.into(),
        ..params
    }
}

/// A protobuf duration as seconds; 0 when unset.
#[must_use]
pub fn seconds(duration: Option<&prost_types::Duration>) -> f64 {
    duration
        .and_then(|duration| Duration::try_from(*duration).ok())
        .map_or(0.0, |duration| duration.as_secs_f64())
}
