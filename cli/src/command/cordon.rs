//! `slat cordon` and `slat uncordon`: whether new VMs and migrations may go to a host.

use slat_proto::{json::to_json, model::HostName, v1};

use super::several::Several;
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
};

const EXAMPLES: &str = "\
Examples:
  slat cordon host host-a        before maintenance; its VMs run on
  slat migrate web --to host-b   away from it
  slat uncordon host host-a      it takes VMs again
  slat cordon host host-a host-b several at once; each is tried, the worst result counts";

/// Options of both.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CordonArgs {
    #[command(subcommand)]
    kind: Kind,
    #[command(flatten)]
    client: ClientArgs,
}

impl CordonArgs {
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
    },
}

/// Cordons one host after the other, or ends their cordons.
pub(crate) async fn run(args: CordonArgs, cordon: bool) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let Kind::Host { names } = args.kind;
    let mut several = Several::new(&session, names.len());
    for host in &names {
        let mut hosts = session.client.hosts();
        let name = host.to_string();
        let answer = if cordon {
            hosts.cordon_host(v1::CordonHostRequest { name }).await
        } else {
            hosts.uncordon_host(v1::UncordonHostRequest { name }).await
        };
        let verb = if cordon { "cordon" } else { "uncordon" };
        let done = match answer {
            Ok(host) => {
                let host = host.into_inner();
                let state = if host.cordoned {
                    "cordoned: no new VM and no migration goes there"
                } else {
                    "takes VMs and migrations"
                };
                let text = || format!("{} {state}", host.name);
                several.answer(&session, &to_json(&host), &host.name, text)
            }
            Err(status) => Err(Failure::call(format!("{verb} {host}"), status)),
        };
        several.note(done)?;
    }
    several.end()
}
