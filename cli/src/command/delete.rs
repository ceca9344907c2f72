//! `slat delete`: ends VMs, removes saves, and makes the server forget hosts and hosts end
//! leftovers. Orders that give something up say what before they are given.

use serde_json::json;
use slat_proto::{json::to_json, model::HostName, v1};

use super::{
    get::listing,
    leftover::{self, LeftoverTarget},
    saves::{SaveRef, SaveTarget},
    several::Several,
    target::{VmTarget, VmTargets},
};
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::out,
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat delete vm web db          several at once; each is tried, the worst result counts
  slat delete vm web --host host-a               of two VMs of one name, that one
  slat delete vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21
  slat delete vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21 --force   its process does not answer
  slat delete host host-a                        forget a host that is gone
  slat delete host host-a --give-up-vms          with the VMs last seen there
  slat delete save web-1 web-2                   frees their files, or ends their being written
  slat delete leftover --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21 --host host-a
  slat delete vm web --server 127.0.0.1:7401 --agent host-a     at its host's agent

What an order gives up is said before it is given.";

/// Options of `slat delete`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DeleteArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl DeleteArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// End one or more VMs and free their memory
    #[command(alias = "vms", after_help = EXAMPLES)]
    Vm {
        #[command(flatten)]
        targets: VmTargets,
        /// Kill the VM's process when it does not answer, and remove what it leaves; needs --uid
        #[arg(long, requires = "uid")]
        force: bool,
    },
    /// Forget one or more hosts that do not answer
    #[command(alias = "hosts", after_help = EXAMPLES)]
    Host {
        /// Their names, as host-a
        #[arg(required = true, value_name = "HOST")]
        names: Vec<HostName>,
        /// Forget the VMs last seen there, too; they may still run there
        #[arg(long)]
        give_up_vms: bool,
    },
    /// Remove one or more saves, or end their being written
    #[command(alias = "saves", after_help = EXAMPLES)]
    Save {
        /// Their names, as web-1 or hosts/host-a/saves/web-1
        #[arg(required = true, value_name = "SAVE")]
        names: Vec<SaveRef>,
        /// Of several saves of that name the one on this host, as host-a
        #[arg(long, value_name = "HOST")]
        host: Option<HostName>,
    },
    /// End for good what lies on a host and is no VM
    #[command(alias = "leftovers", after_help = EXAMPLES)]
    Leftover(LeftoverTarget),
}

/// Deletes one after the other.
pub(crate) async fn run(args: DeleteArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    match args.kind {
        Kind::Vm { targets, force } => {
            let targets = targets.each()?;
            let mut several = Several::new(&session, targets.len());
            for target in &targets {
                let done = delete_vm(&session, &several, target, force).await;
                several.note(done)?;
            }
            several.end()
        }
        Kind::Host { names, give_up_vms } => {
            let mut several = Several::new(&session, names.len());
            for name in &names {
                let done = delete_host(&session, &several, name, give_up_vms).await;
                several.note(done)?;
            }
            several.end()
        }
        Kind::Save { names, host } => {
            let mut several = Several::new(&session, names.len());
            for save in names {
                let host = host.clone();
                let done = delete_save(&session, &several, SaveTarget { save, host }).await;
                several.note(done)?;
            }
            several.end()
        }
        Kind::Leftover(target) => leftover::delete(&session, &target).await,
    }
}

async fn delete_vm(
    session: &Session,
    several: &Several,
    target: &VmTarget,
    force: bool,
) -> Result<(), Failure> {
    if force {
        out::say(format!(
            "this gives up the memory of {target}: its process is killed when it does not answer"
        ));
    }
    let request = v1::DeleteVmRequest {
        name: target.name(),
        uid: target.uid(),
        host: target.host(),
        force,
    };
    let deleted = session.client.vms().delete_vm(request).await;
    deleted.map_err(|status| Failure::call(format!("delete {target}"), status))?;
    let name = target.name();
    let json = json!({"name": name, "uid": target.uid(), "deleted": true});
    several.answer(session, &json, &name, || format!("{target} deleted"))
}

async fn delete_save(
    session: &Session,
    several: &Several,
    target: SaveTarget,
) -> Result<(), Failure> {
    let name = target.resolve(&session.client).await?.to_string();
    let request = v1::DeleteSaveRequest { name: name.clone() };
    let deleted = session.client.snapshots().delete_save(request).await;
    deleted.map_err(|status| Failure::call(format!("delete {name}"), status))?;
    let json = json!({"name": name, "deleted": true});
    several.answer(session, &json, &name, || format!("{name} deleted"))
}

async fn delete_host(
    session: &Session,
    several: &Several,
    host: &HostName,
    give_up_vms: bool,
) -> Result<(), Failure> {
    let doing = || format!("delete {host}");
    // What was last seen there is what the order gives up; the server checks again.
    let vms = listing::vms(&session.client, Some(host)).await;
    let vms = vms.map_err(|status| Failure::call(doing(), status))?.items;
    if !vms.is_empty() {
        out::say(gives_up(host, &vms, give_up_vms));
    }
    let request = v1::DeleteHostRequest {
        name: host.to_string(),
        give_up_vms,
    };
    let deleted = session.client.hosts().delete_host(request).await;
    let deleted = deleted
        .map_err(|status| Failure::call(doing(), status))?
        .into_inner();
    let json = json!({
        "name": host.to_string(),
        "deleted": true,
        "vms": deleted.vms.iter().map(to_json).collect::<Vec<_>>(),
    });
    several.answer(session, &json, &host.to_string(), || {
        match deleted.vms.len() {
            0 => format!("{host} forgotten"),
            vms => format!("{host} forgotten, and {vms} VMs last seen there"),
        }
    })
}

fn gives_up(host: &HostName, vms: &[v1::Vm], accepted: bool) -> String {
    let verb = if accepted {
        "this gives up"
    } else {
        "--give-up-vms would give up"
    };
    let mut text = format!(
        "{verb} VMs last seen on {}; they may still run there:",
        host.id()
    );
    for vm in vms {
        let state = view::vm_state(vm.state());
        text.push_str(&format!("\n  {} ({}), last seen {state}", vm.name, vm.uid));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vms_that_are_given_up_are_named() {
        let vm = v1::Vm {
            name: "vms/web".into(),
            uid: "u-1".into(),
            state: v1::vm::State::Running.into(),
            ..Default::default()
        };
        let host = "host-a".parse().unwrap();
        assert_eq!(
            gives_up(&host, &[vm], true),
            "this gives up VMs last seen on host-a; they may still run there:\n  \
             vms/web (u-1), last seen RUNNING"
        );
    }
}
