//! The MMU against a flat model, on every format, with all operations interleaved.
//!
//! The model (`state`) keeps, for each address space, leaves by guest frame (host frame, level,
//! permissions, Accessed, Dirty), which tables exist, dirty pages by slot, and holes that the table
//! remembers; `fault`, `log` and `run` say what each operation does to that, from the MMU's
//! documentation. After every operation (`check`):
//!
//! - the outcome is the one expected;
//! - a walker written from the manual finds exactly the model's leaves and as many tables;
//! - the MMU's own walks agree, entry by entry, and so does its list of leaves;
//! - page statistics match, by level, withdrawn roots and mirrors included;
//! - no TLB, filled at random and obeying only the host's flushes (`host`), holds more than the
//!   table allows, nor could write a page of a logged slot that the log does not have;
//! - the external owner's map is the mirror's, and it was asked for what is due, page by page
//!   (`mirror`); it refuses at random, in part too, and loses mappings.
//!
//! At the end everything is given back, to the last frame.
//!
//! *Running out of table memory* (a third of the cases): which leaves are split is then not known,
//! so after an operation that splits, the tables may be coarser or less writable than the model,
//! and the model takes them over; no other liberty.
//!
//! `model.regressions.txt`, one case a line, is replayed first. `SLAT_TEST_SEED` repeats a run;
//! `SLAT_TEST_CASES` makes it longer.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

#[path = "../common/mod.rs"]
mod common;

mod check;
mod fault;
mod host;
mod log;
mod mirror;
mod op;
mod run;
mod state;

use op::Case;
use proptest::test_runner::{TestCaseError, TestCaseResult};
use slat_arch::GuestStage;
use state::World;

const CASES: u32 = 24;
const OPS: usize = 70;

const REGRESSIONS: &str = include_str!("../model.regressions.txt");

fn replay(stage: GuestStage, case: &Case) -> TestCaseResult {
    let mut world = World::new(stage, case.choices);
    for op in &case.ops {
        let step = world.run(*op).and_then(|()| world.check());
        step.map_err(|error| {
            TestCaseError::fail(format!(
                "after {op:?}: {error}\nregression: {stage} {case:?}"
            ))
        })?;
    }
    world.end()
}

fn agrees_with_the_model(stage: GuestStage) {
    let name = stage.to_string();
    for line in REGRESSIONS.lines() {
        let Some((format, case)) = line.split_once(' ').filter(|(word, _)| *word != "#") else {
            continue;
        };
        if format == name || format == "all" {
            let case: Case = case.parse().expect("a regression is a case");
            replay(stage, &case).unwrap_or_else(|error| panic!("{error}"));
        }
    }
    common::property::check(CASES, &op::case(OPS), |case| replay(stage, &case));
}

macro_rules! formats {
    ($($test:ident => $stage:ident,)*) => {
        $(
            #[test]
            fn $test() {
                agrees_with_the_model(GuestStage::$stage);
            }
        )*

        #[test]
        fn every_format_has_its_test() {
            assert_eq!(GuestStage::ALL, [$(GuestStage::$stage),*]);
        }
    };
}

formats! {
    ept4 => Ept4,
    ept5 => Ept5,
    ept4_noad => Ept4NoAd,
    ept5_noad => Ept5NoAd,
    npt4 => Npt4,
    npt5 => Npt5,
    sv39x4 => Sv39x4,
    sv48x4 => Sv48x4,
    sv57x4 => Sv57x4,
    arm64_ipa40 => Arm64Ipa40,
    arm64_ipa48 => Arm64Ipa48,
}
