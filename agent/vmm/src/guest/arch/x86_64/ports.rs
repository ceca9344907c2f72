//! Ports by which a guest calls out.

/// memstress: `in al` asks whether to go on; 0 means go, anything else ask again.
pub(crate) const PORT_DOORBELL: u16 = 0xe4;
/// Raw image: `out` of a byte prints it.
pub(crate) const PORT_CONSOLE: u16 = 0xe9;
/// Raw image: `out` ends the guest.
pub(crate) const PORT_END: u16 = 0xf4;
