//! What KVM_RUN says when it does not run, and what its page holds when KVM or the CPU failed.
//!
//! | errno | here |
//! |---|---|
//! | EINTR | a signal: on, or stop if that was what the signal was for |
//! | EAGAIN | x86-64, a vCPU that waits for its start: likewise, so often in a row and no more |
//! | EFAULT, EHWPOISON with KVM_EXIT_MEMORY_FAULT | the guest's memory, with its address |
//! | EFAULT, EHWPOISON without | the guest's memory; this kernel does not say where |
//! | ENOMEM | no memory for page tables |
//! | EIO | the VM is dead to the kernel, or another process made it |
//! | any other | by its meaning, or as the kernel says it |
//!
//! The exit reason in the page means something with EFAULT and EHWPOISON alone; with every other
//! error it is that of an earlier exit.

use kvm_bindings::kvm_run;

use super::super::run_failure::Cause;

/// How often in a row a vCPU may say EAGAIN. The kernel waits for an event before each.
pub(super) const AGAIN: u32 = 1000;
/// Room for data in an internal error.
const DATA: usize = 16;

/// What to do after KVM_RUN failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// Enter again, unless the vCPU shall stop.
    Again,
    /// The vCPU cannot go on.
    Failed(Cause),
}

/// Decides about an error of KVM_RUN, which gave EAGAIN `in_a_row` times before.
pub(super) fn judge(error: kvm_ioctls::Error, in_a_row: u32) -> After {
    let errno = error.errno();
    match errno {
        libc::EINTR => After::Again,
        libc::EAGAIN if in_a_row < AGAIN => After::Again,
        _ => After::Failed(Cause::Call {
            errno,
            meaning: meaning(errno),
        }),
    }
}

fn meaning(errno: i32) -> &'static str {
    match errno {
        libc::EAGAIN => "the vCPU waits for a start that does not come",
        libc::EFAULT => {
            "the kernel cannot reach memory of the guest's, and does not say which (gone, cut, or beyond the second stage)"
        }
        libc::EHWPOISON => "the hardware lost a page of the guest's memory",
        libc::ENOMEM => "the kernel has no memory for the guest's page tables",
        libc::EIO => "the VM is dead to the kernel, or another process made it",
        libc::EINVAL => "the vCPU's state is none that the CPU can enter",
        libc::ENOEXEC => "the vCPU is not set up, or the guest ran into a device's memory",
        libc::ENOSYS => "an access outside of all slots that the hardware does not describe",
        libc::EPERM => "a feature of the vCPU is not set up",
        libc::EBADF => "it is no vCPU's descriptor",
        libc::EOPNOTSUPP => "this host cannot run such a vCPU",
        _ => "the kernel does not document why",
    }
}

/// Of KVM_EXIT_INTERNAL_ERROR, out of the vCPU's page.
pub(super) fn internal(page: &kvm_run) -> Cause {
    // SAFETY: the caller was told by the exit reason that this member of the union was filled; it
    // is numbers, of which every pattern is valid.
    let internal = unsafe { page.__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(DATA);
    Cause::Internal {
        suberror: internal.suberror,
        data: internal.data[..count].to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_of_run_is_told_apart() {
        let of = |errno, in_a_row| judge(kvm_ioctls::Error::new(errno), in_a_row);
        assert_eq!(of(libc::EINTR, 0), After::Again);
        assert_eq!(of(libc::EINTR, u32::MAX), After::Again);
        assert_eq!(of(libc::EAGAIN, AGAIN - 1), After::Again);
        let mut meanings = std::collections::HashSet::new();
        for errno in [
            libc::EAGAIN,
            libc::EFAULT,
            libc::EHWPOISON,
            libc::ENOMEM,
            libc::EIO,
            libc::EINVAL,
            libc::ENOEXEC,
            libc::ENOSYS,
            libc::EPERM,
            libc::EBADF,
            libc::EOPNOTSUPP,
            libc::EDOM,
        ] {
            let After::Failed(Cause::Call {
                errno: told,
                meaning,
            }) = of(errno, AGAIN)
            else {
                panic!("{errno}");
            };
            assert_eq!(told, errno);
            assert!(meanings.insert(meaning), "{errno}: {meaning}");
        }
    }

    #[test]
    fn an_internal_error_comes_with_its_data_and_no_more_than_there_is() {
        let mut page = kvm_run::default();
        page.__bindgen_anon_1.internal.suberror = 3;
        page.__bindgen_anon_1.internal.ndata = 2;
        // SAFETY: numbers, of which every pattern is valid.
        let data = unsafe { &mut page.__bindgen_anon_1.internal.data };
        data[..3].copy_from_slice(&[7, 8, 9]);
        let told = |suberror, data: &[u64]| Cause::Internal {
            suberror,
            data: data.to_vec(),
        };
        assert_eq!(internal(&page), told(3, &[7, 8]));
        page.__bindgen_anon_1.internal.ndata = u32::MAX;
        let Cause::Internal { data, .. } = internal(&page) else {
            panic!("no internal error");
        };
        assert_eq!(data.len(), DATA);
    }
}
