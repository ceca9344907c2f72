//! Which saves a VM's memory still comes from: `<vm dir>/saves`, one id a line.
//!
//! Written before the VM is made, so that no order can take a file away from it; what it says holds
//! while the VM has not loaded all of its page source. The descriptors are the VM process's own: a
//! file that is removed by hand takes nothing from the VM, only its disk space is not given back.

use std::io;

use slat_record::dir::VmDir;

use crate::living::LiveVm;

fn path(dir: &VmDir) -> std::path::PathBuf {
    dir.path().join("saves")
}

/// Writes which saves the VM in `dir` is made of.
///
/// # Errors
/// What the kernel says.
pub(crate) fn note(dir: &VmDir, ids: &[String]) -> io::Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    std::fs::write(path(dir), ids.join("\n"))
}

/// The saves that a VM needs now.
pub(crate) fn needed_by(live: &LiveVm) -> Vec<String> {
    let Ok(text) = std::fs::read_to_string(path(live.dir())) else {
        return Vec::new();
    };
    // A VM that says nothing may need them.
    let said = live.snapshot().filter(|_| !live.is_silent());
    let loaded = said.is_some_and(|vm| {
        let paging = vm.paging.unwrap_or_default();
        paging.loaded_bytes >= paging.source_bytes
    });
    if loaded {
        return Vec::new();
    }
    text.lines().map(str::to_owned).collect()
}
