//! What happens to a fleet: processes killed, stopped or doubled, and copies that only an order
//! takes back.

use std::time::Duration;

use slat_proto::v1;

use super::{Done, Driver, gives};
use crate::{
    binary,
    handover::kill_after_commit,
    process::{Daemon, VmProcess},
    soak::{
        judge::{Broken, Rule},
        oracle::{Standing, Truth},
        plan::{HOSTS, Victim},
    },
    wait::eventually,
};

/// A second agent registers, is refused and tries again.
const SHOWN_WITHIN: Duration = Duration::from_secs(10);
/// A call to a stopped process, and the next, end within as long.
const UNREACHABLE_WITHIN: Duration = Duration::from_secs(25);
/// A destination's process is started within as long.
const PREPARED_WITHIN: Duration = Duration::from_secs(3);

impl Driver {
    pub(super) async fn kill_vm(&mut self, vm: u32) -> anyhow::Result<Done> {
        let Some((uid, place)) = self.placed(vm).await? else {
            return Ok(Done::void());
        };
        let dir = self.fleet.host_vms(HOSTS[place]).join(&uid);
        let Some(process) = VmProcess::behind(&dir)? else {
            return Ok(Done::void());
        };
        process.kill()?;
        Ok(Done::note(format!("killed on {}", HOSTS[place])))
    }

    pub(super) async fn migrate_and_kill(
        &mut self,
        vm: u32,
        after: usize,
        victim: Victim,
        millis: u64,
    ) -> anyhow::Result<Done> {
        let Some((uid, place)) = self.placed(vm).await? else {
            return Ok(Done::void());
        };
        let asked = self.ledger.migrations.len();
        let done = self.migrate(vm, after, false).await?;
        if self.ledger.migrations.len() == asked {
            return Ok(done);
        }
        tokio::time::sleep(Duration::from_millis(millis)).await;
        let (source, destination) = (HOSTS[place], HOSTS[(place + after) % HOSTS.len()]);
        match victim {
            Victim::Source | Victim::Destination => {
                let host = if victim == Victim::Source {
                    source
                } else {
                    destination
                };
                let dir = self.fleet.host_vms(host).join(&uid);
                // Just made it holds no pid yet.
                if let Ok(Some(process)) = VmProcess::behind(&dir) {
                    process.kill()?;
                }
            }
            Victim::SourceAgent | Victim::DestinationAgent => {
                let is_source = victim == Victim::SourceAgent;
                let host = if is_source { source } else { destination };
                if self.is_up(host) {
                    self.fleet.kill_agent(host);
                    self.fleet.start_agent(host)?;
                }
            }
            Victim::Server => {
                self.fleet.kill_server();
                self.fleet.start_server()?;
            }
        }
        Ok(done)
    }

    /// Leaves a frozen copy, when the moment is not missed.
    pub(super) async fn freeze(&mut self, vm: u32, after: usize) -> anyhow::Result<Done> {
        let Some((uid, place)) = self.placed(vm).await? else {
            return Ok(Done::void());
        };
        let asked = self.ledger.migrations.len();
        let mut done = self.migrate(vm, after, false).await?;
        if self.ledger.migrations.len() == asked {
            return Ok(done);
        }
        let dir = |place: usize| self.fleet.host_vms(HOSTS[place % HOSTS.len()]).join(&uid);
        let (source, target) = (dir(place), dir(place + after));
        let killed = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
            let deadline = std::time::Instant::now() + PREPARED_WITHIN;
            while std::time::Instant::now() < deadline {
                if let Ok(Some(process)) = VmProcess::behind(&target) {
                    return kill_after_commit(&source, &target, &process);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            anyhow::bail!("no destination")
        });
        if let Err(error) = killed.await? {
            // It failed before, or was over before anybody looked.
            done.note = format!("{}, the moment was missed: {error:#}", done.note);
        }
        Ok(done)
    }

    /// Takes a frozen copy back, by an order that says what it gives up.
    pub(super) async fn adopt(&mut self, vm: u32) -> anyhow::Result<Done> {
        let Some((uid, _)) = self.ledger.vm(vm) else {
            return Ok(Done::void());
        };
        let truth = Truth::read(&self.fleet).await?;
        let owner = truth.owner(&uid).is_some();
        let copy = truth
            .of(&uid)
            .find(|record| record.standing == Standing::Source && record.lives);
        let host = match (owner, copy) {
            (false, Some(copy)) => copy.host.clone(),
            // With this order an operator asserts that nobody runs the VM: that would be a lie.
            _ => return Ok(Done::note("void: there is no frozen copy")),
        };
        let request = v1::AdoptLeftoverRequest {
            host,
            uid: uid.clone(),
            give_up: true,
            ..Default::default()
        };
        let mut hosts = self.fleet.hosts(&self.fleet.server());
        Ok(match gives(hosts.adopt_leftover(request).await) {
            Ok(adopted) => {
                let vm = adopted.vm.unwrap_or_default();
                // They say where it was when they ended, which is past.
                let migrations = self.ledger.migrations.iter_mut();
                for asked in migrations.filter(|asked| asked.uid == uid) {
                    asked.judged = true;
                }
                let mut done = Done::note(format!("{:?} at epoch {}", vm.state(), vm.epoch));
                if vm.uid != uid || vm.state() != v1::vm::State::Paused {
                    let said = format!("adopted: {vm:?}");
                    done.broken.push(Broken::new(Rule::Answers, uid, said));
                }
                done
            }
            Err(error) => Done::refused("adopt", &error),
        })
    }

    /// A stopped process is told as such, and is ended by force.
    pub(super) async fn force_delete(&mut self, vm: u32) -> anyhow::Result<Done> {
        let Some((uid, place)) = self.placed(vm).await? else {
            return Ok(Done::void());
        };
        let dir = self.fleet.host_vms(HOSTS[place]).join(&uid);
        let Some(process) = VmProcess::behind(&dir)? else {
            return Ok(Done::void());
        };
        process.suspend()?;
        let delete = |force| {
            let request = v1::DeleteVmRequest {
                uid: uid.clone(),
                force,
                ..Default::default()
            };
            let mut vms = self.fleet.vms(&self.fleet.server());
            async move { gives(vms.delete_vm(request).await) }
        };
        let asked = std::time::Instant::now();
        let gentle = delete(false).await;
        let forced = delete(true).await;
        let took = asked.elapsed();
        if forced.is_err() {
            process.resume()?;
        }
        let mut done = match &forced {
            Ok(_) => Done::note("deleted by force"),
            Err(error) => Done::refused("delete by force", error),
        };
        if gentle.is_ok() {
            let said = "a stopped process was deleted without force";
            done.broken.push(Broken::new(Rule::Answers, &uid, said));
        }
        if took > UNREACHABLE_WITHIN {
            let said = format!("two answers took {took:?}");
            done.broken.push(Broken::new(Rule::Answers, &uid, said));
        }
        if forced.is_ok() {
            self.ledger.made.remove(&vm);
            self.ledger.deleted.insert(uid.clone());
        }
        Ok(done)
    }

    /// Starts a second agent under the name of one that reports, waits until the host shows it as a
    /// contender, and ends it.
    pub(super) async fn second_agent(&self, host: &'static str) -> anyhow::Result<Done> {
        let root = self.fleet.root();
        let state = root.join(format!("{host}-twin"));
        let mut args = vec![
            "agent".into(),
            "--insecure-plaintext".into(),
            "--state-dir".into(),
            state.clone().into(),
        ];
        args.extend(["--name".into(), host.into(), "--server".into()]);
        args.push(self.fleet.server().to_string().into());
        args.extend(["--memory", "64MiB", "--data-ports", "0"].map(Into::into));
        let log = root.join(format!("{host}-twin.log"));
        let mut daemon = Daemon::new("the second agent", &binary::slat()?, args, log);
        daemon.start()?;
        let address = daemon.address().to_string();
        let first = self.fleet.agent(host).to_string();
        let shown = eventually("the second agent is a contender", || async {
            let request = v1::GetHostRequest {
                name: format!("hosts/{host}"),
            };
            let mut hosts = self.fleet.hosts(&self.fleet.server());
            let shown = hosts.get_host(request).await?.into_inner();
            anyhow::ensure!(shown.contender.contains(&address), "{shown:?}");
            Ok(shown)
        });
        let shown = tokio::time::timeout(SHOWN_WITHIN, shown).await;
        daemon.stop()?;
        std::fs::remove_dir_all(&state)?;
        let fault = match shown {
            Ok(Ok(shown)) if shown.address == first => None,
            Ok(Ok(shown)) => Some(format!("the first is at {first}: {shown:?}")),
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some("no contender is shown".to_owned()),
        };
        let broken = fault.map(|fault| Broken::new(Rule::NamesConflict, host, fault));
        Ok(Done {
            note: "a second agent was refused".into(),
            broken: broken.into_iter().collect(),
        })
    }
}
