//! Resource limits of a VM process, and the permissions of files it makes.
//!
//! Memory locks are left alone: KVM and huge pages need none, and what an operator allowed stays.
//! So is the number of processes: the kernel counts it by user, and all VMs of a host may be one
//! user's. That a VM process starts no process is the filter's matter.

use rustix::{
    fs::Mode,
    process::{Resource, Rlimit, getrlimit, setrlimit, umask},
};

/// Descriptors a VM may need: a file a memory slot, of which KVM has 32 Ki, two a vCPU, and one a
/// connection.
const DESCRIPTORS: u64 = 1 << 16;

/// Files made from now on are their owner's alone.
pub(super) fn own_files_only() {
    umask(Mode::RWXG | Mode::RWXO);
}

/// A usual shell and a usual unit leave the soft limit at 0, and the hard one open.
fn allow_cores(lacks: &mut Vec<String>) {
    let most = getrlimit(Resource::Core).maximum;
    let all = Rlimit {
        current: most,
        maximum: most,
    };
    if most == Some(0) {
        lacks.push("core dumps: the hard limit on their size is 0".to_owned());
    } else if let Err(error) = setrlimit(Resource::Core, all) {
        lacks.push(format!("core dumps: {error}"));
    }
}

/// Sets the limits and says how many descriptors there may be.
pub(super) fn apply(core_dumps: bool, lacks: &mut Vec<String>) -> u64 {
    if core_dumps {
        allow_cores(lacks);
    } else {
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        if let Err(error) = setrlimit(Resource::Core, none) {
            lacks.push(format!("no limit on core dumps: {error}"));
        }
    }
    let before = getrlimit(Resource::Nofile);
    let most = before.maximum.unwrap_or(u64::MAX).min(DESCRIPTORS);
    // For good, so that a lower hard limit holds too.
    let wanted = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    match setrlimit(Resource::Nofile, wanted) {
        Ok(()) => most,
        Err(error) => {
            lacks.push(format!("limit on descriptors as it was: {error}"));
            before.current.unwrap_or(u64::MAX)
        }
    }
}
