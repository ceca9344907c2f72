//! x86-64: a guest calls out by ports. Its page tables map every slot one to one by 2 MiB pages:
//! user, writable, executable. Accessed and dirty bits are set beforehand, so running the guest
//! does not write them.

mod memstress;
mod ports;
mod tables;

pub(in crate::guest) use self::{memstress::memstress, tables::identity as support};
pub(crate) use ports::{PORT_CONSOLE, PORT_DOORBELL, PORT_END};
