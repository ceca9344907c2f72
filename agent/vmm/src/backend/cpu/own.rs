//! This host's facts, as the rules of an architecture look at them.

use super::fact::{CpuDifference, CpuFact, NONE};

/// The facts. Each rule gives the difference, if there is one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own<'a>(pub(super) &'a [CpuFact]);

impl<'a> Own<'a> {
    pub(super) fn find(self, name: &str) -> Option<&'a CpuFact> {
        self.0.iter().find(|fact| fact.name == name)
    }

    pub(super) fn differs(self, fact: &CpuFact) -> CpuDifference {
        let here = self.find(&fact.name).map_or(NONE, |own| own.value.as_str());
        CpuDifference::new(&fact.name, &fact.value, here)
    }

    /// The values are the same.
    pub(super) fn same(self, fact: &CpuFact) -> Option<CpuDifference> {
        let own = self.find(&fact.name);
        (own.map(|own| &own.value) != Some(&fact.value)).then(|| self.differs(fact))
    }

    /// Both are numbers and `allowed` of (source, here). Where this host has no such fact, it is 0.
    pub(super) fn numbers(
        self,
        fact: &CpuFact,
        allowed: impl FnOnce(u64, u64) -> bool,
    ) -> Option<CpuDifference> {
        let own = self.find(&fact.name).map_or(Some(0), CpuFact::number);
        let fine = fact
            .number()
            .zip(own)
            .is_some_and(|(source, own)| allowed(source, own));
        (!fine).then(|| self.differs(fact))
    }

    /// Facts without which nothing can be said, and which the source left out.
    pub(super) fn missing(self, source: &[CpuFact], needed: &[&str]) -> Vec<CpuDifference> {
        needed
            .iter()
            .filter(|name| source.iter().all(|fact| fact.name != **name))
            .map(|name| {
                let here = self.find(name).map_or(NONE, |own| own.value.as_str());
                CpuDifference::new(name, NONE, here)
            })
            .collect()
    }
}
