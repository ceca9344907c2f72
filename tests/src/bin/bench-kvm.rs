//! `cargo xtask bench kvm`: Slat's calls beside the kernel calls below them, in turns, in one run.
//! What is measured and how is in [`slat_tests::bench::kvm`].

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use slat_proto::v1::Backend;
use slat_tests::{
    Fleet, Layout,
    bench::{
        figures, interrupt,
        kvm::{self, HOST, Lab, OTHER, available_mib, fitting, host_mib},
        rows::{self, Row},
    },
    binary, scene,
};

/// Clean harvests, MiB: nothing of it has to be there.
const CLEAN_MIB: u64 = 16 << 10;

/// Slat's calls beside the kernel calls below them
#[derive(Debug, Parser)]
struct Args {
    /// Samples of what takes long; of what does not there are more
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Memory in MiB of whatever has to be there, at most; less is taken where less is free
    #[arg(long, default_value_t = 16 << 10, value_parser = clap::value_parser!(u64).range(64..))]
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
    Floor,
    Slots,
    Clean,
    Dirty,
    Populate,
    Readers,
    Access,
}

impl Part {
    async fn measure(self, lab: &Lab, most_mib: u64) -> anyhow::Result<Vec<Row>> {
        let fits = |wanted: u64, times| {
            let available = available_mib()?;
            anyhow::Ok(fitting(wanted.min(most_mib), times, available))
        };
        Ok(match self {
            Self::Floor => kvm::floor::measure(lab).await?,
            Self::Slots => kvm::slots::measure(lab).await?,
            Self::Clean => {
                kvm::harvest::clean(lab, fitting(CLEAN_MIB, 1, available_mib()?)).await?
            }
            // Two VMs at once.
            Self::Dirty => kvm::harvest::dirty(lab, fits(16 << 10, 2)?).await?,
            Self::Populate => {
                let (runs, size) = (lab.runs, fits(1 << 10, 1)?);
                let task = move || kvm::populate::measure(runs, size);
                vec![tokio::task::spawn_blocking(task).await??]
            }
            Self::Readers => kvm::guest::readers(lab, fits(256, 1)?).await?,
            // The guest and the process beside it.
            Self::Access => kvm::guest::access(lab, fits(4 << 10, 2)?)
                .await?
                .into_iter()
                .collect(),
        })
    }
}

async fn measure(args: &Args) -> anyhow::Result<Vec<Row>> {
    let host = host_mib()?;
    let mut lab = Lab {
        fleet: Fleet::start(Layout {
            backend: Backend::Kvm,
            hosts: vec![(HOST, host), (OTHER, host)],
            own_clocks: false,
        })
        .await?,
        runs: args.runs,
    };
    let mut rows = Vec::new();
    for part in Part::value_variants() {
        if args.only.is_empty() || args.only.contains(part) {
            eprintln!("{part:?}");
            rows.extend(part.measure(&lab, args.memory_mib).await?);
        }
    }
    lab.fleet.finish().await?;
    Ok(rows)
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures mean nothing");
    }
    binary::slat()?;
    let rows = match scene::kvm_missing() {
        Some(why) => {
            eprintln!("SKIPPED: {why}");
            Vec::new()
        }
        // One thread: what a call waits for is the other side, not a thread of its caller.
        None => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            interrupt::measure(&runtime, measure(&args))?
        }
    };
    if args.update_docs && !rows.is_empty() {
        let page: PathBuf = binary::workspace().join("docs/benchmarks.md");
        let below = format!(
            "Median (least–greatest) of samples taken in turns, {}.\n",
            figures::machine()
        );
        figures::put_table(&page, "kvm", &format!("{}\n{below}", rows::table(&rows)))?;
    }
    if args.output == "json" {
        println!("{}", rows::json(&rows));
    } else {
        print!("{}", rows::table(&rows));
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
