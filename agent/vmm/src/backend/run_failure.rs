//! Why vCPUs stopped for good: what the guest did, or what the kernel or the CPU did.
//!
//! The VM's state message says it in words. What the VM is asked for afterwards is refused with the
//! same in metadata ([`RunFailure::told`]), so that a program need not read words.

use std::fmt::{self, Write as _};

use slat_proto::{ApiError, Reason};

/// A failure, with where it was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunFailure {
    /// The vCPU and the place in the guest's code, where a vCPU met it.
    pub(super) at: Option<(u32, String)>,
    /// What happened.
    pub(super) cause: Cause,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// What its contract does not have, or what it found wrong; in words.
    Guest(String),
    /// KVM_RUN returned an error.
    Call {
        /// Its number.
        errno: i32,
        /// What the kernel means by it.
        meaning: &'static str,
    },
    /// KVM_EXIT_MEMORY_FAULT, which comes with an error too.
    MemoryFault {
        /// First byte that the kernel cannot map.
        gpa: u64,
        /// Bytes from there on.
        size: u64,
        /// As the kernel has them.
        flags: u64,
    },
    /// KVM_EXIT_FAIL_ENTRY: the hardware refused to enter the guest.
    FailEntry {
        /// The hardware's own number.
        reason: u64,
        /// Where it was tried.
        cpu: u32,
    },
    /// KVM_EXIT_INTERNAL_ERROR.
    Internal {
        /// Of KVM's list.
        suberror: u32,
        /// What it adds.
        data: Vec<u64>,
    },
}

impl Cause {
    /// The reason of the taxonomy; none for what the guest did itself.
    fn reason(&self) -> Option<Reason> {
        match self {
            Self::Guest(_) => None,
            Self::Call { errno, .. } => Some(of_errno(*errno)),
            Self::MemoryFault { .. } | Self::FailEntry { .. } | Self::Internal { .. } => {
                Some(Reason::KvmIoctl)
            }
        }
    }
}

/// The reason of a kernel call that failed: what says that memory is short says so by name.
pub(super) fn of_errno(errno: i32) -> Reason {
    match errno {
        libc::ENOMEM | libc::ENOSPC | libc::EDQUOT => Reason::NoMemory,
        libc::EMFILE | libc::ENFILE => Reason::DescriptorsExhausted,
        _ => Reason::KvmIoctl,
    }
}

/// KVM_INTERNAL_ERROR_*, in words.
fn suberror_words(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "an instruction that KVM cannot emulate",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "an exit of the hardware that KVM does not expect"
        }
        _ => "of a kind not known here",
    }
}

fn hexadecimal(words: &[u64]) -> String {
    let mut text = String::new();
    for (index, word) in words.iter().enumerate() {
        let separator = if index == 0 { "" } else { " " };
        let _ = write!(text, "{separator}{word:#x}");
    }
    text
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(words) => f.write_str(words),
            Self::Call { errno, meaning } => {
                let error = std::io::Error::from_raw_os_error(*errno);
                write!(f, "KVM_RUN failed: {meaning} ({error})")
            }
            Self::MemoryFault { gpa, size, flags } => write!(
                f,
                "the kernel cannot map guest-physical {gpa:#x}+{size:#x} (flags {flags:#x})"
            ),
            Self::FailEntry { reason, cpu } => write!(
                f,
                "the CPU refused to enter the guest (reason {reason:#x}, CPU {cpu})"
            ),
            Self::Internal { suberror, data } => {
                let words = suberror_words(*suberror);
                write!(
                    f,
                    "internal error of KVM: {words} (suberror {suberror}, data {})",
                    if data.is_empty() {
                        "none".to_owned()
                    } else {
                        hexadecimal(data)
                    }
                )
            }
        }
    }
}

impl fmt::Display for RunFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            Some((vcpu, place)) => write!(f, "vCPU {vcpu}: {} at {place}", self.cause),
            None => self.cause.fmt(f),
        }
    }
}

impl From<String> for RunFailure {
    fn from(words: String) -> Self {
        Self {
            at: None,
            cause: Cause::Guest(words),
        }
    }
}

impl From<&str> for RunFailure {
    fn from(words: &str) -> Self {
        words.to_owned().into()
    }
}

impl RunFailure {
    /// Adds it to a refusal: `failure` is the reason of the taxonomy, or GUEST, and beside it
    /// stands what the words say in numbers.
    pub(crate) fn told(&self, mut error: ApiError) -> ApiError {
        let reason = self.cause.reason();
        error = error.with("failure", reason.map_or("GUEST", Reason::as_str));
        if let Some((vcpu, place)) = &self.at {
            error = error.with("vcpu", vcpu).with("place", place);
        }
        if reason.is_some() {
            error = error.with("op", "KVM_RUN");
        }
        match &self.cause {
            Cause::Guest(words) => error.with("meaning", words),
            Cause::Call { errno, meaning } => error.with("errno", errno).with("meaning", meaning),
            Cause::MemoryFault { gpa, size, flags } => error
                .with("exit", "MEMORY_FAULT")
                .with("gpa", gpa)
                .with("size", size)
                .with("flags", flags),
            Cause::FailEntry { reason, cpu } => error
                .with("exit", "FAIL_ENTRY")
                .with("hardware_reason", reason)
                .with("cpu", cpu),
            Cause::Internal { suberror, data } => error
                .with("exit", "INTERNAL_ERROR")
                .with("suberror", suberror)
                .with("data", hexadecimal(data)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(cause: Cause) -> (String, ApiError) {
        let failure = RunFailure {
            at: Some((2, "rip 0x1000".to_owned())),
            cause,
        };
        let error = failure.told(ApiError::new(Reason::VmState, "x"));
        assert_eq!(error.metadata["vcpu"], "2");
        assert_eq!(error.metadata["place"], "rip 0x1000");
        (failure.to_string(), error)
    }

    #[test]
    fn every_failure_has_its_reason_and_its_numbers() {
        for (errno, reason) in [
            (libc::ENOMEM, "NO_MEMORY"),
            (libc::EFAULT, "KVM_IOCTL"),
            (libc::EMFILE, "DESCRIPTORS_EXHAUSTED"),
        ] {
            let meaning = "for a reason";
            let (words, error) = told(Cause::Call { errno, meaning });
            assert!(words.contains("KVM_RUN failed: for a reason"), "{words}");
            assert_eq!(error.metadata["failure"], reason);
            assert_eq!(error.metadata["errno"], errno.to_string());
            assert_eq!(error.metadata["op"], "KVM_RUN");
        }
        let (words, error) = told(Cause::MemoryFault {
            gpa: 0x5000,
            size: 0x1000,
            flags: 8,
        });
        assert!(words.contains("0x5000+0x1000"), "{words}");
        assert_eq!(error.metadata["exit"], "MEMORY_FAULT");
        assert_eq!(error.metadata["gpa"], "20480");
        let (words, error) = told(Cause::FailEntry {
            reason: 0x8000_0021,
            cpu: 3,
        });
        assert!(words.contains("reason 0x80000021, CPU 3"), "{words}");
        assert_eq!(error.metadata["cpu"], "3");
        let (words, error) = told(Cause::Internal {
            suberror: 1,
            data: vec![1, 0x90],
        });
        assert!(
            words.contains("cannot emulate (suberror 1, data 0x1 0x90)"),
            "{words}"
        );
        assert_eq!(error.metadata["suberror"], "1");
        let (words, error) = told(Cause::Guest("triple fault".to_owned()));
        assert_eq!(words, "vCPU 2: triple fault at rip 0x1000");
        assert_eq!(error.metadata["failure"], "GUEST");
        assert!(!error.metadata.contains_key("op"));
    }
}
