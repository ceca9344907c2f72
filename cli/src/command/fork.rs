//! `slat fork vm`: copies of a VM on its host, at one moment.

use std::time::Duration;

use slat_proto::{json::to_json, model::VmName, v1};

use super::target::VmTarget;
use crate::{
    client::{ClientArgs, Session},
    daemon::stop::Stop,
    failure::Failure,
    term::{out, units::Span},
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat fork vm web --as web-2                    a second VM that goes on where web is
  slat fork vm web --as try-1,try-2,try-3        three, all of the same moment
  slat fork vm web --as copy --paused            leave the copy paused
  slat fork vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21 --as copy

The VM stops for a moment and goes on. A copy has pages of its own only where it touched them: its
memory is counted in full all the same, since it may touch all of it.";

/// Options of `slat fork`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ForkArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl ForkArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// A running or paused VM
    #[command(after_help = EXAMPLES)]
    Vm(ForkOptions),
}

#[derive(Clone, Debug, clap::Args)]
struct ForkOptions {
    #[command(flatten)]
    target: VmTarget,
    /// Names of the copies, as web-2 or web-2,web-3
    #[arg(
        long = "as",
        value_name = "CHILD",
        required = true,
        value_delimiter = ','
    )]
    children: Vec<VmName>,
    /// Leave the copies paused, also when the VM runs
    #[arg(long)]
    paused: bool,
}

/// Forks, and tells the pause.
pub(crate) async fn run(args: ForkArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Vm(options) = args.kind;
    let target = &options.target;
    let children = options.children.iter();
    let request = v1::ForkVmRequest {
        vm: target.name(),
        uid: target.uid(),
        host: target.host(),
        vm_ids: children.map(|child| child.id().to_owned()).collect(),
        paused: options.paused,
    };
    let mut stop = Stop::listen()?;
    let mut snapshots = session.client.snapshots();
    let answer = tokio::select! {
        answer = snapshots.fork_vm(request) => answer,
        cause = stop.wait() => {
            out::say("interrupted before there was an answer; copies may be made all the same: slat get vms");
            return Err(Failure::Said(cause.exit_code()));
        }
    };
    let answer = answer
        .map_err(|status| Failure::call(format!("fork {target}"), status))?
        .into_inner();
    let names: Vec<&str> = answer.vms.iter().map(|vm| vm.name.as_str()).collect();
    session.answer(|| to_json(&answer), &names.join("\n"), || forked(&answer))
}

fn forked(answer: &v1::ForkVmResponse) -> String {
    let mut lines: Vec<String> = answer
        .vms
        .iter()
        .map(|vm| format!("{} ({}) {}", vm.name, vm.uid, view::vm_state(vm.state())))
        .collect();
    let took = Span(Duration::from_nanos(answer.duration_nanos));
    lines.push(match answer.pause_nanos {
        0 => format!("in {took}; the VM did not run"),
        pause => {
            let pause = Span(Duration::from_nanos(pause));
            format!("in {took}; the VM paused for {pause}")
        }
    });
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_told_after_the_copies() {
        let vm = |name: &str| v1::Vm {
            name: name.into(),
            uid: "u".into(),
            state: v1::vm::State::Running.into(),
            ..Default::default()
        };
        let mut answer = v1::ForkVmResponse {
            vms: vec![vm("vms/a"), vm("vms/b")],
            pause_nanos: 8_000_000,
            duration_nanos: 120_000_000,
        };
        assert_eq!(
            forked(&answer),
            "vms/a (u) RUNNING\nvms/b (u) RUNNING\nin 120 ms; the VM paused for 8.00 ms"
        );
        answer.pause_nanos = 0;
        assert!(forked(&answer).ends_with("the VM did not run"));
    }
}
