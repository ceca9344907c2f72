//! `bench-mmu`: the Common MMU beside other page-table crates and beside the machine's baselines,
//! in one run.
//!
//! # How it measures
//!
//! A *row* is one operation at one size. Its *subjects* (Slat, each peer that can do the operation,
//! the baselines) take turns sample by sample (`ring`), each measured by criterion, on one core to
//! which the process is pinned. Times are the measuring thread's CPU time, so another program on
//! the same core delays the run and is not counted; rows with two threads are wall-clock time.
//! Every subject's result is checked outside the timing.
//!
//! # Map
//!
//! | file | holds |
//! |---|---|
//! | `slat` | the one file that knows Slat |
//! | `peers/` | the one that knows each peer, and the frame pool they share |
//! | `baseline` | plain loops over flat arrays |
//! | `table` | what every page table can do, as a trait |
//! | `ring`, `clock`, `heap` | taking turns; time and cores; counted allocation |
//! | `rows/` | the rows |
//! | `report`, `print` | goals judged; table, Markdown and JSON |
//!
//! A missed goal is a result, not an error.

mod baseline;
mod clock;
mod heap;
mod order;
mod peers;
mod print;
mod report;
mod ring;
mod rows;
mod slat;
mod table;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};

use crate::{
    print::Console,
    rows::{Plan, Sizes},
};

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

/// How the result is written to standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// An aligned table
    Table,
    /// {"rows":[{"name","slat_ns","peer","peer_ns","baseline","baseline_ns","goal","met", ...}]}
    Json,
    /// The table of docs/benchmarks.md
    Markdown,
}

/// Measure the Common MMU beside other page-table crates and the machine's baselines, in one run on
/// one core
///
/// Each row is one operation at one size: the median of Slat, of the fastest peer that can do the
/// operation and of the baseline, with their spreads, and whether the goal was met. A missed goal
/// is not an error. Progress goes to standard error, the result alone to standard output.
///
/// Peers: page_table_multiarch, page-table-generic, x86_64 (OffsetPageTable). Nanoseconds are per
/// page unless the row says otherwise.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask bench mmu",
    bin_name = "cargo xtask bench mmu",
    max_term_width = 100
)]
#[command(
    after_help = "Examples:\n  cargo xtask bench mmu                         everything, some minutes, 2 GiB of memory\n  cargo xtask bench mmu --quick                 small sizes, to see that it works\n  cargo xtask bench mmu --only 'fault, random'  rows whose name contains this\n  cargo xtask bench mmu --output json | jq '.rows[] | select(.met == false)'"
)]
struct Options {
    /// Form of the result
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
    /// 256 MiB and 1 GiB instead of 4 GiB and 64 GiB; the goals are not about these sizes
    #[arg(long)]
    quick: bool,
    /// Only rows whose name contains this
    #[arg(long, value_name = "SUBSTRING")]
    only: Option<String>,
    /// Only the names of the rows
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    // Asked before pinning.
    let cores = clock::cores()?;
    let first = cores[0];
    let sizes = if options.quick {
        Sizes::quick(cores)
    } else {
        Sizes::full(cores)
    };
    let plans: Vec<Plan> = rows::all(&sizes)
        .into_iter()
        .filter(|plan| {
            options
                .only
                .as_ref()
                .is_none_or(|only| plan.name.contains(only.as_str()))
        })
        .collect();
    anyhow::ensure!(
        !plans.is_empty(),
        "no row contains {:?}; --list names them",
        options.only.unwrap_or_default()
    );
    if options.list {
        for plan in &plans {
            println!("{}", plan.name);
        }
        return Ok(());
    }
    // criterion reports to standard output, which belongs to the result.
    let console = Console::take()?;
    clock::pin(first)?;
    let scratch = slat_test_dir::TestDir::with_prefix("slat-bench-mmu-")
        .context("a directory for criterion's files")?;
    let mut rows = Vec::new();
    for plan in plans {
        eprintln!("== {}", plan.name);
        let name = plan.name.clone();
        let row = plan
            .run(scratch.path(), rows.len())
            .with_context(|| format!("row {name:?}"))?;
        rows.push(row);
    }
    if options.quick {
        eprintln!("--quick: the goals are about 4 GiB and 64 GiB, not about these sizes");
    }
    console.write(&match options.output {
        Output::Table => print::table(&rows),
        Output::Markdown => print::markdown(&rows),
        Output::Json => print::json(&rows)?,
    })
}
