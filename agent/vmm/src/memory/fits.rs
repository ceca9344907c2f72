//! Whether this host has what a mode takes: pages set aside, settings that give huge ones, a NUMA
//! node.
//!
//! Read from sysfs, below a root that a test may choose. What is not said there is not refused
//! here: the kernel has the last word when memory is mapped.

use std::path::Path;

use slat_proto::{ApiError, Reason, model::MemoryBacking};

use super::{mode::Mode, node, pools::Pool};

/// Where the kernel says it.
const SYS: &str = "/sys";
const THP: &str = "kernel/mm/transparent_hugepage";

/// Whether this host's settings and its kernel allow for memory of that kind; how much there is of
/// it is not looked at.
///
/// # Errors
/// CAPABILITY_MISSING, NO_SUCH_NODE.
pub(crate) fn check_mode(mode: Mode) -> Result<(), ApiError> {
    Host::new(Path::new(SYS)).allows(mode)
}

/// The same, and whether so many bytes can be reserved now, for what is reserved, or are free on
/// its node.
///
/// # Errors
/// CAPABILITY_MISSING, NO_SUCH_NODE, NO_HUGE_PAGES, NO_MEMORY.
pub(crate) fn check_room(mode: Mode, bytes: u64) -> Result<(), ApiError> {
    Host::new(Path::new(SYS)).has_room(mode, bytes)
}

/// The kernel refused to reserve `bytes`: NO_HUGE_PAGES, with what there is.
pub(crate) fn no_huge_pages(backing: MemoryBacking, bytes: u64) -> Option<ApiError> {
    let page = backing.reserved_page()?;
    Some(Pool::read(Path::new(SYS), page).refuse(backing, bytes))
}

/// A host as its sysfs shows it.
struct Host<'a> {
    sys: &'a Path,
}

impl<'a> Host<'a> {
    fn new(sys: &'a Path) -> Self {
        Self { sys }
    }

    fn allows(&self, mode: Mode) -> Result<(), ApiError> {
        if let Some(node) = mode.node {
            node::check(self.sys, node)?;
        }
        match mode.backing {
            MemoryBacking::Auto | MemoryBacking::Small => Ok(()),
            MemoryBacking::Thp => self.gives_huge_pages(),
            MemoryBacking::Hugetlb2M | MemoryBacking::Hugetlb1G => {
                let page = mode.backing.reserved_page().unwrap_or_default();
                let pool = Pool::read(self.sys, page);
                if pool.dir.is_dir() {
                    return Ok(());
                }
                Err(missing(
                    mode.backing,
                    format!("this host's kernel has no pages of {page} bytes to set aside"),
                    "take another backing, or another host",
                )
                .with("page_bytes", page))
            }
        }
    }

    fn has_room(&self, mode: Mode, bytes: u64) -> Result<(), ApiError> {
        self.allows(mode)?;
        let Some(page) = mode.backing.reserved_page() else {
            return match mode.node {
                Some(node) => node::has_room(self.sys, node, bytes),
                None => Ok(()),
            };
        };
        let needed = bytes.div_ceil(page);
        let whole = Pool::read(self.sys, page);
        let of_node = mode.node.map(|node| Pool::of_node(self.sys, page, node));
        // A reservation is the host's, not a node's: both must have them.
        for pool in [Some(whole), of_node].into_iter().flatten() {
            if pool.free().is_some_and(|free| free < needed) {
                return Err(pool.refuse(mode.backing, bytes));
            }
        }
        Ok(())
    }

    /// Whether a memfd gets huge pages at a touch, with MADV_HUGEPAGE.
    fn gives_huge_pages(&self) -> Result<(), ApiError> {
        let dir = self.sys.join(THP);
        let (all, own) = (
            dir.join("shmem_enabled"),
            dir.join("hugepages-2048kB/shmem_enabled"),
        );
        let Some(general) = chosen(&all) else {
            return Err(missing(
                MemoryBacking::Thp,
                "this host's kernel has no transparent huge pages for shared memory".to_owned(),
                "take another backing, or another host",
            ));
        };
        let gives = |word: &str| matches!(word, "always" | "within_size" | "advise");
        let (file, word) = match (general.as_str(), chosen(&own)) {
            ("force", _) => return Ok(()),
            // The size's own setting counts, where there is one; "deny" is above it.
            ("deny", _) | (_, None) => (all, general),
            (_, Some(word)) if word == "inherit" => (all, general),
            (_, Some(word)) => (own, word),
        };
        if gives(&word) {
            return Ok(());
        }
        let file = file.display();
        Err(missing(
            MemoryBacking::Thp,
            format!("{file} says {word}: a memfd gets no huge pages at a touch"),
            &format!("echo advise > {file}, or take backing auto, which needs no such setting"),
        )
        .with("file", file)
        .with("value", &word))
    }
}

fn missing(backing: MemoryBacking, why: String, advice: &str) -> ApiError {
    ApiError::new(
        Reason::CapabilityMissing,
        format!("memory cannot be {backing} here: {why}"),
    )
    .with("capability", format_args!("backing {backing}"))
    .with("backing", backing)
    .with("advice", advice)
}

/// The chosen word of a setting: `always [never]`.
fn chosen(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

impl Pool {
    fn refuse(&self, backing: MemoryBacking, bytes: u64) -> ApiError {
        let needed = bytes.div_ceil(self.page);
        let free = self.free().unwrap_or(0);
        let file = self.dir.join("nr_hugepages");
        let file = file.display().to_string();
        ApiError::new(
            Reason::NoHugePages,
            format!(
                "{needed} pages of {} bytes are needed for {backing} memory, {free} are free: {file} \
                 sets aside too few",
                self.page
            ),
        )
        .with("backing", backing)
        .with("page_bytes", self.page)
        .with("needed_pages", needed)
        .with("free_pages", free)
        .with("needed_bytes", bytes)
        .with("file", &file)
        .with(
            "advice",
            format_args!("write a number that is larger by {} to {file}, on that host", needed.saturating_sub(free)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sys(files: &[(&str, &str)]) -> slat_test_dir::TestDir {
        let root = slat_test_dir::TestDir::new();
        for (path, text) in files {
            let path = root.path().join("kernel/mm").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    fn of(backing: MemoryBacking) -> Mode {
        Mode {
            backing,
            node: None,
        }
    }

    #[test]
    fn what_is_reserved_or_in_use_is_not_free_and_what_may_be_made_is() {
        let pool = |free, reserved, overcommit, surplus| {
            let root = sys(&[
                ("hugepages/hugepages-2048kB/free_hugepages", free),
                ("hugepages/hugepages-2048kB/resv_hugepages", reserved),
                (
                    "hugepages/hugepages-2048kB/nr_overcommit_hugepages",
                    overcommit,
                ),
                ("hugepages/hugepages-2048kB/surplus_hugepages", surplus),
            ]);
            let host = Host::new(root.path());
            host.has_room(of(MemoryBacking::Hugetlb2M), 10 << 21)
        };
        pool("10\n", "0\n", "0\n", "0\n").unwrap();
        pool("12\n", "2\n", "0\n", "0\n").unwrap();
        pool("2\n", "0\n", "9\n", "1\n").unwrap();
        let error = pool("12\n", "3\n", "1\n", "1\n").unwrap_err();
        assert_eq!(error.reason, Reason::NoHugePages);
        assert_eq!(error.metadata["free_pages"], "9");
        assert_eq!(error.metadata["needed_pages"], "10");
        assert!(error.metadata["file"].ends_with("hugepages-2048kB/nr_hugepages"));
        assert!(
            error.metadata["advice"].contains("larger by 1 to"),
            "{error:?}"
        );
    }

    #[test]
    fn a_node_must_have_them_too() {
        let root = sys(&[("hugepages/hugepages-2048kB/free_hugepages", "10")]);
        let node = root.path().join("devices/system/node");
        let pool = node.join("node1/hugepages/hugepages-2048kB");
        std::fs::create_dir_all(&pool).unwrap();
        std::fs::write(node.join("has_memory"), "0-1").unwrap();
        std::fs::write(pool.join("free_hugepages"), "4").unwrap();
        let host = Host::new(root.path());
        let mode = Mode {
            backing: MemoryBacking::Hugetlb2M,
            node: Some(1),
        };
        host.has_room(mode, 4 << 21).unwrap();
        let error = host.has_room(mode, 5 << 21).unwrap_err();
        assert!(error.metadata["file"].contains("node1"), "{error:?}");
        let mode = Mode {
            node: Some(2),
            ..mode
        };
        assert_eq!(host.allows(mode).unwrap_err().reason, Reason::NoSuchNode);
    }

    #[test]
    fn a_size_that_the_kernel_lacks_is_named() {
        let root = sys(&[("hugepages/hugepages-2048kB/free_hugepages", "0")]);
        let host = Host::new(root.path());
        host.allows(of(MemoryBacking::Hugetlb2M)).unwrap();
        let error = host.has_room(of(MemoryBacking::Hugetlb1G), 1 << 30);
        let error = error.unwrap_err();
        assert_eq!(error.reason, Reason::CapabilityMissing);
        assert_eq!(error.metadata["page_bytes"], (1 << 30).to_string());
        for any in [MemoryBacking::Auto, MemoryBacking::Small] {
            host.has_room(of(any), u64::MAX).unwrap();
        }
    }

    #[test]
    fn settings_that_give_a_memfd_no_huge_pages_are_refused_by_file_and_word() {
        const ALL: &str = "transparent_hugepage/shmem_enabled";
        const OWN: &str = "transparent_hugepage/hugepages-2048kB/shmem_enabled";
        let ask = |files: &[(&str, &str)]| {
            let root = sys(files);
            let answer = Host::new(root.path()).allows(of(MemoryBacking::Thp));
            answer.map_err(|error| {
                assert_eq!(error.reason, Reason::CapabilityMissing);
                (
                    error.metadata.get("value").cloned().unwrap_or_default(),
                    error
                        .metadata
                        .get("file")
                        .is_some_and(|file| file.contains("2048kB")),
                )
            })
        };
        let never = "always within_size advise [never] deny force";
        let advise = "always within_size [advise] never deny force";
        let inherit = "always [inherit] within_size advise never";
        assert_eq!(ask(&[(ALL, advise)]), Ok(()));
        assert_eq!(ask(&[(ALL, never)]), Err(("never".to_owned(), false)));
        assert_eq!(ask(&[(ALL, advise), (OWN, inherit)]), Ok(()));
        assert_eq!(
            ask(&[(ALL, never), (OWN, inherit)]),
            Err(("never".to_owned(), false))
        );
        assert_eq!(ask(&[(ALL, never), (OWN, "[always] never")]), Ok(()));
        assert_eq!(
            ask(&[(ALL, advise), (OWN, "always [never]")]),
            Err(("never".to_owned(), true))
        );
        let deny = "never [deny] force";
        assert_eq!(
            ask(&[(ALL, deny), (OWN, "[always]")]),
            Err(("deny".to_owned(), false))
        );
        assert_eq!(ask(&[(ALL, "deny [force]"), (OWN, "[never]")]), Ok(()));
        assert_eq!(ask(&[]), Err((String::new(), false)));
    }
}
