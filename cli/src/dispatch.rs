//! From a command line to the code of its command, on the runtime that this kind of command gets.

use std::time::Duration;

use clap::CommandFactory as _;
use slat_proto::transport::Address;
use tokio::runtime::{Builder, Runtime};

use crate::{
    args::{Cli, Command},
    command::{agent, cancel, completion, create, get, life, memory, migrate, server, version, vm},
    daemon::telemetry,
    demo,
    failure::Failure,
};

/// What still blocks a thread when a command is done gets this long.
const LAST_THREADS: Duration = Duration::from_millis(500);

/// Runs one command to its end.
pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Server(args) => on_runtime(Builder::new_multi_thread(), server::run(args)),
        Command::Agent(args) => on_runtime(Builder::new_multi_thread(), agent::run(args)),
        Command::Vm(args) => on_runtime(Builder::new_multi_thread(), vm::run(args)),
        Command::Demo(args) => as_client(None, demo::run(args)),
        Command::Get(args) => as_client(args.endpoint(), get::run(args)),
        Command::Create(args) => as_client(args.endpoint(), create::run(args)),
        Command::Start(args) => as_client(args.endpoint(), life::run(args, life::Action::Start)),
        Command::Pause(args) => as_client(args.endpoint(), life::run(args, life::Action::Pause)),
        Command::Resume(args) => as_client(args.endpoint(), life::run(args, life::Action::Resume)),
        Command::Delete(args) => as_client(args.endpoint(), life::run(args, life::Action::Delete)),
        Command::Migrate(args) => as_client(args.endpoint(), migrate::run(args)),
        Command::Cancel(args) => as_client(args.endpoint(), cancel::run(args)),
        Command::Memory(args) => as_client(args.endpoint(), memory::run(args)),
        Command::Version(args) => version::run(&args),
        Command::Completion(args) => completion::run(&args, &mut Cli::command()),
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

/// A client's runtime: one thread; errors of libraries are logged when RUST_LOG asks, traces
/// exported when configured. Failures name the `endpoint` that was asked.
fn as_client(
    endpoint: Option<Address>,
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
        match endpoint {
            Some(endpoint) => result.map_err(|failure| failure.at(&endpoint)),
            None => result,
        }
    })
}
