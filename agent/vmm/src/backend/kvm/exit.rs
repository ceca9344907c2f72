//! Why a vCPU left the guest, in words that no architecture owns.

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::VcpuExit;

use super::super::run_failure::Cause;

/// What a guest may ask for: the two contracts of [`crate::guest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contract {
    /// memstress: the doorbell.
    Memstress,
    /// A raw image: console and end.
    Raw,
}

/// What the vCPU needs before it goes on.
#[derive(Debug)]
#[allow(
    dead_code,
    reason = "an architecture whose vCPUs cannot be run makes only some"
)]
pub(super) enum GuestExit<'a> {
    /// Nothing.
    Again,
    /// The doorbell's answer: 0 for go, anything else for ask again.
    Doorbell(&'a mut [u8]),
    /// These bytes printed.
    Print(&'a [u8]),
    /// This store, to where no memory could take it, thrown away, or a refusal.
    Store { gpa: u64 },
    /// Room in its dirty ring.
    RingFull,
    /// Nothing any more: the guest ended by itself.
    End,
    /// It did what its contract does not have; a noun phrase says what.
    Refused(String),
    /// KVM, or the CPU, failed.
    Failed(Cause),
    /// KVM failed inside; what it says of that is in the vCPU's shared page.
    Internal,
}

impl GuestExit<'static> {
    /// Exits that mean the same on every architecture. What is read from nowhere is all ones.
    pub(super) fn common(exit: VcpuExit<'_>) -> Self {
        Self::Refused(match exit {
            VcpuExit::Intr => return Self::Again,
            VcpuExit::InternalError => return Self::Internal,
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => return Self::RingFull,
            VcpuExit::MmioRead(gpa, data) => {
                data.fill(0xff);
                format!("read of guest-physical {gpa:#x}, where no slot is,")
            }
            VcpuExit::MmioWrite(gpa, _) => return Self::Store { gpa },
            VcpuExit::FailEntry(reason, cpu) => {
                return Self::Failed(Cause::FailEntry { reason, cpu });
            }
            VcpuExit::MemoryFault { flags, gpa, size } => {
                return Self::Failed(Cause::MemoryFault { gpa, size, flags });
            }
            other => format!("exit {other:?}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kvm_or_the_cpu_fail_by_keeps_its_numbers() {
        let told = |exit| match GuestExit::common(exit) {
            GuestExit::Failed(cause) => cause,
            other => panic!("{other:?}"),
        };
        let (gpa, size, flags) = (0x5000, 0x1000, 8);
        assert_eq!(
            told(VcpuExit::MemoryFault { flags, gpa, size }),
            Cause::MemoryFault { gpa, size, flags }
        );
        assert_eq!(
            told(VcpuExit::FailEntry(0x8000_0021, 3)),
            Cause::FailEntry {
                reason: 0x8000_0021,
                cpu: 3
            }
        );
        assert!(matches!(
            GuestExit::common(VcpuExit::InternalError),
            GuestExit::Internal
        ));
    }
}
