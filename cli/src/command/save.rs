//! `slat save vm`: a VM's memory and state at one moment, to a file of its host.

use jiff::Timestamp;
use slat_proto::{
    json::to_json,
    model::{HostName, SaveName},
    v1,
};

use super::{
    patience::PatienceArgs,
    saves::{SaveRef, follow, outcome},
    target::VmTarget,
};
use crate::{
    client::{ClientArgs, Session},
    daemon::stop::Stop,
    failure::Failure,
    term::out,
    view::{self, SaveProgress, saved},
};

const EXAMPLES: &str = "\
Examples:
  slat save vm web                               as web-20261130-104512 on the VM's host
  slat save vm web --as web-1 --compress 3       pages packed by zstd
  slat save vm web --as web-2 --base web-1       only what differs from web-1
  slat save vm web --no-wait                     return when the moment is taken
  slat save vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21
  slat restore vm web-1 --as copy                makes a VM of it

The VM stops for a moment and goes on; what it overwrites is kept until the file has it. Where
its memory cannot be watched it stays paused until the file is written.
Ctrl-C stops watching and leaves the save alone; slat delete save NAME ends it.";

/// Options of `slat save`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SaveArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl SaveArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// A running or paused VM
    #[command(after_help = EXAMPLES)]
    Vm(SaveOptions),
}

#[derive(Clone, Debug, clap::Args)]
struct SaveOptions {
    #[command(flatten)]
    target: VmTarget,
    /// Name of the save, as web-1 [default: the VM's name and the time]
    #[arg(long = "as", value_name = "SAVE")]
    name: Option<String>,
    /// A save of the same VM to build on, as web-1: only what differs from it is written
    #[arg(long, value_name = "SAVE")]
    base: Option<SaveRef>,
    /// Pack pages by zstd at this level, as 3: 1 to 19 [default: not packed]
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(u32).range(1..=19))]
    compress: Option<u32>,
    /// Return when the moment is taken; the file is written meanwhile
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    patience: PatienceArgs,
}

/// Begins it, follows it, tells what it cost.
pub(crate) async fn run(args: SaveArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Vm(options) = args.kind;
    let doing = format!("save {}", options.target);
    let mut stop = Stop::listen()?;
    let begun = tokio::select! {
        begun = begin(&session, &options, &doing) => begun,
        cause = stop.wait() => {
            out::say("interrupted before there was an answer; it may have begun: slat get saves");
            return Err(Failure::Said(cause.exit_code()));
        }
    };
    let save = begun?;
    let name = save.name.clone();
    if options.no_wait {
        let text =
            || format!("{name} is being written; watch it with: slat get save {name} --watch");
        return session.answer(|| to_json(&save), &save.name, text);
    }
    let mut progress = SaveProgress::new();
    progress.update(&save);
    let patience = options.patience.patience();
    let followed = tokio::select! {
        followed = follow(&session.client, &name, patience, |save| progress.update(save)) => followed,
        cause = stop.wait() => {
            progress.finish();
            out::say(format!(
                "{name} goes on without being watched\n  watch:  slat get save {name} --watch\n  end it: slat delete save {name}"
            ));
            return Err(Failure::Said(cause.exit_code()));
        }
    };
    progress.finish();
    let save = followed?;
    outcome(doing, &save)?;
    session.answer(|| to_json(&save), &save.name, || saved(&save))
}

async fn begin(session: &Session, options: &SaveOptions, doing: &str) -> Result<v1::Save, Failure> {
    let target = &options.target;
    let mut vm = v1::Vm {
        name: target.name(),
        host: target.host(),
        ..Default::default()
    };
    // A name of its own has no need of the VM's, and a base's full name says its host.
    let asks = options.name.is_none() || matches!(options.base, Some(SaveRef::Id(_)));
    if asks {
        let request = v1::GetVmRequest {
            name: target.name(),
            uid: target.uid(),
            host: target.host(),
        };
        let found = session.client.vms().get_vm(request).await;
        vm = found
            .map_err(|status| Failure::call(doing.to_owned(), status))?
            .into_inner();
    }
    let base = match &options.base {
        None => String::new(),
        Some(SaveRef::Full(name)) => name.to_string(),
        Some(SaveRef::Id(id)) => SaveName::new(HostName::parse(&vm.host)?, id)?.to_string(),
    };
    let save_id = match &options.name {
        Some(name) => name.clone(),
        None => fresh_name(view::id(&vm.name), Timestamp::now()),
    };
    let request = v1::CreateSaveRequest {
        vm: target.name(),
        uid: target.uid(),
        host: target.host(),
        save_id,
        base,
        compression: options
            .compress
            .map(|zstd_level| v1::Compression { zstd_level }),
    };
    let answer = session.client.snapshots().create_save(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| Failure::call(doing.to_owned(), status))
}

/// `web-20261130-104512`, by UTC; a long name is cut to make room.
fn fresh_name(vm: &str, now: Timestamp) -> String {
    const ROOM: usize = 63 - 16;
    let cut: String = vm.chars().take(ROOM).collect();
    let time = now.strftime("%Y%m%d-%H%M%S");
    format!("{}-{time}", cut.trim_end_matches('-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_without_a_name_gets_the_vms_and_the_time() {
        let now = Timestamp::from_second(1_796_035_512).unwrap();
        assert_eq!(fresh_name("web", now), "web-20261130-104512");
        let long = fresh_name(&"x".repeat(63), now);
        assert_eq!(long.len(), 63);
        assert!(SaveName::new(HostName::from_id("a").unwrap(), &long).is_ok());
    }
}
