//! `slat restore vm`: a new VM of a save, on the save's host.

use std::time::Duration;

use slat_proto::{json::to_json, model::VmName, v1};

use super::{create::PagingChoice, saves::SaveTarget};
use crate::{
    client::{ClientArgs, Session},
    daemon::stop::Stop,
    failure::Failure,
    term::{out, units::Span},
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat restore vm web-1                          under the saved VM's name, PAUSED
  slat restore vm web-1 --as copy --start        under another name, and it runs
  slat restore vm web-1 --as copy --lazy --start runs at once; pages come as it touches them
  slat restore vm hosts/host-a/saves/web-1 --as copy
  slat restore vm web-1 --host host-a --as copy  of several saves of that name, the one there
  slat restore vm web-1 --as copy --dry-run      compare the save with its host, make nothing

A lazy VM needs the save's file until all of it is loaded: slat get vm NAME shows how far that is.";

/// Options of `slat restore`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RestoreArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl RestoreArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// A VM of a save
    #[command(after_help = EXAMPLES)]
    Vm(RestoreOptions),
}

#[derive(Clone, Debug, clap::Args)]
struct RestoreOptions {
    #[command(flatten)]
    target: SaveTarget,
    /// The new VM's name, as copy [default: the saved VM's]
    #[arg(long = "as", value_name = "NAME")]
    name: Option<VmName>,
    /// Do not wait for its memory: pages come as the guest touches them, and in the background
    #[arg(long)]
    lazy: bool,
    /// Run it, also when it was paused when it was saved
    #[arg(long)]
    start: bool,
    /// Who decides which of its pages are mapped, as agent [default: as the saved VM says]
    #[arg(long, value_enum, value_name = "WHO")]
    paging: Option<PagingChoice>,
    /// Compare the save with its host, and make nothing
    #[arg(long)]
    dry_run: bool,
}

/// Restores, and tells how long it took.
pub(crate) async fn run(args: RestoreArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Vm(options) = args.kind;
    let save = options.target.resolve(&session.client).await?;
    let doing = format!("restore {save}");
    let request = v1::RestoreVmRequest {
        save: save.to_string(),
        vm_id: options
            .name
            .as_ref()
            .map(|name| name.id().to_owned())
            .unwrap_or_default(),
        lazy: options.lazy,
        start: options.start,
        paging: options
            .paging
            .map_or(0, |paging| paging.to_message().into()),
        validate_only: options.dry_run,
    };
    let mut stop = Stop::listen()?;
    let mut snapshots = session.client.snapshots();
    let answer = tokio::select! {
        answer = snapshots.restore_vm(request) => answer,
        cause = stop.wait() => {
            if !options.dry_run {
                out::say("interrupted before there was an answer; the VM may be made all the same: slat get vms");
            }
            return Err(Failure::Said(cause.exit_code()));
        }
    };
    let answer = answer
        .map_err(|status| Failure::call(doing, status))?
        .into_inner();
    let vm = answer.vm.clone().unwrap_or_default();
    let took = Span(Duration::from_nanos(answer.duration_nanos));
    session.answer(
        || to_json(&answer),
        &vm.name,
        || {
            if options.dry_run {
                return format!("{save} could be restored as {}; nothing was made", vm.name);
            }
            let state = view::vm_state(vm.state());
            let loading = if options.lazy {
                ", its memory comes as it is touched"
            } else {
                ""
            };
            format!("{} ({}) {state} in {took}{loading}", vm.name, vm.uid)
        },
    )
}
