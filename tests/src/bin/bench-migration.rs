//! `cargo xtask bench migration`: an idle VM full of random bytes goes back and forth between two
//! agents on this machine, with 1 and with 4 streams, and beside each migration the plain loop of
//! [`slat_tests::bench::plain`] moves as many bytes over as many connections. Runs alternate, so
//! that what else the machine does meets both.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use slat_proto::v1::{self, Backend};
use slat_tests::{
    Fleet, Layout,
    bench::{
        plain,
        report::{self, Pair, Row, per_gib},
    },
    binary,
    guest::{MIB, busy, seconds},
    scene,
};

/// Migrations of an idle VM beside a plain loop over loopback TCP
#[derive(Debug, Parser)]
struct Args {
    /// Guest memory in MiB
    #[arg(long, default_value_t = 2048)]
    memory_mib: u64,
    /// Migrations for each number of streams; the first of each warms up and is not counted
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// KVM where it is, software elsewhere, or one of them
    #[arg(long, default_value = "auto", value_parser = ["auto", "kvm", "software"])]
    backend: String,
    /// Table for people or one JSON object
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
    /// Rewrite the table in docs/benchmarks.md
    #[arg(long)]
    update_docs: bool,
}

fn backend(name: &str) -> anyhow::Result<Backend> {
    match name {
        "software" => Ok(Backend::Software),
        "kvm" => match scene::kvm_missing() {
            None => Ok(Backend::Kvm),
            Some(why) => bail!("--backend kvm: {why}"),
        },
        _ => Ok(scene::best_backend()),
    }
}

/// Source, destination and the plain loop's two ends may hold the memory at the same time.
fn check_memory(memory_mib: u64) -> anyhow::Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|line| line.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse().ok())
        .context("MemAvailable in /proc/meminfo")?;
    let needed = memory_mib * 4;
    ensure!(
        kib / 1024 > needed,
        "{needed} MiB must be available, {} are; choose less with --memory-mib",
        kib / 1024
    );
    Ok(())
}

async fn one(fleet: &Fleet, vm: &str, to: &str, streams: u32) -> anyhow::Result<Pair> {
    let params = v1::MigrationParams {
        streams,
        ..Default::default()
    };
    let done = fleet.migrate_and_wait(vm, to, params).await?;
    let progress = done.progress.context("no progress")?;
    let bytes = progress.bytes_transferred;
    let time = seconds(progress.transfer_time.as_ref());
    let cpu = seconds(progress.cpu_time.as_ref()) + seconds(done.destination_cpu_time.as_ref());
    ensure!(time > 0.0 && cpu > 0.0 && bytes > 0, "{progress:#?}");
    // The source's memory is given back before the plain loop begins.
    fleet
        .vm_until(&fleet.server(), vm, "released", |vm| {
            vm.migration.is_empty()
        })
        .await?;
    for host in ["host-a", "host-b"].into_iter().filter(|host| *host != to) {
        fleet.vm_dir_gone(host, vm).await?;
    }
    let connections = streams as usize;
    let amount = usize::try_from(bytes)?;
    let plain = tokio::task::spawn_blocking(move || plain::run(connections, amount)).await??;
    Ok(Pair {
        slat: bytes as f64 / time,
        plain: plain.bytes as f64 / plain.time.as_secs_f64(),
        cpu: per_gib(cpu, bytes),
        plain_cpu: per_gib(plain.cpu.as_secs_f64(), plain.bytes),
        downtime: seconds(progress.downtime.as_ref()),
        whole: seconds(done.total_time.as_ref()),
    })
}

async fn measure(args: &Args, backend: Backend) -> anyhow::Result<Vec<Row>> {
    let memory = args.memory_mib + 64;
    let mut fleet = Fleet::start(Layout {
        backend,
        hosts: vec![("host-a", memory), ("host-b", memory)],
    })
    .await?;
    let spec = busy(backend, args.memory_mib, 1, Some(0));
    let vm = fleet.run_vm("bench", "host-a", spec).await?;
    let word = if backend == Backend::Kvm {
        "kvm"
    } else {
        "software"
    };
    let size = if args.memory_mib.is_multiple_of(1024) {
        format!("{} GiB", args.memory_mib / 1024)
    } else {
        format!("{} MiB", args.memory_mib)
    };
    let mut rows: Vec<(u32, Row)> = [1_u32, 4]
        .into_iter()
        .map(|streams| {
            let plural = if streams == 1 { "" } else { "s" };
            let name = format!("{word}, idle {size}, {streams} stream{plural}");
            (
                streams,
                Row {
                    name,
                    pairs: Vec::new(),
                },
            )
        })
        .collect();
    let mut hosts = ["host-b", "host-a"].into_iter().cycle();
    for run in 0..=args.runs {
        for (streams, row) in &mut rows {
            let to = hosts.next().context("a cycle does not end")?;
            let pair = one(&fleet, &vm.name, to, *streams).await?;
            eprintln!(
                "{} run {run}: {:.2} GB/s, plain {:.2} GB/s, downtime {:.1} ms{}",
                row.name,
                pair.slat / 1e9,
                pair.plain / 1e9,
                pair.downtime * 1e3,
                if run == 0 { " (warm-up)" } else { "" }
            );
            if run > 0 {
                row.pairs.push(pair);
            }
        }
    }
    fleet.finish().await?;
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

fn run() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(plain::RECEIVER) {
        let mut number = || {
            words
                .next()
                .context("streams and bytes")?
                .parse::<usize>()
                .context("a number")
        };
        return plain::receive(number()?, number()?);
    }
    let args = Args::parse();
    ensure!(
        args.memory_mib.checked_mul(MIB).is_some(),
        "--memory-mib is too much"
    );
    let backend = backend(&args.backend)?;
    check_memory(args.memory_mib)?;
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures mean nothing");
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let rows = runtime.block_on(measure(&args, backend))?;
    if args.update_docs {
        let page: PathBuf = binary::workspace().join("docs/benchmarks.md");
        report::update_docs(&page, &rows)?;
    }
    if args.output == "json" {
        println!("{}", report::json(&rows));
    } else {
        print!("{}", report::table(&rows));
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
