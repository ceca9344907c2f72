//! From a command line to the code of its command, on the runtime that this kind of command gets.

use std::{ffi::OsString, pin::Pin, time::Duration};

use clap::CommandFactory as _;
use slat_proto::transport::Address;
use tokio::runtime::{Builder, Runtime};

use crate::{
    args::{Cli, Command},
    command::{
        agent, cancel, completion, cordon, create, delete, fence, fork, get, leftover, life, man,
        memory, migrate, pager, pki, restore, retry, save, save_writer, server, up, verify,
        version, vm,
    },
    daemon::telemetry,
    demo,
    failure::Failure,
    output::Format,
    roles,
    term::out,
};

/// What still blocks a thread when a command is done gets this long.
const LAST_THREADS: Duration = Duration::from_millis(500);

/// Runs one command to its end.
pub(crate) fn run(command: Command) -> Result<(), Failure> {
    if let Command::Version(args) = &command {
        speak(args.output());
    }
    if let Command::Pki(args) = &command {
        speak(args.output());
    }
    let endpoint = command.client().map(|client| {
        speak(client.output);
        client.server.clone()
    });
    let client = |work: Pin<Box<dyn Future<Output = _>>>| as_client(endpoint, work);
    match command {
        Command::Server(args) => on_runtime(Builder::new_multi_thread(), server::run(args)),
        Command::Agent(args) => on_runtime(Builder::new_multi_thread(), agent::run(args)),
        Command::Vm(args) => {
            // It takes what the confined process has no more, and counts threads from here on.
            let faults = roles::count_faults();
            let confined = vm::confine(&args)?;
            on_runtime(Builder::new_multi_thread(), vm::run(args, confined, faults))
        }
        Command::Pager(args) => {
            let lacks = roles::give_up();
            on_runtime(Builder::new_current_thread(), pager::run(args, lacks))
        }
        Command::SaveWriter(args) => {
            let (socket, lacks) = (save_writer::socket()?, roles::give_up());
            on_runtime(
                Builder::new_current_thread(),
                save_writer::run(args, socket, lacks),
            )
        }
        Command::Demo(args) => client(Box::pin(demo::run(args))),
        Command::Up(args) => client(Box::pin(up::run(args))),
        Command::Get(args) => client(Box::pin(get::run(args))),
        Command::Create(args) => client(Box::pin(create::run(args))),
        Command::Start(args) => client(Box::pin(life::run(args, life::Action::Start))),
        Command::Pause(args) => client(Box::pin(life::run(args, life::Action::Pause))),
        Command::Resume(args) => client(Box::pin(life::run(args, life::Action::Resume))),
        Command::Delete(args) => client(Box::pin(delete::run(args))),
        Command::Migrate(args) => client(Box::pin(migrate::run(args))),
        Command::Cancel(args) => client(Box::pin(cancel::run(args))),
        Command::Cordon(args) => client(Box::pin(cordon::run(args, true))),
        Command::Uncordon(args) => client(Box::pin(cordon::run(args, false))),
        Command::Fence(args) => client(Box::pin(fence::run(args))),
        Command::Adopt(args) => client(Box::pin(leftover::run(args))),
        Command::Save(args) => client(Box::pin(save::run(args))),
        Command::Restore(args) => client(Box::pin(restore::run(args))),
        Command::Fork(args) => client(Box::pin(fork::run(args))),
        Command::Retry(args) => client(Box::pin(retry::run(args))),
        Command::Verify(args) => client(Box::pin(verify::run(args))),
        Command::Memory(args) => client(Box::pin(memory::run(args))),
        Command::Pki(args) => pki::run(args),
        Command::Version(args) => version::run(&args),
        Command::Completion(args) => completion::run(&args, &mut Cli::command()),
        Command::Man(args) => man::run(&args, Cli::command()),
    }
}

/// Messages on standard error in the language of the answer.
fn speak(output: Format) {
    if output.is_for_programs() {
        out::for_programs();
    }
}

/// A command line that cannot be read, said as its `-o` asks, and the exit code.
pub(crate) fn refused(error: &clap::Error, words: impl Iterator<Item = OsString>) -> u8 {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    if error.use_stderr() && asks_for_json(words) {
        out::for_programs();
        let text = error.to_string();
        let message = text.strip_prefix("error: ").unwrap_or(&text);
        out::report(&Failure::Usage(message.trim_end().to_owned()));
    } else if error.use_stderr() {
        // It repeats what was typed, which a script may have from elsewhere.
        out::say(error.to_string().trim_end());
    } else if let Err(error) = error.print() {
        // Nobody is left to be told when this fails.
        tracing::debug!(%error, "print");
    }
    code
}

/// Whether `-o json` or `-o yaml` stands on a command line that cannot be parsed.
fn asks_for_json(words: impl Iterator<Item = OsString>) -> bool {
    let words: Vec<String> = words
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let machine = |word: &str| matches!(word, "json" | "yaml");
    words
        .iter()
        .enumerate()
        .any(|(at, word)| match word.as_str() {
            "-o" | "--output" => words.get(at + 1).is_some_and(|next| machine(next)),
            word => ["-o=", "--output=", "-o"]
                .iter()
                .any(|option| word.strip_prefix(option).is_some_and(machine)),
        })
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
            ..Default::default()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_language_of_a_wrong_command_line_is_known() {
        let asks = |line: &str| asks_for_json(line.split_whitespace().map(OsString::from));
        for line in [
            "get vms -o json --x",
            "get --output yaml",
            "get -ojson",
            "get --output=json x",
            "get -o=yaml",
        ] {
            assert!(asks(line), "{line}");
        }
        for line in ["get vms", "get vm json", "get -o wide", "get -o"] {
            assert!(!asks(line), "{line}");
        }
    }
}
