//! `cargo xtask bench paging`: faults resolved in user space, saves, restores and forks, beside
//! something plain in the same run. What is measured and how is in [`slat_tests::bench::paging`].

use std::{path::PathBuf, process::ExitCode};

use anyhow::ensure;
use clap::{Parser, ValueEnum};
use serde_json::json;
use slat_proto::v1::Backend;
use slat_tests::{
    Fleet, Layout,
    bench::{
        figures, interrupt,
        kvm::{available_mib, fitting, host_mib},
        paging::{bare, children, copies, deaths, faults},
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
    /// This is the peer's process: resolve faults as told at this socket
    #[arg(long, hide = true)]
    bare_handler: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Part {
    Faults,
    Mirror,
    Deaths,
    Restores,
    Forks,
    Children,
}

impl Part {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

#[derive(Default)]
struct Figures {
    rows: Vec<(Part, Row)>,
    notes: Vec<String>,
}

impl Figures {
    fn add(&mut self, part: Part, rows: Vec<Row>) {
        self.rows.extend(rows.into_iter().map(|row| (part, row)));
    }

    /// No two rows are called the same.
    fn check(&self) -> anyhow::Result<()> {
        let mut keys: Vec<&str> = self.rows.iter().map(|(_, row)| row.key()).collect();
        keys.sort_unstable();
        let twice = keys.windows(2).find(|pair| pair[0] == pair[1]);
        ensure!(twice.is_none(), "two rows are called {twice:?}");
        Ok(())
    }

    fn table(&self) -> String {
        let rows: Vec<Row> = self.rows.iter().map(|(_, row)| row.clone()).collect();
        rows::table(&rows)
    }

    /// Each row says what makes it alone.
    fn json(&self) -> serde_json::Value {
        let of = |(part, row): &(Part, Row)| {
            let mut one = row.json();
            let part = part.name();
            one["command"] = json!(format!("cargo xtask bench paging --only {part}"));
            one["part"] = json!(part);
            one
        };
        let rows: Vec<_> = self.rows.iter().map(of).collect();
        json!({ "rows": rows, "notes": self.notes })
    }
}

async fn measure(args: &Args) -> anyhow::Result<Figures> {
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    let mut figures = Figures::default();
    if wanted(Part::Faults) {
        let runs = args.runs;
        let task = tokio::task::spawn_blocking(move || faults::measure(runs));
        let (rows, notes) = task.await??;
        figures.add(Part::Faults, rows);
        figures.notes.extend(notes);
    }
    if wanted(Part::Mirror) {
        let size = fitting(args.memory_mib, 1, available_mib()?);
        let task = tokio::task::spawn_blocking(move || faults::mirror(size));
        figures.add(Part::Mirror, vec![task.await??]);
    }
    let in_fleet = [Part::Deaths, Part::Restores, Part::Forks, Part::Children];
    if !in_fleet.into_iter().any(wanted) {
        return Ok(figures);
    }
    // What an agent gives away by itself: a sixteenth less than there is.
    let gives = host_mib()? / 9 * 10 / 16 * 15;
    let mut fleet = Fleet::start(Layout {
        backend: Backend::Kvm,
        hosts: vec![(copies::HOST, gives)],
        own_clocks: false,
    })
    .await?;
    // A guest and its file, or its child.
    let size = fitting(args.memory_mib, 3, available_mib()?);
    if wanted(Part::Deaths) {
        let (rows, note) = deaths::deaths(&fleet, args.runs, size).await?;
        figures.add(Part::Deaths, rows);
        figures.notes.push(note);
    }
    if wanted(Part::Restores) {
        let rows = copies::restores(&fleet, args.runs, size).await?;
        figures.add(Part::Restores, rows);
    }
    if wanted(Part::Forks) {
        let rows = copies::forks(&fleet, args.runs, size).await?;
        figures.add(Part::Forks, rows);
    }
    if wanted(Part::Children) {
        // Their memory is counted in full, each.
        let most = gives / (children::CHILDREN + 1) / 64 * 64;
        let rows = children::children(&fleet, args.runs, size.min(most)).await?;
        figures.add(Part::Children, rows);
    }
    fleet.finish().await?;
    Ok(figures)
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(path) = &args.bare_handler {
        return bare::serve(path);
    }
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
    figures.check()?;
    let notes = figures.notes.join("\n");
    if args.update_docs && !figures.rows.is_empty() {
        let page: PathBuf = binary::workspace().join("docs/benchmarks.md");
        let below = format!(
            "{notes}\n\nMedian (least–greatest) of samples taken in turns, {}.\n",
            figures::machine()
        );
        let table = figures.table();
        figures::put_table(&page, "paging", &format!("{table}\n{below}"))?;
    }
    if args.output == "json" {
        println!("{}", figures.json());
    } else {
        print!("{}", figures.table());
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
