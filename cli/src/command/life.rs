//! `slat start`, `pause`, `resume` and `delete`: a VM's life.

use serde_json::json;
use slat_proto::{json::to_json, model::VmName, transport::Address, v1};

use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::out::{self, Format},
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat start vm web
  slat pause vm web              the vCPUs stop, the memory stays
  slat resume vm web
  slat delete vm web db          several at once
  slat pause vm web --server 127.0.0.1:7401     at its host's agent";

/// What to do to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// CREATED to RUNNING.
    Start,
    /// RUNNING to PAUSED.
    Pause,
    /// PAUSED to RUNNING.
    Resume,
    /// Ended and removed.
    Delete,
}

impl Action {
    fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete => "delete",
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
    /// The endpoint to ask.
    pub(crate) fn endpoint(&self) -> Option<Address> {
        Some(self.client.server.clone())
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// One or more VMs
    #[command(alias = "vms", after_help = EXAMPLES)]
    Vm {
        /// Their names
        #[arg(required = true)]
        names: Vec<VmName>,
    },
}

/// Does it to one VM after the other; stops at the first that fails.
pub(crate) async fn run(args: LifeArgs, action: Action) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Vm { names } = args.kind;
    for name in names {
        let vm = act(&session, action, &name).await?;
        match (session.output, vm) {
            (Format::Json, Some(vm)) => out::json(&to_json("slat.v1.Vm", &vm))?,
            (Format::Json, None) => out::json(&json!({"name": name.to_string(), "deleted": true}))?,
            (Format::Table, Some(vm)) => {
                out::line(format!("{name} {}", view::vm_state(vm.state())))?
            }
            (Format::Table, None) => out::line(format!("{name} deleted"))?,
        }
    }
    Ok(())
}

async fn act(session: &Session, action: Action, vm: &VmName) -> Result<Option<v1::Vm>, Failure> {
    let mut vms = session.client.vms();
    let name = vm.to_string();
    let answer = match action {
        Action::Start => vms
            .start_vm(v1::StartVmRequest {
                name,
                ..Default::default()
            })
            .await
            .map(Some),
        Action::Pause => vms
            .pause_vm(v1::PauseVmRequest {
                name,
                ..Default::default()
            })
            .await
            .map(Some),
        Action::Resume => vms
            .resume_vm(v1::ResumeVmRequest {
                name,
                ..Default::default()
            })
            .await
            .map(Some),
        Action::Delete => vms
            .delete_vm(v1::DeleteVmRequest {
                name,
                ..Default::default()
            })
            .await
            .map(|_| None),
    };
    answer
        .map(|vm| vm.map(tonic::Response::into_inner))
        .map_err(|status| Failure::call(format!("{} {vm}", action.word()), status))
}
