//! A fact of a CPU, and a difference between two.

use std::fmt;

/// Most characters of a name or a value that an error shows.
pub(super) const MAX_SHOWN: usize = 80;

/// One fact, e.g. `x86.cpuid.7.0.ebx` = `0x1c` or `riscv.isa` = `rv64imafdc`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CpuFact {
    /// Dotted; the architecture comes first.
    pub(crate) name: String,
    /// Numbers are hexadecimal with `0x`, or decimal.
    pub(crate) value: String,
}

impl CpuFact {
    pub(in crate::backend) fn new(name: impl Into<String>, value: impl fmt::Display) -> Self {
        Self {
            name: name.into(),
            value: value.to_string(),
        }
    }

    /// Its value, when that is a number.
    pub(super) fn number(&self) -> Option<u64> {
        match self.value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => self.value.parse().ok(),
        }
    }
}

/// Why a VM of the source's CPU cannot live here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CpuDifference {
    /// Of the fact.
    pub(crate) name: String,
    /// Its value at the source.
    pub(crate) source: String,
    /// Its value here; `none` where this host has no such fact.
    pub(crate) here: String,
}

impl CpuDifference {
    pub(super) fn new(name: &str, source: &str, here: &str) -> Self {
        let shown = |text: &str| text.escape_default().take(MAX_SHOWN).collect();
        Self {
            name: shown(name),
            source: shown(source),
            here: shown(here),
        }
    }
}

impl fmt::Display for CpuDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, source, here } = self;
        write!(f, "{name}: {source} at the source, {here} here")
    }
}

/// What a value that is not there is called.
pub(super) const NONE: &str = "none";
