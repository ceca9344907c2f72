//! Keeps what a server or an agent has in memory, private keys above all, from other processes of
//! its user: they can neither trace it nor read `/proc/PID/mem` and `environ`, and it leaves no
//! core dump. Root may still do the first two.
//!
//! It holds for this process alone and not for what it starts: a VM's process keeps its own rule.

use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::failure::Failure;

/// From here on until the process ends. Before any key is read.
pub(crate) fn begin() -> Result<(), Failure> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|error| {
        Failure::local(format!(
            "cannot keep this process's memory from others: {error}"
        ))
    })
}
