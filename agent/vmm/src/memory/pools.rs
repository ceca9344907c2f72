//! The pages that this host set aside, by size, of the whole host and of each NUMA node: what its
//! agent reports, so that a VM which needs some is not sent where there are too few.
//!
//! Read from sysfs, below a root that a test may choose. Of a node the kernel does not say what is
//! reserved there, so its free pages may be more than can be had; the whole host's are exact when
//! they are read. Either may be another a moment later: the host's own admission decides.

use std::path::{Path, PathBuf};

use slat_proto::v1;

/// Where the kernel says it.
const SYS: &str = "/sys";
const WHOLE: &str = "kernel/mm/hugepages";
const NODES: &str = "devices/system/node";
/// More than any kernel has.
const MOST_NODES: usize = 1024;

/// All pools; those of the whole host first, then by node, each by size. Reads some small files.
#[must_use]
pub fn huge_page_pools() -> v1::HugePages {
    pools(Path::new(SYS))
}

fn pools(sys: &Path) -> v1::HugePages {
    let mut pools = of_dir(&sys.join(WHOLE), None);
    let nodes = numbered(&sys.join(NODES), "node", "");
    for (node, dir) in nodes.into_iter().take(MOST_NODES) {
        if let Ok(node) = u32::try_from(node) {
            pools.extend(of_dir(&dir.join("hugepages"), Some(node)));
        }
    }
    v1::HugePages { pools }
}

fn of_dir(dir: &Path, node: Option<u32>) -> Vec<v1::HugePagePool> {
    let sizes = numbered(dir, "hugepages-", "kB");
    let pool = |(kib, dir): (u64, PathBuf)| Pool::new(dir, kib << 10).shown(node);
    sizes.into_iter().filter_map(pool).collect()
}

/// What a folder has that is called `before`, a number, `after`; by number.
fn numbered(dir: &Path, before: &str, after: &str) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let number = |name: &str| {
        let digits = name.strip_prefix(before)?.strip_suffix(after)?;
        // No more digits than a size has: nothing overflows.
        digits.parse().ok().filter(|number| *number < 1 << 40)
    };
    let mut found: Vec<(u64, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| Some((number(entry.file_name().to_str()?)?, entry.path())))
        .collect();
    found.sort_unstable();
    found
}

/// Pages of one size that a host set aside, or a node of it has.
pub(super) struct Pool {
    pub(super) dir: PathBuf,
    pub(super) page: u64,
}

impl Pool {
    fn new(dir: PathBuf, page: u64) -> Self {
        Self { dir, page }
    }

    /// The whole host's.
    pub(super) fn read(sys: &Path, page: u64) -> Self {
        let dir = format!("{WHOLE}/hugepages-{}kB", page >> 10);
        Self::new(sys.join(dir), page)
    }

    /// The part of it that lies on a node, which does not say what of it is reserved.
    pub(super) fn of_node(sys: &Path, page: u64, node: u32) -> Self {
        let dir = format!("{NODES}/node{node}/hugepages/hugepages-{}kB", page >> 10);
        Self::new(sys.join(dir), page)
    }

    fn figure(&self, file: &str) -> Option<u64> {
        let text = std::fs::read_to_string(self.dir.join(file)).ok()?;
        text.trim().parse().ok()
    }

    /// Pages that can be reserved now: free ones that nobody has reserved, and those that the
    /// kernel may make besides.
    pub(super) fn free(&self) -> Option<u64> {
        let unreserved = self
            .figure("free_hugepages")?
            .saturating_sub(self.figure("resv_hugepages").unwrap_or(0));
        let more = self.figure("nr_overcommit_hugepages").unwrap_or(0);
        let used = self.figure("surplus_hugepages").unwrap_or(0);
        Some(unreserved.saturating_add(more.saturating_sub(used)))
    }

    /// `None`: it went while it was read.
    fn shown(&self, node: Option<u32>) -> Option<v1::HugePagePool> {
        Some(v1::HugePagePool {
            page_bytes: self.page,
            node,
            total_pages: self.figure("nr_hugepages")?,
            free_pages: self.free()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, dir: &str, files: &[(&str, &str)]) {
        let dir = root.join(dir);
        std::fs::create_dir_all(&dir).unwrap();
        for (name, text) in files {
            std::fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn every_size_of_the_host_and_of_each_node_is_told() {
        let root = slat_test_dir::TestDir::new();
        let (two, one) = ("hugepages-2048kB", "hugepages-1048576kB");
        let whole = |size| format!("{WHOLE}/{size}");
        let of = |node: u32, size| format!("{NODES}/node{node}/hugepages/{size}");
        write(
            root.path(),
            &whole(two),
            &[
                ("nr_hugepages", "20\n"),
                ("free_hugepages", "12\n"),
                ("resv_hugepages", "5\n"),
                ("nr_overcommit_hugepages", "3\n"),
                ("surplus_hugepages", "1\n"),
            ],
        );
        let none = [("nr_hugepages", "0"), ("free_hugepages", "0")];
        write(root.path(), &whole(one), &none);
        let ten = [("nr_hugepages", "10"), ("free_hugepages", "6")];
        write(root.path(), &of(10, two), &ten);
        write(root.path(), &of(2, two), &ten);
        // What is not a pool, or went, is left out.
        write(root.path(), &whole("hugepages-64kB"), &[]);
        write(root.path(), &whole("hugepages-xkB"), &ten);
        write(
            root.path(),
            &whole("hugepages-18446744073709551615kB"),
            &ten,
        );
        write(root.path(), &format!("{NODES}/power"), &[]);
        let told: Vec<_> = pools(root.path())
            .pools
            .iter()
            .map(|pool| {
                let pages = (pool.total_pages, pool.free_pages);
                (pool.node, pool.page_bytes, pages)
            })
            .collect();
        assert_eq!(
            told,
            [
                (None, 2 << 20, (20, 9)),
                (None, 1 << 30, (0, 0)),
                (Some(2), 2 << 20, (10, 6)),
                (Some(10), 2 << 20, (10, 6)),
            ]
        );
        assert!(pools(&root.path().join("none")).pools.is_empty());
    }
}
