//! `slat retry vm`: a page source tried again that failed.

use slat_proto::{json::to_json, v1};

use super::{
    several::Several,
    target::{VmTarget, VmTargets},
};
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::units::Size,
};

const EXAMPLES: &str = "\
Examples:
  slat get vm web                what is wrong with the page source, and what to do
  slat retry vm web              after what was missing is back
  slat retry vm web db           several at once; each is tried, the worst result counts
  slat retry vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21

A VM that was restored lazily or forked waits when its pages cannot be read. Nothing happens while nothing is wrong.";

/// Options of `slat retry`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RetryArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl RetryArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// One or more VMs
    #[command(alias = "vms", after_help = EXAMPLES)]
    Vm(VmTargets),
}

/// Tries one after the other.
pub(crate) async fn run(args: RetryArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Vm(targets) = args.kind;
    let targets = targets.each()?;
    let mut several = Several::new(&session, targets.len());
    for target in &targets {
        let done = match retry(&session, target).await {
            Ok(vm) => several.answer(&session, &to_json(&vm), &vm.name, || tried(&vm)),
            Err(status) => Err(Failure::call(format!("retry {target}"), status)),
        };
        several.note(done)?;
    }
    several.end()
}

async fn retry(session: &Session, target: &VmTarget) -> Result<v1::Vm, tonic::Status> {
    let request = v1::RetryPageSourceRequest {
        name: target.name(),
        uid: target.uid(),
        host: target.host(),
    };
    let answer = session.client.pagings().retry_page_source(request).await?;
    Ok(answer.into_inner())
}

fn tried(vm: &v1::Vm) -> String {
    let Some(paging) = vm.paging.as_ref().filter(|paging| paging.source_bytes > 0) else {
        return format!("{} has no page source", vm.name);
    };
    let (loaded, all) = (Size(paging.loaded_bytes), Size(paging.source_bytes));
    match paging.message.as_str() {
        "" => format!("{}: {loaded} of {all} loaded", vm.name),
        what => format!("{}: {loaded} of {all} loaded; {what}", vm.name),
    }
}
