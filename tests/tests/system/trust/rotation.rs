//! Three hosts, each with a network of its own, a guest that checks its memory and never stays
//! long. Meanwhile every certificate is renewed and the CA's root replaced: no migration fails.
//! Then a host is locked out, and let in again.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::Value;
use slat_proto::{
    Reason,
    model::proto_duration,
    v1::{self, MigrationPhase, Verification, host, migration_params::Verify, vm::State},
};
use slat_tests::{
    Fleet, Layout,
    fleet::{
        Protection,
        certificates::{ADMIN, Certificates, DOMAIN, SERVER},
    },
    guest::{MIB, busy, paced, verified},
    scene,
    wait::eventually,
};
use tokio::sync::watch;

use super::super::cli::slat;

const HOSTS: [&str; 3] = ["host-a", "host-b", "host-c"];
/// Memory of the guest, and how much of it travels in a second: a step takes less time than a
/// migration.
const MEMORY_MIB: u64 = 32;
const PACE: u64 = 8 * MIB;
/// Steps that change an agent's files: two renewals, two times that roots and lists are published.
const CHANGES: f64 = 4.0;

/// The migration that is under way.
#[derive(Clone, Debug, Default)]
struct Moving {
    flows: bool,
    ended: usize,
}

/// The VM goes round until it is told to stop. Where it is then.
async fn go_round(
    fleet: &Fleet,
    vm: &v1::Vm,
    tell: watch::Sender<Moving>,
    stop: &AtomicBool,
) -> anyhow::Result<usize> {
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        at = go_on(fleet, vm, at, Some(&tell)).await?;
    }
    Ok(at)
}

/// One migration to the next host, and the proof that it went well.
async fn go_on(
    fleet: &Fleet,
    vm: &v1::Vm,
    at: usize,
    tell: Option<&watch::Sender<Moving>>,
) -> anyhow::Result<usize> {
    let next = (at + 1) % HOSTS.len();
    let params = v1::MigrationParams {
        max_downtime: Some(proto_duration(Duration::from_secs(10))),
        ..verified(paced(PACE), Verify::AfterCommit)
    };
    let begun = fleet.migrate_until_precopy(&vm.name, HOSTS[next], params);
    let begun = begun.await?;
    if let Some(tell) = tell {
        tell.send_modify(|moving| moving.flows = true);
    }
    let done = fleet
        .migration_ends(&begun.name, MigrationPhase::Completed)
        .await?;
    if let Some(tell) = tell {
        tell.send_modify(|moving| {
            moving.flows = false;
            moving.ended += 1;
        });
    }
    ensure!(done.error.is_none(), "{done:#?}");
    let progress = done.progress.context("no progress")?;
    let verification = progress.verification();
    ensure!(verification == Verification::Match, "{progress:#?}");
    let there = fleet.runs_soundly_on(&vm.name, HOSTS[next]).await?;
    ensure!(there.uid == vm.uid, "another VM: {there:#?}");
    fleet.vm_dir_gone(HOSTS[at], &vm.name).await?;
    Ok(next)
}

/// Steps of an operator, each while pages flow.
struct Steps {
    certificates: Certificates,
    moving: watch::Receiver<Moving>,
}

impl Steps {
    async fn take(&mut self, what: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let under_way = self.moving.wait_for(|moving| moving.flows).await?.clone();
        let certificates = self.certificates.clone();
        let words: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        let printed = tokio::task::spawn_blocking(move || {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            certificates.pki(&words)
        })
        .await??;
        let still = self.moving.borrow().ended == under_way.ended;
        eprintln!(
            "{what}, migration {} {}",
            under_way.ended,
            if still { "went on" } else { "ended meanwhile" }
        );
        // The next step meets another migration, and with all that changed by this one.
        self.moving
            .wait_for(|moving| moving.ended > under_way.ended)
            .await?;
        Ok(printed)
    }

    /// A command with the directories of these holders.
    async fn with(&mut self, what: &str, verb: &str, names: &[&str]) -> anyhow::Result<()> {
        let dirs: Vec<String> = names.iter().map(|it| self.certificates.path(it)).collect();
        let mut arguments = vec![verb];
        for dir in &dirs {
            arguments.extend(["--out", dir.as_str()]);
        }
        self.take(what, &arguments).await.map(drop)
    }
}

const EVERYBODY: [&str; 5] = [HOSTS[0], HOSTS[1], HOSTS[2], SERVER, ADMIN];

/// A user with a certificate of the old root, and all that everybody else knows.
const LEFT_BEHIND: &str = "left-behind";

fn copy(from: &Path, to: &Path, files: &[&str]) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for file in files {
        std::fs::copy(from.join(file), to.join(file))?;
    }
    Ok(())
}

/// What docs/trust.md tells an operator to do. The serial number of the new root.
async fn rotate(steps: &mut Steps) -> anyhow::Result<String> {
    steps.with("agents renewed", "renew", &HOSTS).await?;
    steps.with("server renewed", "renew", &[SERVER]).await?;
    steps.with("user renewed", "renew", &[ADMIN]).await?;

    let rotated = steps.take("root made", &["rotate", "-o", "json"]).await?;
    let rotated: Value = serde_json::from_str(&rotated)?;
    let serial = rotated["root"]["serial"].as_str().context("no serial")?;
    steps
        .with("new root published", "publish", &EVERYBODY)
        .await?;
    let own = steps.certificates.dir(ADMIN);
    let left = steps.certificates.dir(LEFT_BEHIND);
    copy(&own, &left, &["ca.crt", "crl.pem", "tls.crt", "tls.key"])?;
    steps
        .with("all renewed under it", "renew", &EVERYBODY)
        .await?;
    steps.take("old root retired", &["retire"]).await?;
    steps
        .with("its end published", "publish", &EVERYBODY)
        .await?;
    copy(&own, &left, &["ca.crt", "crl.pem"])?;
    Ok(serial.to_owned())
}

/// Only certificates of the new root are in use.
fn all_under(certificates: &Certificates, root: &str) -> anyhow::Result<()> {
    let listed: Value = serde_json::from_str(&certificates.pki(&["list", "-o", "json"])?)?;
    let roots = listed["roots"].as_array().context("no roots")?;
    ensure!(roots.len() == 1 && roots[0]["serial"] == root, "{listed:#}");
    let all = listed["certificates"].as_array().context("none")?;
    let valid: Vec<_> = all.iter().filter(|it| it["state"] == "valid").collect();
    ensure!(valid.len() == EVERYBODY.len(), "{listed:#}");
    ensure!(valid.iter().all(|it| it["root"] == root), "{listed:#}");
    Ok(())
}

/// What the command line is refused with.
async fn refused(fleet: &Fleet, holder: &str) -> anyhow::Result<Value> {
    let address = fleet.server().to_string();
    let dir = fleet.certificates().path(holder);
    let line = format!("get hosts -o json --server {address} --tls-dir {dir}");
    let arguments: Vec<&str> = line.split(' ').collect();
    let output = slat(&arguments, &[]).await?;
    ensure!(!output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    let error = said.lines().rfind(|line| line.starts_with('{'));
    let error = error.with_context(|| said.to_string())?;
    Ok(serde_json::from_str(error)?)
}

/// Counts of reloads at every endpoint.
async fn reloaded(fleet: &Fleet) -> anyhow::Result<()> {
    let agents = HOSTS.iter().map(|host| fleet.agent(host));
    for endpoint in agents.chain([fleet.server()]) {
        let text = fleet.metrics(&endpoint).await?;
        let count = |result: &str| {
            let name = format!("slat_tls_reloads_total{{result=\"{result}\"}} ");
            let value = text.lines().find_map(|line| line.strip_prefix(&name));
            let value = value.with_context(|| format!("{endpoint}: no {name}:\n{text}"))?;
            Ok::<f64, anyhow::Error>(value.parse()?)
        };
        let (ok, failed) = (count("ok")?, count("failed")?);
        ensure!(ok >= CHANGES, "{endpoint}: {ok} reloads");
        ensure!(failed == 0.0, "{endpoint}: {failed} reloads failed");
    }
    Ok(())
}

/// Locks the host out that has the VM, which goes on there; lets it in again.
async fn lock_out(fleet: &Fleet, vm: &v1::Vm, host: &str) -> anyhow::Result<()> {
    let certificates = fleet.certificates();
    certificates.pki(&["revoke", &format!("agent/{host}")])?;
    // Not to the user, who looks at that host.
    for name in EVERYBODY.iter().filter(|it| **it != host && **it != ADMIN) {
        certificates.pki(&["publish", "--out", &certificates.path(name)])?;
    }
    eventually(&format!("{host} is UNREACHABLE"), || async {
        let request = v1::GetHostRequest {
            name: format!("hosts/{host}"),
        };
        let shown = fleet.hosts(&fleet.server()).get_host(request).await?;
        let shown = shown.into_inner();
        ensure!(shown.state() == host::State::Unreachable, "{shown:#?}");
        // Not for calls that fail alone, while its last report is fresh: one that succeeds would
        // make it READY for a moment before it reports again.
        let silent = shown.state_message.contains("its agent does not report");
        ensure!(silent, "{shown:#?}");
        Ok(())
    })
    .await?;
    let agent = fleet.agent(host);
    let written = |vm: &v1::Vm| vm.guest_counters.map_or(0, |it| it.pages_written);
    let there = fleet.vm(&agent, &vm.name).await?;
    ensure!(there.state() == State::Running, "{there:#?}");
    let before = written(&there);
    let on = fleet
        .vm_until(&agent, &vm.name, "it goes on", |vm| {
            written(vm) > before + 100
        })
        .await?;
    let errors = on.guest_counters.map(|counters| counters.errors);
    ensure!(errors == Some(0), "{on:#?}");

    // A revoked certificate is not renewed. The new one's directory takes the old one's place.
    let own = certificates.path(host);
    ensure!(certificates.pki(&["renew", "--out", &own]).is_err());
    let fresh = certificates.path("fresh");
    certificates.pki(&["issue", "agent", host, "--out", &fresh])?;
    renameat_with(CWD, &fresh, CWD, &own, RenameFlags::EXCHANGE)?;
    fleet.hosts_ready().await?;
    fleet.runs_soundly_on(&vm.name, host).await.map(drop)
}

#[test]
fn nothing_stops_while_certificates_change() {
    let layout = Layout {
        backend: scene::best_backend(),
        hosts: HOSTS.iter().map(|host| (*host, 256)).collect(),
        own_clocks: false,
    };
    let protection = Protection {
        tls: true,
        namespaces: true,
    };
    scene::run_by(layout, protection, async |fleet: &mut Fleet| {
        let began = Instant::now();
        let fleet = &*fleet;
        let spec = busy(fleet.backend(), MEMORY_MIB, 1, Some(MIB));
        let vm = fleet.run_vm("nomad", HOSTS[0], spec).await?;
        let (tell, moving) = watch::channel(Moving::default());
        let stop = AtomicBool::new(false);
        let mut steps = Steps {
            certificates: fleet.certificates().clone(),
            moving: moving.clone(),
        };
        let operator = async {
            let root = rotate(&mut steps).await;
            stop.store(true, Ordering::Relaxed);
            root
        };
        let (at, root) = tokio::try_join!(go_round(fleet, &vm, tell, &stop), operator)?;
        let migrations = fleet.all_migrations().await?;
        ensure!(
            migrations
                .iter()
                .all(|it| it.phase() == MigrationPhase::Completed && it.error.is_none()),
            "{migrations:#?}"
        );

        let certificates = fleet.certificates();
        all_under(certificates, &root)?;
        let error = refused(fleet, LEFT_BEHIND).await?;
        let unknown = Reason::CertificateUnknownCa.as_str();
        ensure!(error["error"]["reason"] == unknown, "{error:#}");
        reloaded(fleet).await?;

        lock_out(fleet, &vm, HOSTS[at]).await?;
        go_on(fleet, &vm, at, None).await?;
        eprintln!(
            "{} migrations in {DOMAIN}, {} s",
            migrations.len() + 1,
            began.elapsed().as_secs()
        );
        Ok(())
    });
}
