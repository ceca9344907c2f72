//! One hypervisor host.
//!
//! * [`host`] is the daemon: it supervises one `slat vm` process per VM, finds them again after a restart, routes requests
//!   to them and reports to the server. It holds no guest.
//! * [`vm`] is the inside of one VM process: life cycle, memory, ownership journal, migration halves.
//! * [`backend`] runs vCPUs and walks second-stage tables: KVM, or the Common MMU in software.
//! * [`guest`] is memstress, the guest that checks its own memory, and the raw image.
//!
//! Arrows point down: `host → vm → backend → guest`; `host` meets a VM process only over its socket, its journal and its
//! transfer records.

pub mod backend;
pub mod guest;
pub mod host;
pub mod vm;
