//! `cargo xtask bench migration`: an idle VM full of random bytes goes back and forth between two
//! agents on this machine, with 1 and with 4 streams, in the clear and by TLS, and beside each
//! migration a loop of [`slat_tests::bench::bare`] moves as many bytes over as many connections, in
//! the clear or by TLS as it did. Where QEMU is installed it migrates a guest of as much memory
//! beside those with 4 streams in the clear. Runs alternate, so that what else the machine does
//! meets all.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use slat_proto::v1::{self, Backend, MemoryBacking};
use slat_tests::{
    Fleet, Layout,
    bench::{
        bare, interrupt,
        kvm::available_mib,
        mapping::warm,
        qemu::{self, Qemu},
        report::{self, Pair, Peer, Row, per_gib},
    },
    binary,
    fleet::Protection,
    guest::{MIB, busy, seconds},
    scene,
};

/// Migrations of an idle VM, in the clear and by TLS, beside bare loops over loopback TCP
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
    /// What the VM's memory is made of; small is 4 KiB pages, as before there was a choice
    #[arg(long, default_value = "auto", value_parser = ["auto", "thp", "hugetlb-2m", "small"])]
    backing: String,
    /// Table for people or one JSON object
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
    /// Rewrite the table in docs/benchmarks.md
    #[arg(long)]
    update_docs: bool,
    /// Leave QEMU out, also where it is installed
    #[arg(long)]
    no_qemu: bool,
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

/// The VM of the other fleet, source, destination and the loop's two ends may hold the memory at
/// the same time; and a guest of QEMU's, which waits meanwhile.
fn check_memory(memory_mib: u64, qemu: bool) -> anyhow::Result<()> {
    let needed = memory_mib * if qemu { 6 } else { 5 };
    let available = available_mib()?;
    ensure!(
        available > needed,
        "{needed} MiB must be available, {available} are; choose less with --memory-mib{}",
        if qemu { ", or --no-qemu" } else { "" }
    );
    Ok(())
}

/// How long each phase took: `preparing 0.41 s, precopy 1.42 s`.
fn phases(done: &v1::Migration) -> String {
    let begins: Vec<(&str, f64)> = done
        .phase_times
        .iter()
        .filter_map(|time| {
            let at = time.time.as_ref()?;
            Some((
                time.phase().as_str_name(),
                at.seconds as f64 + f64::from(at.nanos) / 1e9,
            ))
        })
        .collect();
    let took = begins.windows(2).map(|pair| {
        let name = pair[0].0.trim_start_matches("MIGRATION_PHASE_");
        format!("{} {:.2} s", name.to_lowercase(), pair[1].1 - pair[0].1)
    });
    took.collect::<Vec<_>>().join(", ")
}

async fn one(Side { fleet, vm, tls, .. }: &Side, to: &str, streams: u32) -> anyhow::Result<Pair> {
    let params = v1::MigrationParams {
        streams,
        ..Default::default()
    };
    let done = fleet.migrate_and_wait(vm, to, params).await?;
    let progress = done.progress.clone().context("no progress")?;
    let bytes = progress.bytes_transferred;
    let time = seconds(progress.transfer_time.as_ref());
    let cpu = seconds(progress.cpu_time.as_ref()) + seconds(done.destination_cpu_time.as_ref());
    ensure!(time > 0.0 && cpu > 0.0 && bytes > 0, "{progress:#?}");
    let path = progress.path.clone().context("no path")?;
    let clear = path.protection() == v1::page_path::Protection::None;
    ensure!(clear != *tls, "{path:?}");
    let made_of = fleet.vm(&fleet.agent(to), vm).await?.mmu_stats;
    let huge = made_of.and_then(|stats| stats.backing_2m_bytes);
    eprintln!(
        "{} MiB of it in 2 MiB pages; {}",
        huge.map_or_else(|| "unknown".to_owned(), |huge| (huge / MIB).to_string()),
        phases(&done)
    );
    // The source's memory is given back before the loop begins.
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
    let tls = *tls;
    let bare = tokio::task::spawn_blocking(move || bare::run(connections, amount, tls)).await??;
    Ok(Pair {
        slat: bytes as f64 / time,
        bare: bare.bytes as f64 / bare.time.as_secs_f64(),
        cpu: per_gib(cpu, bytes),
        bare_cpu: per_gib(bare.cpu.as_secs_f64(), bare.bytes),
        downtime: seconds(progress.downtime.as_ref()),
        whole: seconds(done.total_time.as_ref()),
    })
}

/// A fleet and the VM in it.
struct Side {
    fleet: Fleet,
    vm: String,
    /// Where it goes next, and where it goes after that.
    next: [&'static str; 2],
    tls: bool,
}

impl Side {
    async fn start(args: &Args, backend: Backend, tls: bool) -> anyhow::Result<Self> {
        let memory = args.memory_mib + 64;
        let layout = Layout {
            backend,
            hosts: Vec::new(),
            own_clocks: false,
        };
        let protection = Protection {
            tls,
            namespaces: false,
        };
        let mut fleet = Fleet::start_by(layout, protection).await?;
        let mut options = vec!["--data-ports", "0"];
        if !tls {
            options.push("--insecure-pages");
        }
        for host in ["host-a", "host-b"] {
            fleet.add_host(host, memory, &options).await?;
        }
        let mut spec = busy(backend, args.memory_mib, 1, Some(0));
        spec.set_backing(match args.backing.as_str() {
            "thp" => MemoryBacking::Thp,
            "hugetlb-2m" => MemoryBacking::Hugetlb2m,
            "small" => MemoryBacking::Small,
            _ => MemoryBacking::Auto,
        });
        let vm = fleet.run_vm("bench", "host-a", spec).await?.name;
        Ok(Self {
            fleet,
            vm,
            next: ["host-b", "host-a"],
            tls,
        })
    }
}

/// What is measured, without figures yet.
fn row(args: &Args, backend: Backend, streams: u32, tls: bool) -> Row {
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
    let plural = if streams == 1 { "" } else { "s" };
    let mut name = format!("{word}, idle {size}, {streams} stream{plural}");
    if args.backing != "auto" {
        name.push_str(", ");
        name.push_str(&args.backing);
    }
    if tls {
        name.push_str(", TLS");
    }
    Row {
        name,
        streams,
        tls,
        pairs: Vec::new(),
    }
}

/// Migrations, and what they are compared with in [`Peer`].
async fn measure(
    args: &Args,
    backend: Backend,
    qemu: Result<Qemu, String>,
) -> anyhow::Result<(Vec<Row>, Peer)> {
    let mut sides = [
        Side::start(args, backend, false).await?,
        Side::start(args, backend, true).await?,
    ];
    let mut rows: Vec<Row> = [(1, false), (1, true), (4, false), (4, true)]
        .into_iter()
        .map(|(streams, tls)| row(args, backend, streams, tls))
        .collect();
    let mut peer = Peer::new(&qemu);
    let qemu = qemu.ok().map(Arc::new);
    for run in 0..=args.runs {
        for row in &mut rows {
            let side = &mut sides[usize::from(row.tls)];
            let [to, _] = side.next;
            side.next.reverse();
            let bytes = usize::try_from(args.memory_mib * MIB)?;
            tokio::task::spawn_blocking(move || warm(bytes)).await??;
            let pair = one(side, to, row.streams).await?;
            eprintln!(
                "{} run {run}: {:.2} GB/s, loop {:.2} GB/s, downtime {:.1} ms{}",
                row.name,
                pair.slat / 1e9,
                pair.bare / 1e9,
                pair.downtime * 1e3,
                if run == 0 { " (warm-up)" } else { "" }
            );
            let beside = match &qemu {
                Some(qemu) if row.streams == qemu::CHANNELS && !row.tls => {
                    let qemu = Arc::clone(qemu);
                    let task = tokio::task::spawn_blocking(move || qemu.migrate());
                    Some(task.await??)
                }
                _ => None,
            };
            if let Some(beside) = &beside {
                eprintln!(
                    "beside it QEMU: {:.2} s and {:.2} s of CPU, Slat {:.2} s",
                    beside.whole.as_secs_f64(),
                    beside.cpu.as_secs_f64(),
                    pair.whole
                );
            }
            if run > 0 {
                row.pairs.push(pair);
                if let Some(beside) = beside {
                    peer.add(&pair, beside, args.memory_mib * MIB);
                }
            }
        }
    }
    for side in &mut sides {
        side.fleet.finish().await?;
    }
    Ok((rows, peer))
}

fn run() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some((first, rest)) = words.split_first()
        && first == bare::RECEIVER
    {
        return bare::receive(rest);
    }
    let args = Args::parse();
    ensure!(
        args.memory_mib.checked_mul(MIB).is_some(),
        "--memory-mib is too much"
    );
    let backend = backend(&args.backend)?;
    let qemu = if args.no_qemu {
        Err("left out (--no-qemu)".to_owned())
    } else {
        Qemu::find()
    };
    check_memory(args.memory_mib, qemu.is_ok())?;
    let qemu = match qemu {
        Ok(found) => Ok(found.with_memory(args.memory_mib)?),
        Err(why) => Err(why),
    };
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures mean nothing");
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let (rows, peer) = interrupt::measure(&runtime, measure(&args, backend, qemu))?;
    if args.update_docs {
        let page: PathBuf = binary::workspace().join("docs/benchmarks.md");
        report::update_docs(&page, &rows, &peer)?;
    }
    if args.output == "json" {
        println!("{}", report::json(&rows, &peer));
    } else {
        print!("{}", report::table(&rows, &peer));
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
