//! What API, command line, page and metrics say, brought into one form so that they can be
//! compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use slat_proto::{
    ApiError,
    model::{duration_nanos, timestamp_nanos},
    v1,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Command,
    time::timeout,
};

use crate::{binary, fleet::Fleet};

/// How long anybody may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// `slat get` with nothing to show while a host is silent.
const UNAVAILABLE: i32 = 5;

/// One VM as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VmRow {
    /// Its identity.
    pub uid: String,
    /// `vms/{vm}`.
    pub name: String,
    /// `hosts/{host}`.
    pub host: String,
    /// Without `STATE_`.
    pub state: String,
    /// Ownership number.
    pub epoch: u64,
    /// Shown as last seen.
    pub stale: bool,
    /// Uids of others of that name.
    pub conflicts: BTreeSet<String>,
}

/// What one of them says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// By uid; one that is shown twice is here twice.
    pub vms: Vec<VmRow>,
    /// State without `STATE_` by `hosts/{host}`.
    pub hosts: BTreeMap<String, String>,
    /// Phase without `MIGRATION_PHASE_` of each migration that has not ended.
    pub moving: BTreeMap<String, String>,
}

/// A migration as the API shows it.
#[derive(Clone, Debug)]
pub struct Moved {
    /// `migrations/{migration}`.
    pub name: String,
    /// Of its VM.
    pub uid: String,
    /// Where it stands.
    pub phase: v1::MigrationPhase,
    /// Where its VM is.
    pub location: v1::VmLocation,
    /// `hosts/{host}`.
    pub source: String,
    /// `hosts/{host}`.
    pub destination: String,
    /// Its creation, the beginnings of its phases, its end; nanoseconds since 1970.
    pub times: Vec<i128>,
}

/// What all say at about one moment.
#[derive(Clone, Debug, Default)]
pub struct Views {
    /// The server's API.
    pub api: View,
    /// When each VM was made, nanoseconds since 1970, by uid.
    pub born: BTreeMap<String, i128>,
    /// How far each host's clock is ahead, where it was measured, nanoseconds.
    pub offsets: BTreeMap<String, i128>,
    /// Hosts that it calls silent.
    pub silent: BTreeSet<String>,
    /// Its migrations.
    pub migrations: Vec<Moved>,
    /// What a call by name alone finds: a uid, or the reason why not.
    pub by_name: BTreeMap<String, Result<String, String>>,
    /// `slat get`.
    pub cli: View,
    /// The page's JSON.
    pub page: View,
    /// `name{labels}` and value.
    pub metrics: BTreeMap<String, f64>,
}

impl Views {
    /// Asks everybody.
    ///
    /// # Errors
    /// When somebody does not answer, or what is answered cannot be read.
    pub async fn take(fleet: &Fleet) -> anyhow::Result<Self> {
        let mut views = Self::default();
        timeout(ANSWER, views.ask_api(fleet))
            .await
            .context("the API does not answer")??;
        views.cli = timeout(ANSWER, cli(fleet))
            .await
            .context("the command line does not answer")??;
        let page = timeout(ANSWER, page(fleet));
        views.page = page.await.context("the page does not answer")??;
        let text = timeout(ANSWER, get(fleet, "/metrics"));
        let text = text.await.context("/metrics does not answer")??;
        views.metrics = text.lines().filter_map(series).collect();
        Ok(views)
    }

    async fn ask_api(&mut self, fleet: &Fleet) -> anyhow::Result<()> {
        let server = fleet.server();
        let request = v1::ListVmsRequest {
            page_size: 1000,
            ..Default::default()
        };
        let list = fleet.vms(&server).list_vms(request).await?.into_inner();
        self.silent = list.unreachable.into_iter().collect();
        self.api.vms = list.vms.iter().map(vm_row).collect();
        self.api.vms.sort();
        for vm in &list.vms {
            let time = vm.create_time.as_ref().map(timestamp_nanos);
            self.born.extend(time.map(|time| (vm.uid.clone(), time)));
        }
        let request = v1::ListHostsRequest::default();
        let hosts = fleet.hosts(&server).list_hosts(request).await?;
        for host in hosts.into_inner().hosts {
            let state = word(host.state().as_str_name()).to_owned();
            if let Some(offset) = &host.clock_offset {
                self.offsets
                    .insert(host.name.clone(), duration_nanos(offset));
            }
            self.api.hosts.insert(host.name, state);
        }
        for found in fleet.all_migrations().await? {
            let name = phase(found.phase().as_str_name());
            self.api.see(&found.name, name);
            let phases = found.phase_times.iter().map(|entry| &entry.time);
            let times = std::iter::once(&found.create_time)
                .chain(phases)
                .chain([&found.end_time]);
            self.migrations.push(Moved {
                times: times.flatten().map(timestamp_nanos).collect(),
                phase: found.phase(),
                location: found.vm_location(),
                name: found.name,
                uid: found.vm_uid,
                source: found.source,
                destination: found.destination,
            });
        }
        let names: BTreeSet<&String> = self.api.vms.iter().map(|vm| &vm.name).collect();
        for name in names {
            let found = match fleet.vm(&server, name).await {
                Ok(vm) => Ok(vm.uid),
                Err(ApiError { reason, .. }) => Err(reason.as_str().to_owned()),
            };
            self.by_name.insert(name.clone(), found);
        }
        Ok(())
    }
}

impl View {
    fn see(&mut self, migration: &str, phase: &str) {
        if !matches!(phase, "COMPLETED" | "CANCELLED" | "FAILED") {
            self.moving.insert(migration.to_owned(), phase.to_owned());
        }
    }
}

fn phase(phase: &str) -> &str {
    phase.strip_prefix("MIGRATION_PHASE_").unwrap_or(phase)
}

fn word(state: &str) -> &str {
    state.strip_prefix("STATE_").unwrap_or(state)
}

fn vm_row(vm: &v1::Vm) -> VmRow {
    VmRow {
        uid: vm.uid.clone(),
        name: vm.name.clone(),
        host: vm.host.clone(),
        state: word(vm.state().as_str_name()).to_owned(),
        epoch: vm.epoch,
        stale: vm.stale,
        conflicts: vm.conflicts.iter().map(|other| other.uid.clone()).collect(),
    }
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

/// A row of JSON; `stale` has its own word in each.
fn json_row(vm: &Value, stale: bool) -> anyhow::Result<VmRow> {
    // Canonical proto JSON has 64-bit numbers as strings, the page as numbers.
    let epoch = &vm["epoch"];
    let epoch = epoch.as_u64().or_else(|| epoch.as_str()?.parse().ok());
    let others = vm["conflicts"].as_array().map_or(&[][..], Vec::as_slice);
    Ok(VmRow {
        uid: text(vm, "uid"),
        name: text(vm, "name"),
        host: text(vm, "host"),
        state: word(&text(vm, "state")).to_owned(),
        epoch: epoch.with_context(|| format!("no epoch: {vm}"))?,
        stale,
        conflicts: others.iter().map(|other| text(other, "uid")).collect(),
    })
}

async fn slat_get(fleet: &Fleet, what: &str, more: &[&str]) -> anyhow::Result<Value> {
    let output = Command::new(binary::slat()?)
        .env("SLAT_INSECURE_PLAINTEXT", "true")
        .args(["get", what, "-o", "json"])
        .args(more)
        .arg("--server")
        .arg(fleet.server().to_string())
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let code = output.status.code();
    ensure!(
        matches!(code, Some(0 | UNAVAILABLE)),
        "slat get {what}: {output:?}"
    );
    serde_json::from_slice(&output.stdout).with_context(|| format!("slat get {what}: {output:?}"))
}

async fn cli(fleet: &Fleet) -> anyhow::Result<View> {
    let mut view = View::default();
    let list = slat_get(fleet, "vms", &[]).await?;
    for vm in list["vms"].as_array().context("no vms")? {
        let stale = vm["stale"].as_bool().unwrap_or(false);
        view.vms.push(json_row(vm, stale)?);
    }
    view.vms.sort();
    let list = slat_get(fleet, "hosts", &[]).await?;
    for host in list["hosts"].as_array().context("no hosts")? {
        let state = word(&text(host, "state")).to_owned();
        view.hosts.insert(text(host, "name"), state);
    }
    let list = slat_get(fleet, "migrations", &["--limit", "1000"]).await?;
    for found in list["migrations"].as_array().context("no migrations")? {
        view.see(&text(found, "name"), phase(&text(found, "phase")));
    }
    Ok(view)
}

async fn page(fleet: &Fleet) -> anyhow::Result<View> {
    let mut view = View::default();
    let list: Value = serde_json::from_str(&get(fleet, "/api/vms?limit=200").await?)?;
    for vm in list["rows"].as_array().context("no rows")? {
        let marks = vm["marks"].as_array().map_or(&[][..], Vec::as_slice);
        let stale = marks.iter().any(|mark| mark == "stale");
        view.vms.push(json_row(vm, stale)?);
    }
    view.vms.sort();
    let list: Value = serde_json::from_str(&get(fleet, "/api/hosts?limit=200").await?)?;
    for host in list["rows"].as_array().context("no rows")? {
        view.hosts.insert(text(host, "name"), text(host, "state"));
    }
    let list = get(fleet, "/api/migrations?state=RUNNING&limit=200").await?;
    let list: Value = serde_json::from_str(&list)?;
    for found in list["rows"].as_array().context("no rows")? {
        view.see(&text(found, "name"), &text(found, "phase"));
    }
    Ok(view)
}

/// The body of a page of the server's.
async fn get(fleet: &Fleet, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(fleet.server().to_string()).await?;
    // 1.0: the body is not cut into chunks, and the end of it is the end of the connection.
    let request = format!("GET {path} HTTP/1.0\r\nHost: slat\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{path}: {answer}"))?;
    ensure!(head.contains(" 200 "), "{path}: {head}");
    Ok(body.to_owned())
}

fn series(line: &str) -> Option<(String, f64)> {
    let (name, value) = line.rsplit_once(' ')?;
    (!line.starts_with('#')).then_some((name.to_owned(), value.parse().ok()?))
}
