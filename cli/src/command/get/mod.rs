//! `slat get hosts|vms|migrations|saves|leftovers`: a table of all, a page of one, or what changes.
//!
//! * [`listing`] asks, page by page, and knows which hosts may hold more.
//! * [`watch`] goes on asking, through restarts of the server.

pub(crate) mod listing;
mod watch;

use listing::{Listing, Migrations};
use slat_proto::{
    model::{HostName, MigrationName, VmName},
    v1,
};
use tonic::Status;

use super::{
    patience::PatienceArgs,
    saves::{SaveRef, SaveTarget},
    target::{Uid, VmTarget, Which},
};
use crate::{
    client::{Client, ClientArgs, Session},
    failure::Failure,
    output::{self, Format, ListStyle, Resource, SortBy},
};

const EXAMPLES: &str = "\
Examples:
  slat get hosts
  slat get vms --watch                 rows as they change, through restarts of the server
  slat get vms -o wide --sort-by -memory         the largest first, with uid, epoch and process
  slat get vm web                      one VM's page: counters, capabilities, epoch
  slat get vm --uid 0198f2a4-5c1e-7d30-9a55-3f1f0c9b7e21     where several have one name
  slat get migrations --vm web --limit 20
  slat get migration m1 -o json        its phases, iterations and decisions
  slat get saves                       saved VMs of all hosts
  slat get save web-1 -o json          one of them
  slat get leftovers --host host-a     what lies there and is no VM
  slat get vms -o name --no-headers    vms/web, one a line
  slat get vms --server 127.0.0.1:7401 --agent host-a    the VMs of one host, from its agent
  slat get vms --server unix:/var/lib/slat/agent/vms/web/vm.sock

Exit code 5, and not an empty list, when nothing is known and a host does not answer.";

/// Options of `slat get`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct GetArgs {
    #[command(subcommand)]
    what: What,
    /// Go on printing what changes
    #[arg(short, long, global = true)]
    watch: bool,
    /// Column to sort by, in lower case, as memory; -memory for the largest first
    #[arg(long, value_name = "FIELD", global = true, allow_hyphen_values = true)]
    sort_by: Option<SortBy>,
    /// Leave the headings of tables away
    #[arg(long, global = true)]
    no_headers: bool,
    #[command(flatten)]
    patience: PatienceArgs,
    #[command(flatten)]
    client: ClientArgs,
}

impl GetArgs {
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Hypervisor hosts
    #[command(alias = "host", after_help = EXAMPLES)]
    Hosts {
        /// Only this one, as host-a
        name: Option<HostName>,
    },
    /// Virtual machines
    ///
    /// NOTE marks VMs of one name (CONFLICT) and records of hosts that do not answer (STALE).
    /// PAGE-WRITES counts pages as memstress writes them: one that is written twice counts twice.
    #[command(alias = "vm", after_help = EXAMPLES)]
    Vms {
        /// Only this one, as web
        name: Option<VmName>,
        /// Only the VM of this identity (-o wide shows it)
        #[arg(long, value_name = "UID")]
        uid: Option<Uid>,
        /// Only VMs of this host, as host-a
        #[arg(long, value_name = "HOST", conflicts_with = "uid")]
        host: Option<HostName>,
    },
    /// Migrations, newest first
    ///
    /// PERCENT is the share of memory that the destination holds, ITERATIONS the rounds over memory
    /// that have begun, the first (everything) and the paused one (the rest) included.
    #[command(alias = "migration", after_help = EXAMPLES)]
    Migrations {
        /// Only this one, as m1
        name: Option<MigrationName>,
        /// Only those of this VM, as web
        #[arg(long, value_name = "VM", conflicts_with = "name")]
        vm: Option<VmName>,
        /// Only those of the VM of this identity (get vms -o wide shows it)
        #[arg(long, value_name = "UID", conflicts_with = "name")]
        uid: Option<Uid>,
        /// At most so many, the newest, as 20 [default: all that the server keeps]
        #[arg(long, value_name = "N", conflicts_with = "name",
              value_parser = clap::value_parser!(u32).range(1..))]
        limit: Option<u32>,
    },
    /// Saved VMs, by host and name
    ///
    /// FILE is what a save's file takes, PAUSE how long its VM did not run for it, BASE the save
    /// that it is built on.
    #[command(alias = "save", after_help = EXAMPLES)]
    Saves {
        /// Only this one, as web-1 or hosts/host-a/saves/web-1
        name: Option<SaveRef>,
        /// Only those on this host, as host-a
        #[arg(long, value_name = "HOST")]
        host: Option<HostName>,
    },
    /// What lies on hosts and is no VM: sides of migrations that nothing ends
    #[command(alias = "leftover", after_help = EXAMPLES)]
    Leftovers {
        /// Only those on this host, as host-a
        #[arg(long, value_name = "HOST")]
        host: Option<HostName>,
    },
}

/// Gets, or watches.
pub(crate) async fn run(args: GetArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    let style = ListStyle {
        format: args.client.output,
        sort_by: args.sort_by,
        no_headers: args.no_headers,
    };
    let watched = args.watch.then(|| args.patience.patience());
    let client = &session.client;
    match args.what {
        What::Hosts { name } => {
            style.check::<v1::Host>()?;
            let look = async |client: &Client| listing::hosts(client, name.as_ref()).await;
            match watched {
                Some(patience) => watch::poll(client, style, patience, look).await,
                None => show(client, &style, name.as_ref().map(ToString::to_string), look).await,
            }
        }
        What::Vms {
            name: None,
            uid: None,
            host,
        } => {
            style.check::<v1::Vm>()?;
            let look = async |client: &Client| listing::vms(client, host.as_ref()).await;
            match watched {
                Some(patience) => watch::poll(client, style, patience, look).await,
                None => show(client, &style, None, look).await,
            }
        }
        What::Vms { name, uid, host } => {
            let which = Which { uid, host };
            let target = VmTarget { vm: name, which };
            let look = async |client: &Client| listing::vm(client, &target).await;
            match watched {
                Some(patience) => watch::vm(client, style, patience, &target).await,
                None => show(client, &style, Some(target.to_string()), look).await,
            }
        }
        What::Migrations {
            name,
            vm,
            uid,
            limit,
        } => {
            style.check::<v1::Migration>()?;
            let vm_uid = uid.as_ref().map(ToString::to_string).unwrap_or_default();
            let which = Migrations {
                name,
                vm,
                vm_uid,
                limit,
            };
            let one = which.name.as_ref().map(ToString::to_string);
            let look = async |client: &Client| listing::migrations(client, &which).await;
            match (watched, one) {
                (Some(patience), Some(name)) => {
                    watch::migration(client, style, patience, &name).await
                }
                (Some(patience), None) => watch::poll(client, style, patience, look).await,
                (None, one) => show(client, &style, one, look).await,
            }
        }
        What::Saves { name: None, host } => {
            style.check::<v1::Save>()?;
            let look = async |client: &Client| listing::saves(client, host.as_ref()).await;
            match watched {
                Some(patience) => watch::poll(client, style, patience, look).await,
                None => show(client, &style, None, look).await,
            }
        }
        What::Saves {
            name: Some(save),
            host,
        } => {
            let name = SaveTarget { save, host }.resolve(client).await?;
            let look = async |client: &Client| listing::save(client, &name).await;
            match watched {
                Some(patience) => watch::save(client, style, patience, &name.to_string()).await,
                None => show(client, &style, Some(name.to_string()), look).await,
            }
        }
        What::Leftovers { host } => {
            style.check::<v1::Leftover>()?;
            let look = async |client: &Client| listing::leftovers(client, host.as_ref()).await;
            match watched {
                Some(patience) => watch::poll(client, style, patience, look).await,
                None => show(client, &style, None, look).await,
            }
        }
    }
}

/// Prints one look: `one`, when it is named, else the list.
async fn show<T: Resource>(
    client: &Client,
    style: &ListStyle,
    one: Option<String>,
    look: impl AsyncFn(&Client) -> Result<Listing<T>, Status>,
) -> Result<(), Failure> {
    let doing = one.as_ref().map_or_else(
        || format!("list {}", T::COLLECTION),
        |one| format!("get {one}"),
    );
    let found = look(client).await;
    let found = found.map_err(|status| Failure::call(doing, status))?;
    if one.is_some() {
        let mut items = found.items.iter();
        return items.try_for_each(|item| output::one(style.format, item));
    }
    let incomplete = found.check(T::COLLECTION);
    let for_people = matches!(style.format, Format::Table | Format::Wide);
    if incomplete.is_err() && for_people {
        return incomplete;
    }
    if incomplete.is_ok() {
        found.warn();
    }
    let (unreachable, unreported) = (&found.unreachable[..], &found.unreported[..]);
    let beside: &[(&str, &[String])] = match T::COLLECTION {
        "vms" => &[("unreachable", unreachable), ("unreported", unreported)],
        "leftovers" | "saves" => &[("unreachable", unreachable)],
        _ => &[],
    };
    output::list(style, found.items, beside)?;
    incomplete
}
