//! `cargo xtask oracles`: runs every format's proof of [`slat_tests::oracle`] and writes down what
//! became of each.

use std::{fs, path::PathBuf, process::ExitCode, time::SystemTime};

use anyhow::Context as _;
use clap::Parser;
use serde_json::json;
use slat_tests::oracle::list::{self, Outcome, Row};

/// Page tables walked by emulated hardware
#[derive(Debug, Parser)]
struct Args {
    /// Where packages are kept and machines run
    #[arg(long)]
    cache: PathBuf,
    /// Where the sources of the bare-metal programs are
    #[arg(long)]
    sources: PathBuf,
    /// What became of each format, as JSON
    #[arg(long)]
    report: PathBuf,
    /// Only formats whose names contain this
    #[arg(long, default_value = "")]
    only: String,
    /// Replays a run
    #[arg(long, env = "SLAT_TEST_SEED")]
    seed: Option<u64>,
}

fn seed(args: &Args) -> u64 {
    args.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64 & 0xffff_ffff)
    })
}

/// Says what became of a format. True unless it failed.
fn tell(row: &Row) -> bool {
    match &row.outcome {
        Outcome::Asked(report) => {
            for (kind, times) in &report.kinds {
                println!("    {times:>5}  {kind}");
            }
            for told in &report.told {
                println!("mismatch: {told}");
            }
            report.mismatches == 0
        }
        Outcome::Skipped(why) => {
            println!("{}: cannot be asked here: {why}", row.name);
            true
        }
        Outcome::Failed(why) => {
            println!("{}: {why}", row.name);
            false
        }
    }
}

fn run() -> anyhow::Result<bool> {
    let args = Args::parse();
    let seed = seed(&args);
    println!("SLAT_TEST_SEED={seed}");
    let cache = std::path::absolute(&args.cache)?;
    let sources = std::path::absolute(&args.sources)?;
    let mut passed = true;
    let rows = list::run(&cache, &sources, seed, &args.only, |row| {
        passed &= tell(row)
    })?;
    let entry = |row: &Row| match &row.outcome {
        Outcome::Asked(report) => {
            json!({"name": row.name, "line": report.to_string(), "failed": report.mismatches > 0})
        }
        Outcome::Skipped(why) => json!({"name": row.name, "skipped": why}),
        Outcome::Failed(why) => {
            json!({"name": row.name, "line": format!("{:<12} not proved: {why}", row.name), "failed": true})
        }
    };
    let entries: Vec<_> = rows.iter().map(entry).collect();
    fs::write(&args.report, serde_json::to_string_pretty(&entries)?)
        .with_context(|| format!("writing {}", args.report.display()))?;
    Ok(passed)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
