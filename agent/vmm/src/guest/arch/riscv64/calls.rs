//! Calls of the SBI by which a guest calls out.

/// Of the SBI: the extension of all calls here, in `a7`.
pub(crate) const EXTENSION: u64 = 0x0800_0000;
/// Its function (`a6`) that memstress calls before each batch. `a0` becomes 0; `a1` says whether to
/// go on: 0 means go, anything else ask again.
pub(crate) const DOORBELL: u64 = 0;
/// Its function that reports an exception: `a0` to `a2` are `scause`, `sepc`, `stval`. Does not
/// return.
pub(crate) const EXCEPTION: u64 = 1;
