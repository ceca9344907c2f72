//! The commands, one file each, and the runtime each kind of them gets.

pub(crate) mod agent;
pub(crate) mod cancel;
pub(crate) mod completion;
pub(crate) mod create;
pub(crate) mod follow;
pub(crate) mod get;
pub(crate) mod life;
pub(crate) mod memory;
pub(crate) mod migrate;
pub(crate) mod server;
pub(crate) mod version;
pub(crate) mod view;
pub(crate) mod vm;

use std::time::Duration;

use slat_proto::transport::Address;
use tokio::runtime::{Builder, Runtime};

use crate::{args::Command, daemon::telemetry, demo, failure::Failure};

/// What still blocks a thread when a command is done gets this long.
const LAST_THREADS: Duration = Duration::from_millis(500);

/// Runs one command to its end.
pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Server(args) => on_runtime(Builder::new_multi_thread(), server::run(args)),
        Command::Agent(args) => on_runtime(Builder::new_multi_thread(), agent::run(args)),
        Command::Vm(args) => on_runtime(Builder::new_multi_thread(), vm::run(args)),
        Command::Demo(args) => as_client(None, demo::run(args)),
        Command::Get(args) => as_client(args.door(), get::run(args)),
        Command::Create(args) => as_client(args.door(), create::run(args)),
        Command::Start(args) => as_client(args.door(), life::run(args, life::Action::Start)),
        Command::Pause(args) => as_client(args.door(), life::run(args, life::Action::Pause)),
        Command::Resume(args) => as_client(args.door(), life::run(args, life::Action::Resume)),
        Command::Delete(args) => as_client(args.door(), life::run(args, life::Action::Delete)),
        Command::Migrate(args) => as_client(args.door(), migrate::run(args)),
        Command::Cancel(args) => as_client(args.door(), cancel::run(args)),
        Command::Memory(args) => as_client(args.door(), memory::run(args)),
        Command::Version(args) => version::run(&args),
        Command::Completion(args) => completion::run(&args),
    }
}

fn on_runtime(
    mut builder: Builder,
    command: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let runtime: Runtime = builder
        .enable_all()
        .build()
        .map_err(|error| Failure::local(format!("cannot start threads: {error}")))?;
    let result = runtime.block_on(command);
    runtime.shutdown_timeout(LAST_THREADS);
    result
}

/// A client's runtime: one thread; errors of libraries are logged when RUST_LOG asks, traces exported when configured.
/// Failures name the `door` that was asked.
fn as_client(
    door: Option<Address>,
    command: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    on_runtime(Builder::new_current_thread(), async {
        let log = telemetry::LogArgs {
            log_format: telemetry::LogFormat::Text,
            log_filter: None,
        };
        let telemetry = telemetry::install("client", &log, "off")?;
        let span = tracing::info_span!("slat");
        let result = tracing::Instrument::instrument(command, span).await;
        telemetry.shutdown().await;
        match door {
            Some(door) => result.map_err(|failure| failure.at(&door)),
            None => result,
        }
    })
}
