//! History: what went wrong in KVM's second-stage MMUs, each as a test that would fail here if it
//! came back.
//!
//! One file a chapter of `docs/pitfalls.md`, which names for each pitfall the test here or
//! elsewhere that would catch it; for many the bug is planted and the test shown to fail (`cargo
//! xtask planted`). One program, so that the formats are compiled once.
//!
//! The *rig* lets a test in where races happen: its host calls a hook inside each flush and when
//! asked for a mapping's size, its memory calls one inside each allocation, so an interleaving that
//! history needed luck for is the same each time.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]
#![allow(
    unexpected_cfgs,
    reason = "`few_formats` is set by cargo xtask planted"
)]

#[path = "../common/mod.rs"]
mod common;
mod rig;

mod dirty;
mod fence;
mod flush;
mod iterator;
mod memory;
mod notifier;
mod other;
mod roots;
mod writes;
