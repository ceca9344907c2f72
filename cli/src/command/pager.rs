//! `slat pager`: resolves the page faults of one VM's guest. Agents start it. It ends with the VM's
//! process, or when that needs it no more.

use std::path::PathBuf;

use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::{
    daemon::{
        telemetry::{self, LogArgs},
        vm_log::VmLog,
    },
    failure::{self, Failure},
    roles,
    term::units::Size,
};

/// Options of `slat pager`, given by the agent.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PagerArgs {
    /// The VM's directory, where its process listens for pagers
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// How long its log may become before it is rotated
    #[arg(long, default_value = "8MiB", value_name = "SIZE")]
    log_size: Size,
    #[command(flatten)]
    log: LogArgs,
}

/// Runs until the VM needs it no more. `lacks`: what could not be given up.
pub(crate) async fn run(args: PagerArgs, lacks: Vec<String>) -> Result<(), Failure> {
    let log = VmLog::on_stderr(args.dir.join("pager.log"), args.log_size.0);
    let log = log.map_or_else(|| BoxMakeWriter::new(std::io::stderr), BoxMakeWriter::new);
    let telemetry = telemetry::install_to(log, "pager", &args.log, "info")?;
    tracing::info!(?lacks, "a pager begins");
    let dir = args.dir.clone();
    // It has threads of its own; this one waits for them.
    let ran = tokio::task::spawn_blocking(move || roles::run_pager(&dir)).await;
    let ran = ran.unwrap_or_else(|error| Err(error.into()));
    let failed = ran.map_err(|error| {
        let dir = args.dir.display();
        Failure::local(format!(
            "the pager of {dir} failed: {}",
            failure::chain(&*error)
        ))
    });
    telemetry.shutdown().await;
    failed
}
