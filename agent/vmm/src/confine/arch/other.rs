//! Any other architecture: no filter is compiled for it, so nothing is ever refused.

use libc::c_void;

pub(in crate::confine) const EVERY: &[i64] = &[];
pub(in crate::confine) const FORKS: &[i64] = &[];
pub(in crate::confine) const STREAM: &[i64] = &[];
pub(in crate::confine) const PROCESS: &[i64] = &[];

/// Leaves the result alone.
///
/// # Safety
/// None is needed.
pub(in crate::confine) unsafe fn answer(_: *mut c_void, _: i64) {}
