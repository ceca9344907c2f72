//! Why a vCPU left the guest, in words that no architecture owns.

use kvm_ioctls::VcpuExit;

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
    reason = "architectures whose vCPUs cannot be run yet make only some"
)]
pub(super) enum GuestExit<'a> {
    /// Nothing.
    Again,
    /// The doorbell's answer: 0 for go, anything else for ask again.
    Doorbell(&'a mut [u8]),
    /// These bytes printed.
    Print(&'a [u8]),
    /// Nothing any more: the guest ended by itself.
    End,
    /// It did what its contract does not have; a noun phrase says what.
    Refused(String),
    /// KVM failed inside; the suberror is in the vCPU's shared page.
    Internal,
}

impl<'a> GuestExit<'a> {
    /// Exits that mean the same on every architecture. What is read from nowhere is all ones.
    pub(super) fn common(exit: VcpuExit<'a>) -> Self {
        Self::Refused(match exit {
            VcpuExit::Intr => return Self::Again,
            VcpuExit::InternalError => return Self::Internal,
            VcpuExit::MmioRead(gpa, data) => {
                data.fill(0xff);
                format!("read of guest-physical {gpa:#x}, where no slot is,")
            }
            VcpuExit::MmioWrite(gpa, _) => {
                format!("write to guest-physical {gpa:#x}, where no writable slot is,")
            }
            VcpuExit::FailEntry(reason, cpu) => {
                format!("the CPU refused to enter the guest (reason {reason:#x}, CPU {cpu})")
            }
            VcpuExit::MemoryFault { flags, gpa, size } => format!(
                "the kernel cannot map guest-physical {gpa:#x}+{size:#x} (flags {flags:#x})"
            ),
            other => format!("exit {other:?}"),
        })
    }
}
