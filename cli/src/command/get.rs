//! `slat get hosts|vms|migrations`: a table of all, a page of one, or a stream of what changes.
//!
//! A watch of one VM or migration follows the server's stream; a watch of several asks again every
//! second and prints the rows that changed, as JSON one object a line.

use std::{collections::HashMap, time::Duration};

use serde_json::{Value, json};
use slat_proto::{
    json::to_json,
    model::{HostName, MigrationName, VmName},
    transport::Address,
    v1,
};
use tokio_stream::StreamExt as _;

use crate::{
    client::{Client, ClientArgs, Session},
    failure::Failure,
    term::{
        out::{self, Format},
        table::{Cell, Table},
    },
    view,
};

const EXAMPLES: &str = "\
Examples:
  slat get hosts
  slat get vms --watch                 rows as they change
  slat get vm web                      one VM's page: counters, capabilities, epoch
  slat get migrations --vm web
  slat get migration m1 -o json
  slat get vms --server 127.0.0.1:7401           the VMs of one host, from its agent
  slat get vms --server unix:/var/lib/slat/agent/vms/web/vm.sock";

/// How often a watch of several asks again.
const POLL: Duration = Duration::from_secs(1);

/// Options of `slat get`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct GetArgs {
    #[command(subcommand)]
    what: What,
    /// Go on printing what changes
    #[arg(short, long, global = true)]
    watch: bool,
    #[command(flatten)]
    client: ClientArgs,
}

impl GetArgs {
    /// The endpoint to ask.
    pub(crate) fn endpoint(&self) -> Option<Address> {
        Some(self.client.server.clone())
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Hypervisor hosts
    #[command(alias = "host", after_help = EXAMPLES)]
    Hosts {
        /// Only this one
        name: Option<HostName>,
    },
    /// Virtual machines
    #[command(alias = "vm", after_help = EXAMPLES)]
    Vms {
        /// Only this one
        name: Option<VmName>,
    },
    /// Migrations, newest first
    #[command(alias = "migration", after_help = EXAMPLES)]
    Migrations {
        /// Only this one
        name: Option<MigrationName>,
        /// Only those of this VM
        #[arg(long, value_name = "VM", conflicts_with = "name")]
        vm: Option<VmName>,
    },
}

/// One resource, ready to print.
struct Item {
    name: String,
    row: Vec<Cell>,
    page: String,
    json: Value,
}

/// What one look brought.
struct Look {
    items: Vec<Item>,
    unreachable: Vec<String>,
}

impl From<Vec<Item>> for Look {
    fn from(items: Vec<Item>) -> Self {
        Self {
            items,
            unreachable: Vec::new(),
        }
    }
}

impl What {
    fn collection(&self) -> &'static str {
        match self {
            Self::Hosts { .. } => "hosts",
            Self::Vms { .. } => "vms",
            Self::Migrations { .. } => "migrations",
        }
    }

    fn heads(&self) -> &'static [&'static str] {
        match self {
            Self::Hosts { .. } => &view::HOST_HEADS,
            Self::Vms { .. } => &view::VM_HEADS,
            Self::Migrations { .. } => &view::MIGRATION_HEADS,
        }
    }

    /// Full name of the one that was asked for.
    fn one(&self) -> Option<String> {
        match self {
            Self::Hosts { name } => name.as_ref().map(HostName::to_string),
            Self::Vms { name } => name.as_ref().map(VmName::to_string),
            Self::Migrations { name, .. } => name.as_ref().map(MigrationName::to_string),
        }
    }
}

fn host_item(host: &v1::Host) -> Item {
    Item {
        name: host.name.clone(),
        row: view::host_row(host),
        page: view::host_page(host, out::stdout_colours()),
        json: to_json("slat.v1.Host", host),
    }
}

fn vm_item(vm: &v1::Vm) -> Item {
    Item {
        name: vm.name.clone(),
        row: view::vm_row(vm),
        page: view::vm_page(vm, out::stdout_colours()),
        json: to_json("slat.v1.Vm", vm),
    }
}

fn migration_item(migration: &v1::Migration) -> Item {
    Item {
        name: migration.name.clone(),
        row: view::migration_row(migration),
        page: view::migration_page(migration, out::stdout_colours()),
        json: to_json("slat.v1.Migration", migration),
    }
}

/// Gets, or watches.
pub(crate) async fn run(args: GetArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    if args.watch {
        return watch(&session, &args.what).await;
    }
    let look = look(&session.client, &args.what).await?;
    warn(&look.unreachable);
    match (session.output, args.what.one()) {
        (Format::Json, None) => {
            let list: Vec<Value> = look.items.into_iter().map(|item| item.json).collect();
            let mut answer = json!({ args.what.collection(): list });
            if !look.unreachable.is_empty() {
                answer["unreachable"] = json!(look.unreachable);
            }
            out::json(&answer)
        }
        (Format::Table, None) if look.items.is_empty() => {
            out::say(format!("no {}", args.what.collection()));
            Ok(())
        }
        (Format::Table, None) => {
            let rows: Vec<Vec<Cell>> = look.items.into_iter().map(|item| item.row).collect();
            out::line(Table::new(args.what.heads(), out::stdout_colours()).render(&rows))
        }
        (format, Some(_)) => look.items.iter().try_for_each(|item| match format {
            Format::Json => out::json(&item.json),
            Format::Table => out::line(&item.page),
        }),
    }
}

fn warn(unreachable: &[String]) {
    if !unreachable.is_empty() {
        out::say(format!(
            "warning: {} does not answer; VMs there may be missing or shown as they were",
            unreachable.join(", ")
        ));
    }
}

async fn look(client: &Client, what: &What) -> Result<Look, Failure> {
    let doing = || match what.one() {
        Some(name) => format!("get {name}"),
        None => format!("list {}", what.collection()),
    };
    let failed = |status| Failure::call(doing(), status);
    match what {
        What::Hosts { name: Some(name) } => {
            let name = name.to_string();
            let host = client.hosts().get_host(v1::GetHostRequest { name }).await;
            Ok(vec![host_item(&host.map_err(failed)?.into_inner())].into())
        }
        What::Vms { name: Some(name) } => {
            let name = name.to_string();
            let vm = client
                .vms()
                .get_vm(v1::GetVmRequest {
                    name,
                    ..Default::default()
                })
                .await;
            Ok(vec![vm_item(&vm.map_err(failed)?.into_inner())].into())
        }
        What::Migrations {
            name: Some(name), ..
        } => {
            let name = name.to_string();
            let request = v1::GetMigrationRequest { name };
            let migration = client.migrations().get_migration(request).await;
            Ok(vec![migration_item(&migration.map_err(failed)?.into_inner())].into())
        }
        What::Hosts { name: None } => hosts(client).await.map_err(failed),
        What::Vms { name: None } => vms(client).await.map_err(failed),
        What::Migrations { name: None, vm } => {
            migrations(client, vm.as_ref()).await.map_err(failed)
        }
    }
}

async fn hosts(client: &Client) -> Result<Look, tonic::Status> {
    let mut items = Vec::new();
    let mut request = v1::ListHostsRequest::default();
    loop {
        let page = client
            .hosts()
            .list_hosts(request.clone())
            .await?
            .into_inner();
        items.extend(page.hosts.iter().map(host_item));
        if page.next_page_token.is_empty() {
            return Ok(items.into());
        }
        request.page_token = page.next_page_token;
    }
}

async fn vms(client: &Client) -> Result<Look, tonic::Status> {
    let mut look = Look::from(Vec::new());
    let mut request = v1::ListVmsRequest::default();
    loop {
        let page = client.vms().list_vms(request.clone()).await?.into_inner();
        look.items.extend(page.vms.iter().map(vm_item));
        for host in page.unreachable {
            if !look.unreachable.contains(&host) {
                look.unreachable.push(host);
            }
        }
        if page.next_page_token.is_empty() {
            return Ok(look);
        }
        request.page_token = page.next_page_token;
    }
}

async fn migrations(client: &Client, vm: Option<&VmName>) -> Result<Look, tonic::Status> {
    let mut items = Vec::new();
    let mut request = v1::ListMigrationsRequest {
        vm: vm.map(VmName::to_string).unwrap_or_default(),
        ..Default::default()
    };
    loop {
        let mut migrations = client.migrations();
        let page = migrations
            .list_migrations(request.clone())
            .await?
            .into_inner();
        items.extend(page.migrations.iter().map(migration_item));
        if page.next_page_token.is_empty() {
            return Ok(items.into());
        }
        request.page_token = page.next_page_token;
    }
}

/// Prints rows as they change.
struct Changes {
    output: Format,
    table: Table,
    headed: bool,
    seen: HashMap<String, Vec<Cell>>,
}

impl Changes {
    fn new(session: &Session, what: &What) -> Self {
        Self {
            output: session.output,
            table: Table::new(what.heads(), out::stdout_colours()),
            headed: false,
            seen: HashMap::new(),
        }
    }

    fn show(&mut self, items: Vec<Item>) -> Result<(), Failure> {
        let changed: Vec<Item> = items
            .into_iter()
            .filter(|item| self.seen.get(&item.name).map(Vec::as_slice) != Some(but_age(&item.row)))
            .collect();
        for item in &changed {
            self.seen
                .insert(item.name.clone(), but_age(&item.row).to_vec());
        }
        if self.output == Format::Json {
            return changed
                .iter()
                .try_for_each(|item| out::json_line(&item.json));
        }
        let rows: Vec<Vec<Cell>> = changed.into_iter().map(|item| item.row).collect();
        if rows.is_empty() {
            return Ok(());
        }
        if !self.headed {
            self.headed = true;
            return out::line(self.table.render(&rows));
        }
        rows.iter()
            .try_for_each(|row| out::line(self.table.row(row)))
    }
}

/// A row without its last cell, the age, which always changes.
fn but_age(row: &[Cell]) -> &[Cell] {
    row.split_last().map_or(&[], |(_, rest)| rest)
}

async fn watch(session: &Session, what: &What) -> Result<(), Failure> {
    let mut changes = Changes::new(session, what);
    let client = &session.client;
    match what {
        What::Vms { name: Some(name) } => {
            let failed = |status| Failure::call(format!("watch {name}"), status);
            let request = v1::WatchVmRequest {
                name: name.to_string(),
                ..Default::default()
            };
            let stream = client.vms().watch_vm(request).await.map_err(failed)?;
            let mut stream = stream.into_inner();
            while let Some(vm) = stream.next().await {
                changes.show(vec![vm_item(&vm.map_err(failed)?)])?;
            }
            out::say(format!("{name} is no longer here"));
            Ok(())
        }
        What::Migrations {
            name: Some(name), ..
        } => {
            let failed = |status| Failure::call(format!("watch {name}"), status);
            let request = v1::WatchMigrationRequest {
                name: name.to_string(),
            };
            let stream = client.migrations().watch_migration(request).await;
            let mut stream = stream.map_err(failed)?.into_inner();
            while let Some(migration) = stream.next().await {
                changes.show(vec![migration_item(&migration.map_err(failed)?)])?;
            }
            Ok(())
        }
        _ => loop {
            let found = look(client, what).await?;
            warn(&found.unreachable);
            changes.show(found.items)?;
            tokio::time::sleep(POLL).await;
        },
    }
}
