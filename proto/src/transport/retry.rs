//! How long a call may take and whether it is made again: the one table for every call between
//! processes (command line to server, server to agent, agent to VM process, agent to server,
//! destination to the source's agent).
//!
//! By the class of what went wrong:
//!
//! | class | what | made again |
//! |---|---|---|
//! | unreachable | refused, reset, GOAWAY, broken pipe before the whole answer | if idempotent |
//! | exhausted | this process has no descriptor left | if idempotent |
//! | late | the deadline passed | no: it may be at work still |
//! | broken | a message too large or undecodable, no such method | no: it would be so again |
//! | refused | the peer answered with an error | no |
//!
//! Made again means [`ATTEMPTS`] in all, after [`FIRST_PAUSE`], then doubled, within the deadline.
//!
//! A stream is opened once, within its deadline; who reads it opens it again. Callers have shorter
//! limits of their own where they know better; these are the bounds nothing exceeds.

use std::time::Duration;

/// How often an idempotent call is made at most.
pub(super) const ATTEMPTS: u32 = 3;
/// Before the second attempt; doubles.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// For what a healthy peer answers at once, through every process on the way.
const QUICK: Duration = Duration::from_secs(15);
/// For what starts or ends a process on the way.
const PROCESS: Duration = Duration::from_secs(60);
/// For what measures for a minute at most.
const MEASURE: Duration = Duration::from_secs(90);
/// For what touches all of a VM's memory.
const MEMORY: Duration = Duration::from_secs(330);
/// For what reads a whole file, at the speed of a disk.
const FILE: Duration = Duration::from_secs(3630);

/// How a method is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    /// To the end of the answer; of a stream, to its beginning.
    pub(super) deadline: Duration,
    /// Calling it twice has the effect of calling it once.
    pub(super) idempotent: bool,
    /// The answer is a stream.
    pub(super) streams: bool,
}

const fn policy(deadline: Duration, idempotent: bool) -> Policy {
    Policy {
        deadline,
        idempotent,
        streams: false,
    }
}

/// The row of a method, by its path `/service/method`.
pub(super) fn of(path: &str) -> Policy {
    let method = path.rsplit('/').next().unwrap_or(path);
    match method {
        // Reads.
        "GetVm" | "ListVms" | "GetHost" | "ListHosts" | "ListLeftovers" | "ListSlots"
        | "ListDirtyCursors" | "GetMigration" | "ListMigrations" | "GetTransfer"
        | "DescribeOutgoing" | "Check" | "List" | "GetSave" | "ListSaves" | "ListMappings" => {
            policy(QUICK, true)
        }
        // Changes that say which state they want, or that name what they make.
        "CordonHost" | "UncordonHost" | "CancelMigration" | "CancelTransfer"
        | "ResolveTransfer" | "ReleaseTransfer" => policy(QUICK, true),
        "PrepareIncoming" => policy(PROCESS, true),
        "DigestMemory" => policy(MEMORY, true),
        "VerifySave" => policy(FILE, true),
        // It tries again what failed; nothing while nothing did.
        "RetryPageSource" => policy(PROCESS, true),
        // What is mapped stays mapped.
        "PrefaultMemory" => policy(MEMORY, true),
        // It takes as long as it was asked to.
        "MeasureDirtyRate" => policy(MEASURE, true),
        // Changes that mean something else the second time, or that fail then.
        "StartVm" | "PauseVm" | "ResumeVm" | "StartOutgoing" | "DeleteDirtyCursor" => {
            policy(QUICK, false)
        }
        "CreateMigration" | "DeleteVm" | "DeleteHost" | "AdoptLeftover" | "AdoptTransfer"
        | "DeleteLeftover" | "DeleteSave" => policy(PROCESS, false),
        "CreateVm" | "UpdateSlots" | "InvalidateMemory" | "DiscardMemory" | "HarvestDirtyPages"
        | "HarvestWorkingSet" | "TakeSnapshot" | "CreateSave" | "ForkVm" => policy(MEMORY, false),
        // They may wait until all of a VM's memory is there, or for a hook that powers a host off.
        "RestoreVm" | "BuildCopy" | "FenceHost" => policy(FILE, false),
        // The reporter has a loop of its own, with pauses of its own.
        "RegisterHost" | "ReportHost" => policy(QUICK, false),
        "WatchVm"
        | "WatchMigration"
        | "WatchTransfer"
        | "WatchSave"
        | "Watch"
        | "ServerReflectionInfo" => Policy {
            streams: true,
            ..policy(QUICK, false)
        },
        _ => policy(MEMORY, false),
    }
}

#[cfg(test)]
mod tests {
    use prost_reflect::DescriptorPool;

    use super::*;

    #[test]
    fn every_method_has_a_row_that_knows_whether_it_streams() {
        let pool = DescriptorPool::decode(crate::v1::FILE_DESCRIPTOR_SET).unwrap();
        let unknown = of("/slat.v1.VmService/NoSuchMethod");
        let memory = [
            "CreateVm",
            "UpdateSlots",
            "InvalidateMemory",
            "DiscardMemory",
            "HarvestDirtyPages",
            "HarvestWorkingSet",
            "TakeSnapshot",
            "CreateSave",
            "ForkVm",
        ];
        for service in pool.services() {
            for method in service.methods() {
                let row = of(&format!("/{}/{}", service.full_name(), method.name()));
                assert_eq!(
                    row.streams,
                    method.is_server_streaming(),
                    "{}",
                    method.name()
                );
                assert!(
                    row != unknown || memory.contains(&method.name()),
                    "{} has no row",
                    method.name()
                );
            }
        }
    }
}
