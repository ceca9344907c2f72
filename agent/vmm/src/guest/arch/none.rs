//! No machine code. KVM does not run guests on such a host, and says so.

use slat_proto::model::SlotSpec;

/// Nothing.
pub(in crate::guest) fn memstress() -> Vec<u8> {
    Vec::new()
}

/// Nothing.
pub(in crate::guest) fn support(_: &[SlotSpec], _: u64) -> Vec<u8> {
    Vec::new()
}
