//! `cargo xtask bench image`: a saved VM's file beside plain writes and reads of the same bytes.
//! What is measured and how is in [`slat_tests::bench::image`].

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use slat_test_dir::TestDir;
use slat_tests::{
    bench::{figures, image, rows},
    binary,
};

/// A saved VM's file beside plain writes and reads of the same bytes
#[derive(Debug, Parser)]
struct Args {
    /// Samples of each
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Memory in MiB that is written; twice as much is held, and twice as much is on the disk
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    memory_mib: u32,
    /// Where the files are made; a temporary directory without it
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Table for people or one JSON object
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
    /// Rewrite the table in docs/benchmarks.md
    #[arg(long)]
    update_docs: bool,
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures mean nothing");
    }
    let dir = match &args.dir {
        Some(dir) => TestDir::within(dir)?,
        None => TestDir::with_prefix("slat-bench-image-")?,
    };
    let rows = image::measure(dir.path(), args.memory_mib as usize, args.runs)?;
    let below = format!(
        "Median (least–greatest) of {} samples taken in turns, {}.\n",
        args.runs,
        figures::machine()
    );
    let table = format!("{}\n{below}", rows::table(&rows));
    if args.update_docs {
        let page = binary::workspace().join("docs/benchmarks.md");
        figures::put_table(&page, "image", &table)?;
    }
    if args.output == "json" {
        println!("{}", rows::json(&rows));
    } else {
        print!("{table}");
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
