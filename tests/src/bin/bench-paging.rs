//! `cargo xtask bench paging`: faults resolved in user space, saves, restores and forks, beside
//! something plain in the same run. What is measured and how is in [`slat_tests::bench::paging`].

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use serde_json::json;
use slat_proto::v1::Backend;
use slat_tests::{
    Fleet, Layout,
    bench::{
        figures, interrupt,
        kvm::{available_mib, fitting, host_mib},
        paging::{copies, faults},
        rows::{self, Row},
    },
    binary, scene,
};

/// Faults resolved in user space, saves, restores and forks, beside something plain
#[derive(Debug, Parser)]
struct Args {
    /// Samples of each row
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Memory in MiB of guests, at most; less is taken where less is free
    #[arg(long, default_value_t = 4 << 10, value_parser = clap::value_parser!(u64).range(64..))]
    memory_mib: u64,
    /// These alone
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Table for people or one JSON object
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
    /// Rewrite the table in docs/benchmarks.md
    #[arg(long)]
    update_docs: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Part {
    Faults,
    Restores,
    Forks,
}

#[derive(Default)]
struct Figures {
    rows: Vec<Row>,
    notes: Vec<String>,
}

async fn measure(args: &Args) -> anyhow::Result<Figures> {
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    let mut figures = Figures::default();
    if wanted(Part::Faults) {
        let runs = args.runs;
        let task = tokio::task::spawn_blocking(move || faults::measure(runs));
        let (rows, mirror) = task.await??;
        figures.rows.extend(rows);
        figures.notes.push(mirror);
    }
    if !wanted(Part::Restores) && !wanted(Part::Forks) {
        return Ok(figures);
    }
    let mut fleet = Fleet::start(Layout {
        backend: Backend::Kvm,
        hosts: vec![(copies::HOST, host_mib()?)],
        own_clocks: false,
    })
    .await?;
    // A guest and its file, or its child.
    let size = fitting(args.memory_mib, 3, available_mib()?);
    if wanted(Part::Restores) {
        figures
            .rows
            .extend(copies::restores(&fleet, args.runs, size).await?);
    }
    if wanted(Part::Forks) {
        figures
            .rows
            .extend(copies::forks(&fleet, args.runs, size).await?);
    }
    fleet.finish().await?;
    Ok(figures)
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures mean nothing");
    }
    binary::slat()?;
    let figures = match scene::paging_missing() {
        Some(why) => {
            eprintln!("SKIPPED: {why}");
            Figures::default()
        }
        None => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            interrupt::measure(&runtime, measure(&args))?
        }
    };
    let notes = figures.notes.join("\n");
    if args.update_docs && !figures.rows.is_empty() {
        let page: PathBuf = binary::workspace().join("docs/benchmarks.md");
        let below = format!(
            "{notes}\n\nMedian (least–greatest) of samples taken in turns, {}.\n",
            figures::machine()
        );
        let table = rows::table(&figures.rows);
        figures::put_table(&page, "paging", &format!("{table}\n{below}"))?;
    }
    if args.output == "json" {
        let mut all = rows::json(&figures.rows);
        all["notes"] = json!(figures.notes);
        println!("{all}");
    } else {
        print!("{}", rows::table(&figures.rows));
        println!("{notes}");
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
