//! What the kernel says to a call about a vCPU's registers, with which call and which registers.
//!
//! Each call is made by [`read`] or [`write`], which make it again while signals interrupt it, and
//! give what it says in the end its meaning. `Documentation/virt/kvm/api.rst` says of most of these
//! calls no more than that they fail by -1; what it says, and what all calls on a vCPU share:
//!
//! | errno | here |
//! |---|---|
//! | EINTR, EAGAIN | made again, within a bound ([`super::device::uninterrupted`]) |
//! | EINVAL | no such register, or a value that the kernel does not take |
//! | ENOENT | KVM_GET_ONE_REG, KVM_SET_ONE_REG: no such register |
//! | EBUSY | KVM_SET_ONE_REG: not once the vCPU ran |
//! | EPERM | KVM_SET_ONE_REG: not before the vCPU is set up; XSAVE: a feature not asked for |
//! | E2BIG | lists of registers, of MSRs and of CPUID: more than there is room for |
//! | EIO | the host's time-stamp counter is unstable; else: the VM is dead, or another process's |
//! | ENOMEM | no memory for the kernel's copy |
//! | EFAULT | the kernel cannot reach the copy |
//! | EEXIST | KVM_CREATE_VCPU: there is such a vCPU |
//! | EMFILE, ENFILE | KVM_CREATE_VCPU: no descriptor left |
//! | ENOTTY, ENXIO, ENOSYS | this kernel has no such call |
//!
//! A write of saved state that fails by one of those which are about values is the state's fault:
//! it names what this host does not take. All others are this host's.

use super::{super::BackendError, device::uninterrupted};

/// Reads registers; `what` says which.
pub(super) fn read<T>(
    op: &'static str,
    what: impl ToString,
    call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, BackendError> {
    uninterrupted(call).map_err(|error| of(op, what.to_string(), false, error))
}

/// Sets registers of a new vCPU, to what every host takes.
pub(super) fn set<T>(
    op: &'static str,
    what: impl ToString,
    call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, BackendError> {
    read(op, what, call)
}

/// Sets registers to what another host saved.
pub(super) fn load<T>(
    op: &'static str,
    what: impl ToString,
    call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, BackendError> {
    uninterrupted(call).map_err(|error| refused(op, what, error))
}

/// What a call that was to set saved state fails by.
pub(super) fn refused(
    op: &'static str,
    what: impl ToString,
    error: kvm_ioctls::Error,
) -> BackendError {
    of(op, what.to_string(), is_of_value(error.errno()), error)
}

/// Says which vCPU a refused state, or a failed call, is of.
pub(super) fn of_vcpu(index: u32) -> impl Fn(BackendError) -> BackendError {
    move |error| match error {
        BackendError::State { message } => BackendError::State {
            message: format!("vCPU {index}: {message}"),
        },
        BackendError::VcpuCall {
            op,
            what,
            meaning,
            refused,
            source,
            ..
        } => BackendError::VcpuCall {
            op,
            what,
            vcpu: Some(index),
            meaning,
            refused,
            source,
        },
        other => other,
    }
}

fn of(op: &'static str, what: String, refused: bool, error: kvm_ioctls::Error) -> BackendError {
    BackendError::VcpuCall {
        op,
        what,
        vcpu: None,
        meaning: meaning(op, error.errno()),
        refused,
        source: error.into(),
    }
}

/// Whether the kernel means the value, or the register, and not itself.
fn is_of_value(errno: i32) -> bool {
    matches!(
        errno,
        libc::EINVAL | libc::ENOENT | libc::EBUSY | libc::EPERM | libc::E2BIG | libc::EOPNOTSUPP
    )
}

fn meaning(op: &str, errno: i32) -> &'static str {
    let one = op.ends_with("_ONE_REG");
    match errno {
        libc::EINTR | libc::EAGAIN => "interrupted as often as it was made",
        libc::EINVAL if op == "KVM_CREATE_VCPU" => "the kernel takes no vCPU of that number",
        libc::EINVAL if op.starts_with("KVM_GET") => "this vCPU has no such registers",
        libc::EINVAL => "the kernel does not take that value",
        libc::ENOENT => "this kernel, or this CPU, has no such register",
        libc::EBUSY if one => "it cannot be changed once the vCPU ran",
        libc::EBUSY => "the kernel uses it",
        libc::EPERM if one => "not before the vCPU is set up",
        libc::EPERM => "of a feature that this process did not ask for",
        libc::EOPNOTSUPP => "this host does not offer it",
        libc::E2BIG => "more than the kernel has room for",
        libc::EIO if op.ends_with("_TSC_KHZ") => "the host's time-stamp counter is unstable",
        libc::EIO => "the VM is dead to the kernel, or another process made it",
        libc::ENOMEM => "the kernel has no memory for its copy",
        libc::EFAULT => "the kernel cannot reach the copy",
        libc::EEXIST => "there is one already",
        libc::EMFILE => "this process has no descriptor left",
        libc::ENFILE => "the host has no descriptor left",
        libc::ENOTTY | libc::ENXIO | libc::ENOSYS => "this kernel has no such call",
        _ => "the kernel does not document why",
    }
}

#[cfg(test)]
pub(super) mod tests {
    use slat_proto::{ApiError, Reason};

    use super::*;

    /// Every failure that is documented, of any of the calls, and one that is not.
    pub(in super::super) const EVERY: [i32; 17] = [
        libc::EINVAL,
        libc::ENOENT,
        libc::EBUSY,
        libc::EPERM,
        libc::E2BIG,
        libc::EOPNOTSUPP,
        libc::EIO,
        libc::ENOMEM,
        libc::EFAULT,
        libc::EEXIST,
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOTTY,
        libc::ENXIO,
        libc::EINTR,
        libc::EAGAIN,
        libc::EDOM,
    ];

    /// Demands that a failed call is told by name, number, registers and meaning.
    pub(in super::super) fn demand(error: BackendError, op: &str, errno: i32, loading: bool) {
        assert!(
            matches!(error, BackendError::VcpuCall { .. }),
            "{op}, {errno}: {error:?}"
        );
        let told = ApiError::from(of_vcpu(5)(error));
        let reason = match errno {
            libc::EINVAL
            | libc::ENOENT
            | libc::EBUSY
            | libc::EPERM
            | libc::E2BIG
            | libc::EOPNOTSUPP
                if loading =>
            {
                Reason::StateVersionUnsupported
            }
            libc::ENOMEM => Reason::NoMemory,
            libc::EMFILE | libc::ENFILE => Reason::DescriptorsExhausted,
            _ => Reason::KvmIoctl,
        };
        assert_eq!(told.reason, reason, "{op}, {errno}: {told}");
        assert_eq!(told.metadata["op"], op);
        assert_eq!(told.metadata["errno"], errno.to_string());
        assert_eq!(told.metadata["vcpu"], "5");
        assert!(
            told.message.starts_with(&format!("vCPU 5: {op} (")),
            "{told}"
        );
        for key in ["registers", "meaning"] {
            assert!(told.message.contains(&told.metadata[key]), "{told}");
            assert!(!told.metadata[key].is_empty());
        }
    }

    #[test]
    fn each_failure_has_a_meaning_of_its_own() {
        for errno in EVERY {
            let mut left = 1;
            let error = read("KVM_GET_REGS", "registers", || -> Result<(), _> {
                left -= 1;
                Err(kvm_ioctls::Error::new(errno))
            });
            demand(error.unwrap_err(), "KVM_GET_REGS", errno, false);
            // Only what a signal interrupted is made again.
            let again = matches!(errno, libc::EINTR | libc::EAGAIN);
            assert_eq!(left < 0, again, "{errno}");
        }
        assert_ne!(
            meaning("KVM_GET_TSC_KHZ", libc::EIO),
            meaning("KVM_RUN", libc::EIO)
        );
        let unknown = meaning("KVM_GET_REGS", libc::EDOM);
        for errno in EVERY.into_iter().filter(|errno| *errno != libc::EDOM) {
            assert_ne!(meaning("KVM_GET_REGS", errno), unknown, "{errno}");
        }
    }

    #[test]
    fn an_interrupted_call_is_made_again() {
        let mut left = 3;
        let done = load("KVM_SET_REGS", "registers", || {
            left -= 1;
            match left {
                0 => Ok(7),
                _ => Err(kvm_ioctls::Error::new(libc::EINTR)),
            }
        });
        assert_eq!(done.unwrap(), 7);
    }
}
