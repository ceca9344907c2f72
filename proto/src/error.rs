//! The error that every API endpoint speaks.
//!
//! A failure is a gRPC code and one `google.rpc.ErrorInfo` with a bounded `reason`, the domain
//! [`DOMAIN`] and metadata; every value that the message interpolates is in the metadata too
//! (AIP-193). Programs look at the reason, never at the text. Metadata keys with a fixed meaning:
//! `vm`, `host`, `migration`, `slot`, `phase`, `side`, `vm_location`, `advice`.

use std::{
    collections::{BTreeMap, HashMap},
    error::Error,
    fmt, io,
    path::Path,
};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::v1;

/// `ErrorInfo.domain` of every error made by Slat.
pub const DOMAIN: &str = "slat.dev";

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $text:literal => $code:ident,)*) => {
        /// What failed, in bounded words. Each reason has exactly one gRPC code.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// Every reason there is.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The wire form, UPPER_SNAKE.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Reason::$variant => $text,)* }
            }

            /// The gRPC code it travels with.
            #[must_use]
            pub const fn code(self) -> Code {
                match self { $(Reason::$variant => Code::$code,)* }
            }

            /// The reason whose wire form is `text`.
            #[must_use]
            pub fn parse(text: &str) -> Option<Reason> {
                match text { $($text => Some(Reason::$variant),)* _ => None }
            }
        }
    };
}

reasons! {
    /// A request field is missing or out of range; metadata `field`.
    BadParameter = "BAD_PARAMETER" => InvalidArgument,
    /// A slot overlaps, is unaligned, wraps, is too large or names no memory; metadata `slot`.
    BadSlotTable = "BAD_SLOT_TABLE" => InvalidArgument,
    /// The VM is not in the state the call needs; metadata `state`.
    VmNotRunning = "VM_NOT_RUNNING" => FailedPrecondition,
    /// The VM must be stopped for this.
    VmRunning = "VM_RUNNING" => FailedPrecondition,
    /// The VM's state forbids the call; metadata `state`.
    VmState = "VM_STATE" => FailedPrecondition,
    /// The VM cannot be migrated; metadata `blocked_reasons`.
    MigrationBlocked = "MIGRATION_BLOCKED" => FailedPrecondition,
    /// Source and destination CPUs differ.
    CpuIncompatible = "CPU_INCOMPATIBLE" => FailedPrecondition,
    /// Source and destination are of different architectures.
    IsaMismatch = "ISA_MISMATCH" => FailedPrecondition,
    /// Source and destination count pages of different sizes; metadata `source`, `destination`.
    PageSizeMismatch = "PAGE_SIZE_MISMATCH" => FailedPrecondition,
    /// The backend or host lacks what the call needs; metadata `capability`.
    CapabilityMissing = "CAPABILITY_MISSING" => FailedPrecondition,
    /// The VM is on that host already.
    SameHost = "SAME_HOST" => FailedPrecondition,
    /// The caller's or this process's epoch is not the VM's current one.
    StaleEpoch = "STALE_EPOCH" => FailedPrecondition,
    /// The agent's incarnation is not the registered one.
    StaleIncarnation = "STALE_INCARNATION" => FailedPrecondition,
    /// Source and destination share no version of the protocol or of the state; metadata `differs`.
    StateVersionUnsupported = "STATE_VERSION_UNSUPPORTED" => FailedPrecondition,
    /// The source has relinquished the VM; the migration will complete.
    PastPointOfNoReturn = "PAST_POINT_OF_NO_RETURN" => FailedPrecondition,
    /// The slot table changed since the caller looked.
    StaleGeneration = "STALE_GENERATION" => Aborted,
    /// The VM migrates already, or the call cannot be made while it does; metadata `migration`.
    MigrationInProgress = "MIGRATION_IN_PROGRESS" => AlreadyExists,
    /// A VM of that name exists.
    VmExists = "VM_EXISTS" => AlreadyExists,
    /// Several VMs have that name; metadata `uids`, `hosts`. Name a uid or a host.
    NameConflict = "NAME_CONFLICT" => FailedPrecondition,
    /// An agent of that name reports already; metadata `host`, `address`.
    HostNameTaken = "HOST_NAME_TAKEN" => AlreadyExists,
    /// The host takes no new VM and no migration.
    HostCordoned = "HOST_CORDONED" => FailedPrecondition,
    /// The host still reports, or holds VMs that were not given up; metadata `vms`.
    HostInUse = "HOST_IN_USE" => FailedPrecondition,
    /// A host of the migration was deleted by order while it was under way, or an agent's own host
    /// is being deleted; metadata `host`.
    HostDeleted = "HOST_DELETED" => FailedPrecondition,
    /// The order gives something up and did not say so; metadata `gives_up`.
    GiveUpRequired = "GIVE_UP_REQUIRED" => FailedPrecondition,
    /// Nothing of that uid lies there.
    NoSuchLeftover = "NO_SUCH_LEFTOVER" => NotFound,
    /// A limit on downtime that cannot be met; metadata `predicted_ms`, `max_downtime_ms`.
    DowntimeUnreachable = "DOWNTIME_UNREACHABLE" => FailedPrecondition,
    /// A message is larger than this endpoint takes; metadata `limit_bytes`.
    MessageTooLarge = "MESSAGE_TOO_LARGE" => ResourceExhausted,
    /// A message cannot be decoded.
    MessageUndecodable = "MESSAGE_UNDECODABLE" => InvalidArgument,
    /// This endpoint does not serve that service or method.
    NoSuchMethod = "NO_SUCH_METHOD" => Unimplemented,
    /// The disk is full; metadata `path`.
    DiskFull = "DISK_FULL" => ResourceExhausted,
    /// The process has no file descriptor left.
    DescriptorsExhausted = "DESCRIPTORS_EXHAUSTED" => ResourceExhausted,
    /// A migration of that name exists with other contents.
    MigrationExists = "MIGRATION_EXISTS" => AlreadyExists,
    /// No VM of that name here.
    NoSuchVm = "NO_SUCH_VM" => NotFound,
    /// No host of that name.
    NoSuchHost = "NO_SUCH_HOST" => NotFound,
    /// No migration of that name.
    NoSuchMigration = "NO_SUCH_MIGRATION" => NotFound,
    /// No slot of that number.
    NoSuchSlot = "NO_SUCH_SLOT" => NotFound,
    /// No dirty cursor of that name.
    NoSuchCursor = "NO_SUCH_CURSOR" => NotFound,
    /// The destination lacks memory; metadata `needed_bytes`, `free_bytes`.
    DstNoMemory = "DST_NO_MEMORY" => ResourceExhausted,
    /// This host lacks memory for a new VM; metadata `needed_bytes`, `free_bytes`.
    NoMemory = "NO_MEMORY" => ResourceExhausted,
    /// The host has too few pages set aside; metadata `page_bytes`, `needed_pages`, `free_pages`,
    /// `file`.
    NoHugePages = "NO_HUGE_PAGES" => ResourceExhausted,
    /// The host has no such NUMA node; metadata `node`, `nodes`.
    NoSuchNode = "NO_SUCH_NODE" => FailedPrecondition,
    /// A save of that name exists on that host.
    SaveExists = "SAVE_EXISTS" => AlreadyExists,
    /// No save of that name.
    NoSuchSave = "NO_SUCH_SAVE" => NotFound,
    /// A VM is being restored from the save, or another save is built on it; metadata `users`.
    SaveInUse = "SAVE_IN_USE" => FailedPrecondition,
    /// The save is not whole yet, or failed; metadata `state`.
    SaveNotWritten = "SAVE_NOT_WRITTEN" => FailedPrecondition,
    /// A saved file is not what was written; metadata `file`.
    SaveCorrupt = "SAVE_CORRUPT" => DataLoss,
    /// The pages of a VM cannot be read where they are to come from.
    PageSourceGone = "PAGE_SOURCE_GONE" => Unavailable,
    /// Where a VM's pages come from ends before it should.
    PageSourceTruncated = "PAGE_SOURCE_TRUNCATED" => DataLoss,
    /// Where a VM's pages come from gives other pages than were saved.
    PageSourceCorrupt = "PAGE_SOURCE_CORRUPT" => DataLoss,
    /// Where a VM's pages come from does not answer.
    PageSourceStalled = "PAGE_SOURCE_STALLED" => Unavailable,
    /// A VM's pager does not answer, or there is none; metadata `vm`.
    PagerUnreachable = "PAGER_UNREACHABLE" => Unavailable,
    /// No ready host can take the VM.
    NoHost = "NO_HOST" => ResourceExhausted,
    /// A bounded resource (slots, cursors, connections) is used up.
    LimitReached = "LIMIT_REACHED" => ResourceExhausted,
    /// The other side does not answer.
    PeerUnreachable = "PEER_UNREACHABLE" => Unavailable,
    /// The other side restarted meanwhile.
    PeerRestarted = "PEER_RESTARTED" => Unavailable,
    /// The host's agent does not answer; metadata `host`.
    HostUnreachable = "HOST_UNREACHABLE" => Unavailable,
    /// The VM's process does not answer or is gone.
    VmUnreachable = "VM_UNREACHABLE" => Unavailable,
    /// A connection broke.
    ConnectionLost = "CONNECTION_LOST" => Unavailable,
    /// max_total_time passed.
    CompletionTimeout = "COMPLETION_TIMEOUT" => DeadlineExceeded,
    /// Nothing moved for the stall window.
    ProgressStalled = "PROGRESS_STALLED" => DeadlineExceeded,
    /// The guest dirties faster than pages can be sent; metadata has the rates.
    NotConverging = "NOT_CONVERGING" => DeadlineExceeded,
    /// The switchover took too long and was undone.
    SwitchoverTimeout = "SWITCHOVER_TIMEOUT" => DeadlineExceeded,
    /// The user cancelled.
    CancelledByUser = "CANCELLED_BY_USER" => Aborted,
    /// The VM was stopped or failed while it migrated.
    VmStoppedDuringMigration = "VM_STOPPED_DURING_MIGRATION" => Aborted,
    /// The VM's process died while it migrated; its memory is lost.
    VmProcessDied = "VM_PROCESS_DIED" => Aborted,
    /// Memory digests of source and destination differ; metadata `slot`.
    DigestMismatch = "DIGEST_MISMATCH" => DataLoss,
    /// A frame names pages outside the declared slots; metadata `slot`, `gfn`.
    PageOutOfSlot = "PAGE_OUT_OF_SLOT" => DataLoss,
    /// A frame has a wrong magic, version, length, checksum or order; metadata `field`.
    StreamCorrupt = "STREAM_CORRUPT" => DataLoss,
    /// The grant or the ticket shown is not for this: another migration, VM, epoch, host or
    /// incarnation, or changed since it was signed; or its side has ended and was released.
    /// Metadata `why`.
    GrantInvalid = "GRANT_INVALID" => PermissionDenied,
    /// The grant's time is over; metadata `not_after`.
    GrantExpired = "GRANT_EXPIRED" => PermissionDenied,
    /// The grant was used already, for a side that has ended.
    GrantUsed = "GRANT_USED" => PermissionDenied,
    /// The grant is signed by a key that is not in force here; metadata `key`.
    GrantKeyUnknown = "GRANT_KEY_UNKNOWN" => PermissionDenied,
    /// The caller showed no certificate.
    CertificateRequired = "CERTIFICATE_REQUIRED" => Unauthenticated,
    /// A certificate is by no CA that the other end trusts.
    CertificateUnknownCa = "CERTIFICATE_UNKNOWN_CA" => Unauthenticated,
    /// A certificate has ended.
    CertificateExpired = "CERTIFICATE_EXPIRED" => Unauthenticated,
    /// A certificate does not begin yet: see the clocks.
    CertificateNotYetValid = "CERTIFICATE_NOT_YET_VALID" => Unauthenticated,
    /// A certificate was revoked.
    CertificateRevoked = "CERTIFICATE_REVOKED" => Unauthenticated,
    /// A certificate cannot be used: broken, of an algorithm that is not taken, or without its key.
    CertificateBad = "CERTIFICATE_BAD" => Unauthenticated,
    /// A certificate is another's than the one that was expected; metadata `found`, `wanted`.
    IdentityWrong = "IDENTITY_WRONG" => Unauthenticated,
    /// The caller's role may not call this, or not for this VM or host; metadata `role`, `method`.
    Permission = "PERMISSION" => PermissionDenied,
    /// The caller calls too often, or has too many connections; metadata `retry_after_ms`.
    RateLimited = "RATE_LIMITED" => ResourceExhausted,
    /// The endpoint speaks TLS and was spoken to in the clear.
    TlsRequired = "TLS_REQUIRED" => Unavailable,
    /// The endpoint does not speak TLS, or not the version that is asked for.
    TlsUnexpected = "TLS_UNEXPECTED" => Unavailable,
    /// The host's incarnation was fenced: it is over.
    HostFenced = "HOST_FENCED" => FailedPrecondition,
    /// The fence's hook failed; metadata `exit`, `said`. Nothing was decided.
    FenceFailed = "FENCE_FAILED" => FailedPrecondition,
    /// The server was started without a hook that fences hosts.
    NoFenceHook = "NO_FENCE_HOOK" => FailedPrecondition,
    /// vCPUs could not be stopped.
    SourcePause = "SOURCE_PAUSE" => Internal,
    /// vCPU state could not be read.
    StateSave = "STATE_SAVE" => Internal,
    /// vCPU state could not be set.
    StateLoad = "STATE_LOAD" => Internal,
    /// There is no KVM to run VMs on; metadata `why`: `missing`, `no-driver`, `denied`, `version`,
    /// `busy`.
    KvmUnavailable = "KVM_UNAVAILABLE" => FailedPrecondition,
    /// A KVM ioctl failed; metadata `op`, `errno`.
    KvmIoctl = "KVM_IOCTL" => Internal,
    /// A journal could not be read or written; nothing was done.
    Journal = "JOURNAL" => Internal,
    /// The store could not be read or written.
    Store = "STORE" => Internal,
    /// A fault of Slat itself.
    Internal = "INTERNAL" => Internal,
    /// Not known whether the commit happened; a journal will tell.
    InDoubt = "IN_DOUBT" => Unknown,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One failure as a caller of the API sees it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What failed.
    pub reason: Reason,
    /// For people: what and where.
    pub message: String,
    /// Details by name.
    pub metadata: BTreeMap<String, String>,
}

impl ApiError {
    /// A failure with its sentence.
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            metadata: BTreeMap::new(),
        }
    }

    /// Adds a detail.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// A request field that is missing or out of range.
    #[must_use]
    pub fn bad_parameter(field: &str, message: impl fmt::Display) -> Self {
        Self::new(Reason::BadParameter, format!("{field}: {message}")).with("field", field)
    }

    /// A VM that this endpoint does not know.
    #[must_use]
    pub fn no_such_vm(name: impl fmt::Display) -> Self {
        Self::new(Reason::NoSuchVm, format!("no VM {name} here")).with("vm", name)
    }

    /// The VM, or the monitor that runs it, does not have that capability.
    #[must_use]
    pub fn capability_missing(vm: impl fmt::Display, capability: v1::Capability) -> Self {
        let name = capability.as_str_name();
        Self::new(
            Reason::CapabilityMissing,
            format!("{vm} does not have {name}"),
        )
        .with("vm", vm)
        .with("capability", name)
    }

    /// A file or directory that could not be used. A full disk is DISK_FULL and a process without
    /// descriptors DESCRIPTORS_EXHAUSTED, whatever was being done; anything else is `otherwise`.
    /// The metadata have the path, `errno` and, for the first two, advice.
    #[must_use]
    pub fn from_io(otherwise: Reason, path: &Path, error: &io::Error) -> Self {
        Self::new(otherwise, format!("{}: {error}", path.display()))
            .with("path", path.display())
            .because_of(error)
    }

    /// The same failure with the kernel's word: `errno` in the metadata, and a full disk is
    /// DISK_FULL, a process without descriptors DESCRIPTORS_EXHAUSTED, with advice.
    #[must_use]
    pub fn because_of(mut self, error: &io::Error) -> Self {
        if let Some(errno) = error.raw_os_error() {
            self = self.with("errno", errno);
        }
        let full = matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        );
        let (reason, advice) = match error.raw_os_error() {
            _ if full => (
                Reason::DiskFull,
                "free space on that file system; what waits for it goes on by itself",
            ),
            Some(EMFILE | ENFILE) => (
                Reason::DescriptorsExhausted,
                "raise LimitNOFILE of that process, or close connections to it",
            ),
            _ => return self,
        };
        self.reason = reason;
        self.with("advice", advice)
    }

    /// The failure as a migration records it.
    #[must_use]
    pub fn to_migration_error(&self, phase: v1::MigrationPhase, side: &str) -> v1::MigrationError {
        v1::MigrationError {
            reason: self.reason.as_str().to_owned(),
            message: self.message.clone(),
            phase: phase.into(),
            side: side.to_owned(),
            advice: self.metadata.get("advice").cloned().unwrap_or_default(),
            metadata: self.metadata.clone().into_iter().collect(),
        }
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let mut details = ErrorDetails::new();
        let metadata: HashMap<String, String> = error.metadata.into_iter().collect();
        details.set_error_info(error.reason.as_str(), DOMAIN, metadata);
        Status::with_error_details(error.reason.code(), error.message, details)
    }
}

/// Key of the metadata that keeps the gRPC code of a status that Slat did not make: the
/// transport's, a proxy's.
pub const GRPC_CODE: &str = "grpc_code";

impl From<Status> for ApiError {
    /// Reads a peer's answer. What a status without our details becomes, by its class:
    ///
    /// | status | reason |
    /// |---|---|
    /// | with a cause: the transport made it | PEER_UNREACHABLE, DESCRIPTORS_EXHAUSTED |
    /// | UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED | PEER_UNREACHABLE |
    /// | OUT_OF_RANGE, of a message's length | MESSAGE_TOO_LARGE |
    /// | INTERNAL, of decoding | MESSAGE_UNDECODABLE |
    /// | UNIMPLEMENTED | NO_SUCH_METHOD |
    /// | anything else | INTERNAL |
    ///
    /// The gRPC code is kept in the metadata as [`GRPC_CODE`].
    fn from(status: Status) -> Self {
        if let Some(error) = typed(&status) {
            return error;
        }
        let text = status.message();
        let reason = match (status.code(), status.source()) {
            (_, Some(cause)) => transport_reason(cause),
            (Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled, None) => {
                Reason::PeerUnreachable
            }
            (Code::OutOfRange, None) if text.contains("message length too large") => {
                Reason::MessageTooLarge
            }
            (Code::Internal, None) if text.contains("failed to decode Protobuf message") => {
                Reason::MessageUndecodable
            }
            (Code::Unimplemented, None) => Reason::NoSuchMethod,
            _ => Reason::Internal,
        };
        let message = if text.is_empty() {
            format!("{}", status.code())
        } else {
            text.to_owned()
        };
        Self::new(reason, message).with(GRPC_CODE, format!("{:?}", status.code()))
    }
}

/// The error that Slat put into a status.
fn typed(status: &Status) -> Option<ApiError> {
    let info = status.get_details_error_info()?;
    let reason = Reason::parse(&info.reason).filter(|_| info.domain == DOMAIN)?;
    Some(ApiError {
        reason,
        message: status.message().to_owned(),
        metadata: info.metadata.into_iter().collect(),
    })
}

/// What a failure of the transport means: mostly that the peer is not there. A message that could
/// not be sent is an error of its own, and so is a process without descriptors.
pub(crate) fn transport_reason(cause: &(dyn Error + 'static)) -> Reason {
    match errno(cause) {
        Some(EMFILE | ENFILE) => Reason::DescriptorsExhausted,
        _ => Reason::PeerUnreachable,
    }
}

/// The first error of the kernel among an error and its causes.
fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    causes(error).find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())
}

/// An error and its causes, the outermost first.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

/// As google.rpc.Code spells it: `InvalidArgument` is INVALID_ARGUMENT.
#[must_use]
pub fn code_name(code: Code) -> String {
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_spelt_as_the_protocol_spells_them() {
        for (code, name) in [
            (Code::Ok, "OK"),
            (Code::Cancelled, "CANCELLED"),
            (Code::InvalidArgument, "INVALID_ARGUMENT"),
            (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (Code::DataLoss, "DATA_LOSS"),
        ] {
            assert_eq!(code_name(code), name);
        }
    }

    #[test]
    fn every_reason_survives_the_wire() {
        for &reason in Reason::ALL {
            let error = ApiError::new(reason, "what happened").with("vm", "vms/a");
            let status = Status::from(error.clone());
            assert_eq!(status.code(), reason.code());
            assert_eq!(ApiError::from(status), error);
        }
    }

    #[test]
    fn reasons_are_upper_snake_and_bounded() {
        for reason in Reason::ALL {
            let text = reason.as_str();
            assert!(text.len() <= 63, "{text}");
            assert!(text.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'));
            assert_eq!(Reason::parse(text), Some(*reason));
        }
    }

    #[test]
    fn a_foreign_status_keeps_its_code() {
        let error = ApiError::from(Status::unavailable("tcp connect error"));
        assert_eq!(error.reason, Reason::PeerUnreachable);
        assert_eq!(error.metadata["grpc_code"], "Unavailable");
    }

    #[test]
    fn statuses_without_details_are_classed() {
        let reset = Status::from_error(Box::new(io::Error::from(io::ErrorKind::BrokenPipe)));
        assert_eq!(ApiError::from(reset).reason, Reason::PeerUnreachable);
        let none_left = Status::from_error(Box::new(io::Error::from_raw_os_error(EMFILE)));
        assert_eq!(
            ApiError::from(none_left).reason,
            Reason::DescriptorsExhausted
        );
        for (status, reason) in [
            (
                Status::out_of_range("Error, decoded message length too large: found 9 bytes"),
                Reason::MessageTooLarge,
            ),
            (
                Status::internal("failed to decode Protobuf message: invalid wire type"),
                Reason::MessageUndecodable,
            ),
            (Status::unimplemented(""), Reason::NoSuchMethod),
            (Status::internal("a fault"), Reason::Internal),
            (Status::unknown("a fault"), Reason::Internal),
        ] {
            assert_eq!(ApiError::from(status).reason, reason);
        }
    }

    #[test]
    fn a_full_disk_and_a_full_table_are_named() {
        let of = |errno| {
            let error = io::Error::from_raw_os_error(errno);
            ApiError::from_io(Reason::Store, Path::new("/state/file"), &error)
        };
        for errno in [28, 122] {
            let error = of(errno);
            assert_eq!(error.reason, Reason::DiskFull);
            assert_eq!(error.metadata["path"], "/state/file");
            assert!(error.metadata["advice"].contains("free space"));
        }
        assert_eq!(of(EMFILE).reason, Reason::DescriptorsExhausted);
        assert_eq!(of(ENFILE).reason, Reason::DescriptorsExhausted);
        assert_eq!(of(5).reason, Reason::Store);
        assert_eq!(of(5).metadata["errno"], "5");
    }
}
