//! How much memory VMs can have on this machine: what the kernel has, and what the cgroup allows.
//!
//! VM processes live in the agent's cgroup, so a limit there, or on any cgroup above it, holds for
//! all of them together; both versions of cgroups are read. Pages that the machine set aside for
//! hugetlbfs are nobody's here: guest memory is not taken from them. What is counted is all the
//! memory there is, not what is free: when an agent starts again, its VMs run already and their
//! memory is reserved by name, so it would count twice.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use crate::{failure::Failure, term::units::Size};

/// Memory that VMs leave to the host, at least, unless `--memory` says otherwise.
const HOST_SHARE: u64 = 1 << 30;
/// Of a large host, one part in so many.
const HOST_PART: u64 = 16;

/// The most that VMs can have, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ceiling {
    bytes: u64,
    why: Why,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Why {
    /// The machine has no more; so much of it is set aside for hugetlbfs.
    Machine { hugetlb: u64 },
    /// This file says so.
    Cgroup(PathBuf),
}

impl fmt::Display for Ceiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = Size(self.bytes);
        match &self.why {
            Why::Machine { hugetlb: 0 } => write!(f, "the {size} this machine has"),
            Why::Machine { hugetlb } => write!(
                f,
                "the {size} this machine has besides {} set aside for hugetlbfs",
                Size(*hugetlb)
            ),
            Why::Cgroup(limit) => {
                write!(f, "the {size} its cgroup allows ({})", limit.display())
            }
        }
    }
}

/// What VMs may use: as `given`, or by default.
///
/// # Errors
/// When that is 0, or more than there can be; without `given`, when the kernel does not say how
/// much there is.
pub(crate) fn for_vms(given: Option<Size>) -> Result<u64, Failure> {
    choose(
        given,
        ceiling(Path::new("/proc"), Path::new("/sys/fs/cgroup")),
    )
}

fn choose(given: Option<Size>, ceiling: Option<Ceiling>) -> Result<u64, Failure> {
    match (given, ceiling) {
        (Some(Size(0)), _) => Err(Failure::Usage("--memory 0 leaves no VM any memory".into())),
        (Some(given), Some(ceiling)) if given.0 > ceiling.bytes => Err(Failure::value(
            format!("--memory {given} is more than {ceiling}"),
            format!(
                "leave some to the host: --memory {}MiB, which is the default here",
                share(ceiling.bytes) >> 20
            ),
        )),
        (Some(given), Some(_)) => Ok(given.0),
        (Some(given), None) => {
            tracing::warn!("cannot read how much memory this host has; --memory is believed");
            Ok(given.0)
        }
        (None, Some(ceiling)) => {
            let bytes = share(ceiling.bytes);
            tracing::info!(bytes, of = %ceiling, "memory that VMs may use");
            Ok(bytes)
        }
        (None, None) => Err(Failure::advised(
            "cannot read from /proc/meminfo how much memory this host has",
            "say how much VMs may use with --memory",
        )),
    }
}

/// What VMs may use of all: a sixteenth less and at least 1 GiB less, but never less
/// than every second byte, which matters on a small host.
fn share(total: u64) -> u64 {
    let reserve = HOST_SHARE.max(total / HOST_PART);
    total.saturating_sub(reserve).max(total / 2)
}

/// The least of the machine's memory and the limits of the cgroups that this process is in.
fn ceiling(proc: &Path, cgroups: &Path) -> Option<Ceiling> {
    let meminfo = std::fs::read_to_string(proc.join("meminfo")).ok()?;
    let hugetlb = field(&meminfo, "Hugetlb:").unwrap_or(0);
    let machine = Ceiling {
        bytes: field(&meminfo, "MemTotal:")?.saturating_sub(hugetlb),
        why: Why::Machine { hugetlb },
    };
    let own = std::fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    let limits = own.lines().flat_map(|line| limits(line, cgroups));
    limits.chain([machine]).min_by_key(|ceiling| ceiling.bytes)
}

/// The limits that a line of `/proc/self/cgroup` leads to: the cgroup's own and those above it.
fn limits(line: &str, cgroups: &Path) -> Vec<Ceiling> {
    let mut parts = line.splitn(3, ':');
    let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
    else {
        return Vec::new();
    };
    let (root, file) = match controllers {
        "" => (cgroups.to_owned(), "memory.max"),
        list if list.split(',').any(|name| name == "memory") => {
            (cgroups.join("memory"), "memory.limit_in_bytes")
        }
        _ => return Vec::new(),
    };
    let path = path.trim_start_matches('/');
    // `max`, and a path outside this process's view of the hierarchy, are no limit.
    Path::new(path)
        .ancestors()
        .filter_map(|cgroup| {
            let limit = root.join(cgroup).join(file);
            let bytes = std::fs::read_to_string(&limit).ok()?.trim().parse().ok()?;
            Some(Ceiling {
                bytes,
                why: Why::Cgroup(limit),
            })
        })
        .collect()
}

/// `MemAvailable` in bytes.
pub(crate) fn available(meminfo: &str) -> Option<u64> {
    field(meminfo, "MemAvailable:")
}

fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A machine of 8 GiB with these cgroup limits, whose agent is in that cgroup.
    struct Machine(slat_test_dir::TestDir);

    impl Machine {
        fn new(more: &str, cgroup: &str, limits: &[(&str, &str)]) -> Self {
            let dir = slat_test_dir::TestDir::new();
            let write = |path: &str, text: &str| {
                let path = dir.path().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            };
            let meminfo = "MemTotal:        8388608 kB\nMemAvailable:    1 kB\n";
            write("proc/meminfo", &format!("{meminfo}{more}"));
            write("proc/self/cgroup", cgroup);
            for (path, text) in limits {
                write(&format!("cgroup/{path}"), text);
            }
            Self(dir)
        }

        fn choose(&self, given: Option<u64>) -> Result<u64, String> {
            let [proc, cgroups] = ["proc", "cgroup"].map(|name| self.0.path().join(name));
            choose(given.map(Size), ceiling(&proc, &cgroups)).map_err(|failure| failure.render())
        }
    }

    #[test]
    fn more_than_the_machine_has_is_refused_with_both_figures() {
        let machine = Machine::new("", "0::/\n", &[]);
        assert_eq!(machine.choose(Some(8 * GIB)), Ok(8 * GIB));
        // Running VMs do not shrink the default: an agent may start again over them.
        assert_eq!(machine.choose(None), Ok(7 * GIB));
        let refused = machine.choose(Some(9 * GIB)).unwrap_err();
        for words in [
            "--memory 9 GiB",
            "the 8 GiB this machine has",
            "--memory 7168MiB",
        ] {
            assert!(refused.contains(words), "{words}: {refused}");
        }
        assert!(machine.choose(Some(0)).is_err());
    }

    #[test]
    fn pages_of_hugetlbfs_are_not_for_vms() {
        let machine = Machine::new("Hugetlb:         2097152 kB\n", "0::/\n", &[]);
        let refused = machine.choose(Some(7 * GIB)).unwrap_err();
        assert!(refused.contains("the 6 GiB this machine has"), "{refused}");
        assert!(refused.contains("2 GiB set aside"), "{refused}");
        assert_eq!(machine.choose(None), Ok(5 * GIB));
    }

    #[test]
    fn the_least_limit_of_the_cgroups_counts_and_is_named() {
        let four = (4 * GIB).to_string();
        let two = [
            ("a.slice/b.service/memory.max", "max\n"),
            ("a.slice/memory.max", four.as_str()),
        ];
        let machine = Machine::new("", "0::/a.slice/b.service\n", &two);
        let refused = machine.choose(Some(5 * GIB)).unwrap_err();
        assert!(refused.contains("the 4 GiB its cgroup allows"), "{refused}");
        assert!(refused.contains("a.slice/memory.max"), "{refused}");
        assert_eq!(machine.choose(Some(4 * GIB)), Ok(4 * GIB));
        assert_eq!(machine.choose(None), Ok(3 * GIB));

        let one = [
            ("memory/vms/memory.limit_in_bytes", four.as_str()),
            ("memory/memory.limit_in_bytes", "9223372036854771712"),
        ];
        let old = Machine::new("", "5:devices:/\n4:memory:/vms\n0::/\n", &one);
        let refused = old.choose(Some(5 * GIB)).unwrap_err();
        assert!(
            refused.contains("memory/vms/memory.limit_in_bytes"),
            "{refused}"
        );
        // A limit above all that there is changes nothing.
        let far = [("memory.max", "99999999999999")];
        let machine = Machine::new("", "0::/x\n", &far);
        assert_eq!(machine.choose(Some(8 * GIB)), Ok(8 * GIB));
    }

    #[test]
    fn the_share_leaves_something_on_every_host() {
        assert_eq!(share(64 * GIB), 60 * GIB);
        assert_eq!(share(GIB), GIB / 2);
    }

    #[test]
    fn available_memory_is_read_in_bytes() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:    8388608 kB\nBuffers: 1 kB\n";
        assert_eq!(available(text), Some(8 * GIB));
        assert_eq!(available("MemTotal: 1 kB"), None);
    }
}
