//! What the kernel says to a change of a memory slot, with the slot and its range.
//!
//! Documented failures of `KVM_SET_USER_MEMORY_REGION`, and those that were seen:
//!
//! | errno | here |
//! |---|---|
//! | EINTR, EAGAIN | made again, within a bound ([`super::device::uninterrupted`]) |
//! | EEXIST | another slot is there |
//! | EINVAL | alignment, wrap, number, flags, or a slot that cannot be changed so |
//! | EFAULT | RISC-V: the range ends beyond what the second stage reaches; or its memory is gone |
//! | E2BIG | more pages than the kernel takes in a slot |
//! | ENOMEM, ENOSPC, EDQUOT | no memory for the kernel's tables |
//! | any other | as the kernel says it |

use slat_proto::model::SlotSpec;

use super::super::BackendError;

/// Turns the kernel's refusal to make `spec` of a slot (of no pages: to take it away) into words.
pub(super) fn refused(spec: SlotSpec, pages: u64) -> impl Fn(kvm_ioctls::Error) -> BackendError {
    move |error| {
        let bad = |message: &str| BackendError::BadSlot {
            slot: spec.slot,
            message: message.to_owned(),
        };
        match error.errno() {
            libc::EEXIST => bad("overlaps a slot that the kernel has"),
            libc::EINVAL => bad("the kernel refuses it"),
            libc::EFAULT => bad("the kernel cannot reach all of it, or its memory"),
            libc::E2BIG => bad("more pages than the kernel takes in a slot"),
            _ => BackendError::SlotCall {
                op: "KVM_SET_USER_MEMORY_REGION",
                slot: spec.slot,
                base_gfn: spec.base_gfn,
                pages,
                source: error.into(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::{ApiError, Reason};

    use super::*;

    #[test]
    fn every_failure_has_its_reason_slot_and_range() {
        let spec = SlotSpec::new(3, 0x100, 0x40, false).unwrap();
        let told = |errno| {
            let refused = refused(spec, spec.pages)(kvm_ioctls::Error::new(errno));
            ApiError::from(refused)
        };
        for errno in [libc::EEXIST, libc::EINVAL, libc::EFAULT, libc::E2BIG] {
            let error = told(errno);
            assert_eq!(error.reason, Reason::BadSlotTable, "{errno}");
            assert_eq!(error.metadata["slot"], "3");
        }
        for (errno, reason) in [
            (libc::ENOMEM, Reason::NoMemory),
            (libc::ENOSPC, Reason::NoMemory),
            (libc::EDQUOT, Reason::NoMemory),
            (libc::EIO, Reason::KvmIoctl),
            (libc::ENOTTY, Reason::KvmIoctl),
        ] {
            let error = told(errno);
            assert_eq!(error.reason, reason, "{errno}");
            assert_eq!(error.metadata["op"], "KVM_SET_USER_MEMORY_REGION");
            assert_eq!(error.metadata["errno"], errno.to_string());
            let range = ["slot", "base_gfn", "pages"].map(|key| error.metadata[key].as_str());
            assert_eq!(range, ["3", "256", "64"]);
            assert!(
                error.message.contains("slot 3 (frames 0x100+0x40)"),
                "{error}"
            );
        }
    }
}
