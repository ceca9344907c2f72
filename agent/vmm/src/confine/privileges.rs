//! Capabilities, given up for good.
//!
//! Four sets in the order in which that is possible: the ambient set; the bounding set, while there
//! is the capability to change it; then the three of the thread. Threads that begin later have
//! none. Programs cannot give any back, because new privileges are off.

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Gives up all capabilities and the ways to new ones.
pub(super) fn drop_all(lacks: &mut Vec<String>) {
    let mut note = |what: &str, result: rustix::io::Result<()>| {
        if let Err(error) = result {
            lacks.push(format!("{what}: {error}"));
        }
    };
    note("no_new_privs", set_no_new_privs(true));
    note("ambient capabilities", clear_ambient_capability_set());
    let held = match capabilities(None) {
        Ok(held) => held,
        Err(error) => return note("capabilities", Err(error)),
    };
    // Whoever lacks it has nothing that the bounding set would bound: it has no new privileges.
    if held.effective.contains(CapabilitySet::SETPCAP) {
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            match remove_capability_from_bounding_set(one) {
                Ok(()) => {}
                // The kernel knows no such capability, and none above it.
                Err(rustix::io::Errno::INVAL) => break,
                Err(error) => return note("bounding set of capabilities", Err(error)),
            }
        }
    }
    let none = CapabilitySet::empty();
    if held.effective.is_empty() && held.permitted.is_empty() && held.inheritable.is_empty() {
        return;
    }
    let nothing = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    note("capabilities", set_capabilities(None, nothing));
}
