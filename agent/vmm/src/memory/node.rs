//! NUMA nodes of this host: which there are, and what is free on one.
//!
//! Read from sysfs, below a root that a test may choose. A kernel that knows no nodes has none that
//! could be asked for.

use std::path::Path;

use slat_proto::{ApiError, Reason};

const NODES: &str = "devices/system/node";

/// Whether memory can be taken from that node.
///
/// # Errors
/// NO_SUCH_NODE with the nodes that there are.
pub(super) fn check(sys: &Path, node: u32) -> Result<(), ApiError> {
    let file = sys.join(NODES).join("has_memory");
    let text = std::fs::read_to_string(&file).unwrap_or_default();
    let nodes = text.trim();
    if listed(nodes, node) {
        return Ok(());
    }
    let there = match nodes {
        "" => "its kernel knows none".to_owned(),
        nodes => format!("those with memory are {nodes}"),
    };
    Err(ApiError::new(
        Reason::NoSuchNode,
        format!("this host has no NUMA node {node} with memory: {there}"),
    )
    .with("node", node)
    .with("nodes", nodes)
    .with("advice", "take one of its nodes, or another host"))
}

/// Whether a list as `0-3,8` has that number.
fn listed(list: &str, node: u32) -> bool {
    list.split(',').any(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.trim().parse::<u32>(), last.trim().parse::<u32>()) {
            (Ok(first), Ok(last)) => (first..=last).contains(&node),
            _ => false,
        }
    })
}

/// Whether the node could give so many bytes of ordinary memory now. Where the kernel does not say,
/// it is not checked.
///
/// # Errors
/// NO_MEMORY.
pub(super) fn has_room(sys: &Path, node: u32, needed: u64) -> Result<(), ApiError> {
    let file = sys.join(NODES).join(format!("node{node}/meminfo"));
    let text = std::fs::read_to_string(file).unwrap_or_default();
    match available(&text) {
        Some(free) if free < needed => Err(ApiError::new(
            Reason::NoMemory,
            format!("{needed} bytes are needed on NUMA node {node}, it has {free}"),
        )
        .with("node", node)
        .with("needed_bytes", needed)
        .with("free_bytes", free)
        .with(
            "advice",
            "take another node, another host, or none: then any node gives memory",
        )),
        _ => Ok(()),
    }
}

/// What is free, and what files on a disk keep and could be had back.
fn available(meminfo: &str) -> Option<u64> {
    let figure = |name: &str| {
        let line = meminfo.lines().find(|line| line.contains(name))?;
        let kib: u64 = line
            .split_once(name)?
            .1
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()?;
        kib.checked_mul(1024)
    };
    let files = figure("FilePages:").unwrap_or(0);
    let shared = figure("Shmem:").unwrap_or(0);
    Some(figure("MemFree:")?.saturating_add(files.saturating_sub(shared)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sys(has_memory: &str, meminfo: &str) -> slat_test_dir::TestDir {
        let root = slat_test_dir::TestDir::new();
        let nodes = root.path().join(NODES);
        std::fs::create_dir_all(nodes.join("node2")).unwrap();
        std::fs::write(nodes.join("has_memory"), has_memory).unwrap();
        std::fs::write(nodes.join("node2/meminfo"), meminfo).unwrap();
        root
    }

    #[test]
    fn nodes_are_found_in_ranges_and_a_missing_one_is_refused_by_its_number() {
        let root = sys("0-2,8\n", "");
        for there in [0, 1, 2, 8] {
            check(root.path(), there).unwrap();
        }
        for missing in [3, 7, 9, 1023] {
            let error = check(root.path(), missing).unwrap_err();
            assert_eq!(error.reason, Reason::NoSuchNode);
            assert_eq!(error.metadata["node"], missing.to_string());
            assert_eq!(error.metadata["nodes"], "0-2,8");
        }
        let none = slat_test_dir::TestDir::new();
        let error = check(none.path(), 0).unwrap_err();
        assert!(error.message.contains("knows none"), "{error}");
    }

    #[test]
    fn what_files_keep_counts_as_free_and_guest_memory_does_not() {
        let meminfo = "Node 2 MemTotal: 900 kB\nNode 2 MemFree:  100 kB\n\
                       Node 2 FilePages: 70 kB\nNode 2 Shmem: 30 kB\n";
        let root = sys("2", meminfo);
        has_room(root.path(), 2, 140 << 10).unwrap();
        let error = has_room(root.path(), 2, (140 << 10) + 1).unwrap_err();
        assert_eq!(error.reason, Reason::NoMemory);
        assert_eq!(error.metadata["free_bytes"], (140 << 10).to_string());
        has_room(root.path(), 5, u64::MAX).unwrap();
    }
}
