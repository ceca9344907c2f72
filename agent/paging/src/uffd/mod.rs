//! userfaultfd: told of a process's page faults, and the calls that resolve them.
//!
//! A descriptor belongs to the address space that made it. Every call here works on that one,
//! whoever makes it; only [`Uffd::open`] must be called by the process whose faults are to be told.
//! Addresses are that process's, so nothing here can harm the caller's memory.
//!
//! # What a host offers
//! [`Offer`] says. Faults that the kernel takes for a process (KVM's do) are told only to a
//! descriptor from `/dev/userfaultfd`, from a process with `CAP_SYS_PTRACE`, or where
//! `vm.unprivileged_userfaultfd` is 1.
//!
//! # Sources
//! `Documentation/admin-guide/mm/userfaultfd.rst`; ioctl_userfaultfd(2).

mod calls;
mod descriptor;
mod event;
#[cfg(test)]
mod tests;

pub use self::{
    calls::{Done, Watch},
    descriptor::{Offer, OpenError, Uffd},
    event::{Fault, FaultKind},
};
