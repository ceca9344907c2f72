//! landlock: which files a VM process can open.
//!
//! Its own directory, with everything in it: a core dump, too, where those are allowed. `/dev/kvm`.
//! And what its libraries and it read: how many processors and how much memory there is, a few
//! random bytes; where it exports traces also what names of hosts are looked up in. Nothing of it
//! can be executed, and no device but `/dev/kvm` takes ioctls. Descriptors that are open already,
//! such as its log, are not affected.
//!
//! It also keeps signals and abstract Unix sockets inside, where the kernel can (Linux 6.12). TCP
//! is left alone: the other side of a migration may have any address.
//!
//! # Files of /proc
//! A rule holds for an inode, and the kernel makes inodes of `/proc` anew when it has dropped the
//! old ones. So those named here stay open, without access, for the life of the process.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use landlock::{
    ABI, Access, AccessFs, BitFlags, LandlockStatus, PathBeneath, PathFd, RestrictionStatus,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::wanted::Confinement;

/// The newest version whose rules are written here.
const KNOWN: ABI = ABI::V6;

/// Read by the standard library (how many threads may run), by libc's allocator, and by admission
/// (free memory, huge pages, NUMA nodes), migration (its ticket) and what says which of its pages
/// are huge.
const READ: [&str; 11] = [
    "/proc/self/cgroup",
    "/proc/self/mountinfo",
    "/proc/meminfo",
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu/online",
    "/sys/fs/cgroup",
    "/sys/devices/system/node",
    "/sys/kernel/mm/hugepages",
    "/sys/kernel/mm/transparent_hugepage",
    "/proc/self/pagemap",
    "/dev/urandom",
];

/// How readily the kernel kills it.
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// What names of hosts are looked up in.
const NAMES: [&str; 6] = [
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
];

/// Files of `/proc` that rules are about.
static KEPT: Mutex<Vec<PathFd>> = Mutex::new(Vec::new());

/// The version of landlock that VM processes get here; `None`: none. Found out by a thread that
/// restricts itself and ends.
#[must_use]
pub fn landlock_supported() -> Option<u32> {
    let tried = std::thread::spawn(|| {
        let rules = Ruleset::default().handle_access(AccessFs::Execute)?;
        rules.create()?.restrict_self()
    });
    let status = tried.join().ok()?.ok()?;
    version(&status.landlock)
}

fn version(status: &LandlockStatus) -> Option<u32> {
    match status {
        LandlockStatus::Available { effective_abi, .. } => {
            u32::try_from((*effective_abi).min(KNOWN) as i32).ok()
        }
        _ => None,
    }
}

/// Restricts the calling thread and those it starts. The version that holds; `None`: none does.
pub(super) fn restrict(wanted: &Confinement, lacks: &mut Vec<String>) -> Option<u32> {
    match rules(wanted).and_then(RulesetCreated::restrict_self) {
        Ok(RestrictionStatus {
            ruleset: RulesetStatus::NotEnforced,
            landlock,
            ..
        }) => {
            lacks.push(match landlock {
                LandlockStatus::NotEnabled => "landlock: switched off in this kernel".to_owned(),
                _ => "landlock: not in this kernel".to_owned(),
            });
            None
        }
        Ok(RestrictionStatus { landlock, .. }) => {
            let version = version(&landlock);
            if let Some(older) = version.filter(|version| *version < KNOWN as u32) {
                lacks.push(format!("landlock: version {older} of {}", KNOWN as u32));
            }
            version
        }
        Err(error) => {
            lacks.push(format!("landlock: {error}"));
            None
        }
    }
}

fn rules(wanted: &Confinement) -> Result<RulesetCreated, RulesetError> {
    let all = AccessFs::from_all(KNOWN);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let own = all
        & !(AccessFs::Execute
            | AccessFs::MakeChar
            | AccessFs::MakeBlock
            | AccessFs::MakeFifo
            | AccessFs::IoctlDev);
    let mut rules = Ruleset::default()
        .handle_access(all)?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let score = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let mut paths = vec![
        (wanted.dir.as_path(), own),
        (Path::new("/dev/kvm"), device),
        (Path::new(OOM_SCORE), score),
    ];
    paths.extend(READ.map(|path| (Path::new(path), read)));
    if wanted.looks_up_hosts {
        paths.extend(NAMES.map(|path| (Path::new(path), read)));
    }
    for (path, access) in paths {
        rules = allow(rules, path, access)?;
    }
    Ok(rules)
}

/// What is not there needs no rule.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(file) = PathFd::new(path) else {
        return Ok(rules);
    };
    // What can only be done in directories is no right of a file.
    let access = if path.is_dir() {
        access
    } else {
        access & AccessFs::from_file(KNOWN)
    };
    let rules = rules.add_rule(PathBeneath::new(&file, access))?;
    if path.starts_with("/proc") {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(file);
    }
    Ok(rules)
}
