//! Operations as data: a name and four numbers.
//!
//! A list of operations is one line of text, so a failure can be kept in `model.regressions.txt`
//! and outlives changes of the strategies here. What the numbers mean is said where they are
//! carried out (`run`); every number is legal.

use std::{fmt, str::FromStr};

use proptest::prelude::*;

/// Frames in each of the three windows that operations use.
pub(crate) const WINDOW: u64 = 2048;
/// A huge page.
pub(crate) const HUGE: u64 = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) name: &'static str,
    pub(crate) args: [u64; 4],
}

/// Every operation, and how often it comes.
const KINDS: &[(&str, u32)] = &[
    ("create", 8),
    ("big", 1),
    ("delete", 1),
    ("move", 1),
    ("log", 4),
    ("touch", 22),
    ("fault", 14),
    ("mirror", 5),
    ("beside", 4),
    ("mirror_zap", 1),
    ("mirror_protect", 2),
    ("mirror_age", 1),
    ("lose", 1),
    ("replace", 1),
    ("prefault", 2),
    ("zap", 2),
    ("zap_all", 1),
    ("withdraw", 1),
    ("zap_withdrawn", 1),
    ("begin", 2),
    ("end", 3),
    ("split", 1),
    ("forbid", 1),
    ("allow", 1),
    ("protect", 2),
    ("age", 2),
    ("get", 1),
    ("harvest", 3),
    ("clear", 4),
    ("mark", 1),
    ("nx", 2),
    ("vcpu", 1),
    ("space", 1),
    ("settle", 1),
];

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.args;
        write!(f, "{}({a},{b},{c},{d})", self.name)
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('(').ok_or(text)?;
        let rest = rest.strip_suffix(')').ok_or(text)?;
        let (name, _) = KINDS.iter().find(|(known, _)| *known == name).ok_or(text)?;
        let mut args = [0; 4];
        for (arg, number) in args.iter_mut().zip(rest.split(',')) {
            *arg = number.parse().map_err(|_| text)?;
        }
        Ok(Self { name, args })
    }
}

/// One case: choices, then operations.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) choices: u64,
    pub(crate) ops: Vec<Op>,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.choices)?;
        self.ops.iter().try_for_each(|op| write!(f, " {op:?}"))
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split_whitespace();
        let choices = words
            .next()
            .and_then(|word| word.parse().ok())
            .ok_or(text)?;
        let ops = words.map(str::parse).collect::<Result<_, _>>()?;
        Ok(Self { choices, ops })
    }
}

fn op() -> impl Strategy<Value = Op> {
    let kinds: Vec<_> = KINDS
        .iter()
        .map(|&(name, weight)| (weight, Just(name).boxed()))
        .collect();
    // Aligned places are likely: that is where huge leaves come from.
    let place = prop_oneof![
        6 => (0..3u64, 0..4u64).prop_map(|(n, m)| n * HUGE + m),
        2 => 0..3 * WINDOW,
        3 => (0..12u64).prop_map(|n| n * HUGE),
        3 => (0..12u64, 0..4u64).prop_map(|(n, m)| n * HUGE + m),
        1 => (0..20u64).prop_map(|n| n * 300),
    ];
    let length = prop_oneof![
        1..1400u64,
        Just(1),
        1..9u64,
        Just(HUGE),
        Just(2 * HUGE),
        Just(3 * HUGE)
    ];
    let word = prop_oneof![any::<u64>(), 0..64u64];
    (
        proptest::strategy::Union::new_weighted(kinds),
        0..6u64,
        place,
        length,
        word,
    )
        .prop_map(|(name, a, b, c, d)| Op {
            name,
            args: [a, b, c, d],
        })
}

/// Cases of up to `most` operations.
pub(crate) fn case(most: usize) -> impl Strategy<Value = Case> {
    (any::<u64>(), prop::collection::vec(op(), 1..most))
        .prop_map(|(choices, ops)| Case { choices, ops })
}
