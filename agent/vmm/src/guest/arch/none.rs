//! No machine code. KVM does not run guests on such a host, and says so.

/// Nothing.
pub(in crate::guest) fn memstress() -> &'static [u8] {
    &[]
}
