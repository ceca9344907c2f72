//! A pager against a VM process in the same address space, and the kernel's userfaultfd at hand.
//!
//! No `/dev/kvm` is needed: threads touch the views as vCPUs would. Where the kernel's faults
//! cannot be told, tests say `SKIPPED` and return.

mod faults;
mod heard;
mod layers;
mod loads;
mod measure;
mod mirrored;
mod model;
mod prefault;
mod restart;
mod saves;
mod snapshots;
mod source;
mod view;
mod vm;
