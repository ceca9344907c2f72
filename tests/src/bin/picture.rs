//! `cargo xtask picture`: migrates a busy VM between two agents on this machine and draws what the
//! server reports of it into docs/migration.svg, the picture of the README.
//!
//! The stream is held to a rate at which several iterations are needed, so that precopy can be
//! seen.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use slat_proto::{
    model::proto_duration,
    v1::{self, Backend},
};
use slat_tests::{
    Fleet, Layout,
    bench::{interrupt, picture::Scene},
    binary,
    guest::{MIB, busy},
    scene,
};

const MEMORY_MIB: u64 = 1024;
const DIRTIED_MIB: u64 = 64;
const BANDWIDTH_MIB: u64 = 400;
/// Little enough that precopy takes several iterations to get there.
const DOWNTIME: std::time::Duration = std::time::Duration::from_millis(20);

/// Draw one live migration, from its own figures, as SVG
#[derive(Debug, Parser)]
struct Args {
    /// Where the picture goes [default: docs/migration.svg of the workspace]
    #[arg(long)]
    to: Option<PathBuf>,
}

async fn migrate(backend: Backend) -> anyhow::Result<v1::Migration> {
    let mut fleet = Fleet::start(Layout {
        backend,
        hosts: vec![("host-a", MEMORY_MIB + 64), ("host-b", MEMORY_MIB + 64)],
        own_clocks: false,
    })
    .await?;
    let spec = busy(backend, MEMORY_MIB, 1, Some(DIRTIED_MIB * MIB));
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    let params = v1::MigrationParams {
        max_bandwidth_bytes_per_second: BANDWIDTH_MIB * MIB,
        max_downtime: Some(proto_duration(DOWNTIME)),
        ..Default::default()
    };
    let done = fleet.migrate_and_wait(&vm.name, "host-b", params).await?;
    fleet.finish().await?;
    Ok(done)
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse();
    let backend = scene::best_backend();
    let runtime = tokio::runtime::Runtime::new()?;
    let done = interrupt::measure(&runtime, migrate(backend))?;
    let on = match backend {
        Backend::Kvm => "on KVM",
        _ => "on the software backend",
    };
    let what = format!(
        "Live migration {on}: {MEMORY_MIB} MiB, guest dirties {DIRTIED_MIB} MiB/s, stream held to \
         {BANDWIDTH_MIB} MiB/s"
    );
    let svg = Scene::new(what, &done)?.svg();
    let path = args
        .to
        .unwrap_or_else(|| binary::workspace().join("docs/migration.svg"));
    std::fs::write(&path, svg).with_context(|| path.display().to_string())?;
    println!("{}", path.display());
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
