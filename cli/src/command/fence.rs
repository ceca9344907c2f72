//! `slat fence`: makes sure that nothing of a host runs any more, by the server's hook.
//!
//! While the hook runs, a line on standard error says for how long: drawn over on a terminal, else
//! one every ten seconds. Whoever stops waiting ends nothing: the order goes on at the server, and
//! the same order again waits for it.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use slat_proto::{json::to_json, model::HostName, v1};
use tokio::time::{MissedTickBehavior, interval};

use super::several::Several;
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::out,
};

const EXAMPLES: &str = "\
Examples:
  slat fence host host-a           it does not answer: power it off, and let the VM of a
                                   migration that is IN_DOUBT run at its destination
  slat fence host host-a --force   although its agent reports: all VMs there end
  slat fence host host-a -o json   with the proof that the hook gave
  slat get host host-a             shows the fence; its agent is welcome when it is started anew

The server runs the hook that it was started with: slat server --fence-hook PROGRAM.
Without a hook, or when it fails, nothing is decided.";

/// Between two words about a hook that runs: where they can be drawn over, and where they cannot.
const LIVE: Duration = Duration::from_secs(1);
const LINES: Duration = Duration::from_secs(10);

/// Options.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct FenceArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl FenceArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Kind {
    /// One or more hosts
    #[command(alias = "hosts", after_help = EXAMPLES)]
    Host {
        /// Their names, as host-a
        #[arg(required = true, value_name = "HOST")]
        names: Vec<HostName>,
        /// Fence it although its agent reports: the VMs that run there end
        #[arg(long)]
        force: bool,
    },
}

/// Fences one host after the other.
pub(crate) async fn run(args: FenceArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Host { names, force } = args.kind;
    let mut several = Several::new(&session, names.len());
    for host in &names {
        let mut hosts = session.client.hosts();
        let name = host.to_string();
        let order = hosts.fence_host(v1::FenceHostRequest { name, force });
        let done = match told(host, order).await {
            Ok(host) => {
                let host = host.into_inner();
                let text = || words(&host);
                several.answer(&session, &to_json(&host), &host.name, text)
            }
            Err(status) => Err(Failure::call(format!("fence {host}"), status)),
        };
        several.note(done)?;
    }
    several.end()
}

/// Says how long the order has been under way.
async fn told<T>(host: &HostName, order: impl Future<Output = T>) -> T {
    let live = out::stderr_is_live();
    let begun = Instant::now();
    let mut tick = interval(if live { LIVE } else { LINES });
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick is at once.
    tick.tick().await;
    tokio::pin!(order);
    let mut drawn = false;
    loop {
        tokio::select! {
            done = &mut order => {
                if drawn {
                    out::say_raw("\r\x1b[K");
                }
                return done;
            }
            _ = tick.tick() => {
                let text = format!("{host}: the hook runs, {} s", begun.elapsed().as_secs());
                if live {
                    drawn = true;
                    out::say_raw(&format!("\r{text}\x1b[K"));
                } else {
                    out::say(text);
                }
            }
        }
    }
}

fn words(host: &v1::Host) -> String {
    let fence = host.fence.clone().unwrap_or_default();
    let proof = if fence.proof.is_empty() {
        "the hook gave no word of proof".to_owned()
    } else {
        format!("proof: {}", fence.proof)
    };
    // A repeated order runs no hook: the proof is of the first one.
    if host.state_message.contains("was fenced before") {
        return format!("{}\n{proof}", host.state_message);
    }
    format!(
        "{} is fenced (fence {}): nothing of it runs any more\n{proof}",
        host.name, fence.id
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_proof_is_not_shown_as_a_new_one() {
        let mut host = v1::Host {
            name: "hosts/a".into(),
            fence: Some(v1::Fence {
                id: "f".into(),
                proof: "it is off".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let fresh = words(&host);
        assert!(fresh.contains("nothing of it runs any more\nproof: it is off"));
        host.state_message =
            "hosts/a was fenced before, at T (fence f): the hook was not run again".into();
        let old = words(&host);
        assert!(old.contains("not run again\nproof: it is off"), "{old}");
        assert!(!old.contains("nothing of it runs"), "{old}");
    }
}
