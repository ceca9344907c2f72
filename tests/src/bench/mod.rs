//! Benchmarks beside a plain loop in the same run, as ratios. Nothing here asserts a speed.
//!
//! * [`picture`] draws one migration from its figures, for the README.
//! * [`plain`] moves bytes over loopback TCP with nothing but write and read.
//! * [`report`] takes medians, prints the table, the JSON and the part of `docs/benchmarks.md` that
//!   is ours.

pub mod picture;
pub mod plain;
pub mod report;
