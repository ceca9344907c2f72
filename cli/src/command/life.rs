//! `slat start`, `pause` and `resume`: a VM's life. Its end is in [`super::delete`].

use slat_proto::{json::to_json, v1};
use tonic::{Response, Status};

use super::{
    several::Several,
    target::{VmTarget, VmTargets},
};
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat start vm web
  slat pause vm web              the vCPUs stop, the memory stays
  slat resume vm web db          several at once; each is tried, the worst result counts
  slat pause vm web --host host-a               of two VMs of one name, that one
  slat pause vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21
  slat pause vm web --server 127.0.0.1:7401 --agent host-a     at its host's agent";

/// What to do to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// CREATED to RUNNING.
    Start,
    /// RUNNING to PAUSED.
    Pause,
    /// PAUSED to RUNNING.
    Resume,
}

impl Action {
    fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }
}

/// Options of these commands.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct LifeArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl LifeArgs {
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

/// Does it to one VM after the other.
pub(crate) async fn run(args: LifeArgs, action: Action) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Vm(targets) = args.kind;
    let targets = targets.each()?;
    let mut several = Several::new(&session, targets.len());
    for target in &targets {
        let done = match act(&session, action, target).await {
            Ok(vm) => {
                let text = || format!("{} {}", vm.name, view::vm_state(vm.state()));
                several.answer(&session, &to_json(&vm), &vm.name, text)
            }
            Err(status) => Err(Failure::call(format!("{} {target}", action.word()), status)),
        };
        several.note(done)?;
    }
    several.end()
}

async fn act(session: &Session, action: Action, target: &VmTarget) -> Result<v1::Vm, Status> {
    let mut vms = session.client.vms();
    let (name, uid, host) = (target.name(), target.uid(), target.host());
    let answer = match action {
        Action::Start => vms.start_vm(v1::StartVmRequest { name, uid, host }).await,
        Action::Pause => vms.pause_vm(v1::PauseVmRequest { name, uid, host }).await,
        Action::Resume => vms.resume_vm(v1::ResumeVmRequest { name, uid, host }).await,
    };
    answer.map(Response::into_inner)
}
