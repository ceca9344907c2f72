//! What a test is given, and what may come of it.

use crate::lab::{
    fleet::{Backend, Fleet},
    hosts::Hosts,
};

/// What came of a test that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With its figures, in one line.
    Passed(String),
    /// Passed, but for parts that cannot be made, with why.
    InPart(Vec<String>),
    /// With why it cannot be made.
    Skipped(String),
}

/// What a test is given.
#[derive(Debug)]
pub(crate) struct Scene<'a> {
    pub(crate) hosts: &'a mut Hosts,
    pub(crate) backend: Backend,
    pub(crate) brief: bool,
    /// What is left to chance goes by it.
    pub(crate) seed: u64,
}

/// What a guest may stand still on an emulated host of a machine that is busy with other things:
/// how fast pages move there is no test's matter but `downtime`'s.
pub(super) const ACCEPTED: &str = "--max-downtime 5s";
/// So slow that it can be disturbed: 64 MiB take 16 s.
pub(super) const SLOW: &str = "--max-bandwidth 4MiB/s";

/// A fleet with a VM of 64 MiB running on host 1, which writes `rate` MiB a second.
pub(super) fn fleet<'a>(scene: &'a mut Scene<'_>, rate: u32) -> anyhow::Result<Fleet<'a>> {
    let mut fleet = Fleet::start(scene.hosts)?;
    fleet.run_vm(scene.backend, 64, rate)?;
    Ok(fleet)
}
