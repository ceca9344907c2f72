//! Carries steps out, on real processes, as an operator or an accident would.
//!
//! A step that cannot be done any more (its VM was never made, or died) is void. A refusal is an
//! answer like any other, if its reason is one that somebody can act upon.

use std::time::Duration;

use anyhow::Context as _;
use slat_proto::{
    ApiError, Reason,
    v1::{self, Backend},
};

use super::{
    SHOWN_WITHIN,
    disk::SmallDisk,
    judge::{Broken, Rule},
    oracle::{Asked, Ledger, Standing, Truth},
    plan::{HOSTS, SMALL_DISK, Step, Victim},
};
use crate::{
    binary,
    fleet::Fleet,
    guest::{MIB, busy, fast, paced},
    handover::kill_after_commit,
    process::{Daemon, VmProcess},
    wait::{PATIENCE, eventually},
};

/// Memory of each VM.
const VM_MIB: u64 = 16;
/// A slow migration takes eight seconds at least.
const SLOW: u64 = 2 * MIB;
/// Of each host: more than all VMs and their migrations could take.
pub const HOST_MIB: u64 = 512;

/// The disks of a fleet that can be filled; none where nobody may mount one.
#[derive(Debug)]
pub struct Disks {
    /// Of [`SMALL_DISK`].
    pub agent: SmallDisk,
    /// Of the server.
    pub server: SmallDisk,
}

/// What a step came to.
#[derive(Debug)]
pub struct Done {
    /// In words.
    pub note: String,
    /// What is wrong with its answer.
    pub broken: Vec<Broken>,
}

impl Done {
    fn note(note: impl Into<String>) -> Self {
        Self {
            note: note.into(),
            broken: Vec::new(),
        }
    }

    fn void() -> Self {
        Self::note("void: there is no such VM")
    }

    /// A refusal.
    fn refused(what: &str, error: &ApiError) -> Self {
        let reason = error.reason.as_str();
        let broken = if error.reason == Reason::Internal {
            vec![Broken::new(Rule::Answers, what, format!("{error:?}"))]
        } else {
            Vec::new()
        };
        Self {
            note: format!("refused: {reason}: {}", error.message),
            broken,
        }
    }
}

fn gives<T>(result: Result<tonic::Response<T>, tonic::Status>) -> Result<T, ApiError> {
    result
        .map(tonic::Response::into_inner)
        .map_err(ApiError::from)
}

/// Carries steps out.
#[derive(Debug)]
pub struct Driver {
    /// On what.
    pub fleet: Fleet,
    /// What came of them.
    pub ledger: Ledger,
    /// VMs that could not be made, by their numbers in the plan.
    pub refused: Vec<u32>,
    /// Of VMs with an even number; the others are software.
    pub backend: Backend,
}

impl Driver {
    /// Carries one out.
    ///
    /// # Errors
    /// When the harness fails, not Slat.
    pub async fn carry_out(&mut self, step: &Step, disks: Option<&Disks>) -> anyhow::Result<Done> {
        match *step {
            Step::Create { vm, host } => {
                let host = host.map(|host| format!("hosts/{}", HOSTS[host]));
                let server = self.fleet.server();
                let name = format!("vm-{vm}");
                self.create(vm, &server, name, host.unwrap_or_default())
                    .await
            }
            Step::Twin { vm, of, after } => {
                let Some((host, name)) = self.twin_of(of, after).await? else {
                    self.refused.push(vm);
                    return Ok(Done::void());
                };
                if !self.is_up(host) {
                    self.refused.push(vm);
                    return Ok(Done::note("void: its agent is down"));
                }
                let agent = self.fleet.agent(host);
                self.create(vm, &agent, name, String::new()).await
            }
            Step::Pause(vm) | Step::Resume(vm) => {
                let Some((uid, _)) = self.ledger.vm(vm) else {
                    return Ok(Done::void());
                };
                let mut vms = self.fleet.vms(&self.fleet.server());
                let answer = if matches!(step, Step::Pause(_)) {
                    let request = v1::PauseVmRequest {
                        uid,
                        ..Default::default()
                    };
                    gives(vms.pause_vm(request).await)
                } else {
                    let request = v1::ResumeVmRequest {
                        uid,
                        ..Default::default()
                    };
                    gives(vms.resume_vm(request).await)
                };
                Ok(match answer {
                    Ok(vm) => Done::note(format!("{:?}", vm.state())),
                    Err(error) => Done::refused(&step.to_string(), &error),
                })
            }
            Step::Delete(vm) => self.delete(vm).await,
            Step::Migrate { vm, after, slow } => self.migrate(vm, after, slow).await,
            Step::MigrateAndKill {
                vm,
                after,
                victim,
                millis,
            } => self.migrate_and_kill(vm, after, victim, millis).await,
            Step::Freeze { vm, after } => self.freeze(vm, after).await,
            Step::Adopt(vm) => self.adopt(vm).await,
            Step::Cancel(vm) => self.cancel(vm).await,
            Step::ForceDelete(vm) => self.force_delete(vm).await,
            Step::Burst(_) => anyhow::bail!("a burst is carried out by its parts"),
            Step::KillVm(vm) => self.kill_vm(vm).await,
            Step::KillAgent(host) => {
                self.fleet.kill_agent(HOSTS[host]);
                Ok(Done::note("killed"))
            }
            Step::StartAgent(host) => {
                self.fleet.start_agent(HOSTS[host])?;
                Ok(Done::note("started"))
            }
            Step::RestartServer => {
                self.fleet.kill_server();
                self.fleet.start_server()?;
                Ok(Done::note("restarted"))
            }
            Step::Cordon(host) | Step::Uncordon(host) => {
                let name = format!("hosts/{}", HOSTS[host]);
                let mut hosts = self.fleet.hosts(&self.fleet.server());
                let cordon = matches!(step, Step::Cordon(_));
                let answer = if cordon {
                    gives(hosts.cordon_host(v1::CordonHostRequest { name }).await)
                } else {
                    gives(hosts.uncordon_host(v1::UncordonHostRequest { name }).await)
                };
                Ok(match answer {
                    Ok(host) if host.cordoned == cordon => Done::note("done"),
                    Ok(host) => Done {
                        note: "not done".into(),
                        broken: vec![Broken::new(Rule::Answers, host.name, host.cordoned)],
                    },
                    Err(error) => Done::refused(&step.to_string(), &error),
                })
            }
            Step::AgentTwin(host) => self.second_agent(HOSTS[host]).await,
            Step::FullAgentDisk { vm } => {
                let disk = &disks.context("no small disk")?.agent;
                disk.fill()?;
                let server = self.fleet.server();
                let host = format!("hosts/{}", HOSTS[SMALL_DISK]);
                let done = self.create(vm, &server, format!("vm-{vm}"), host).await;
                disk.free()?;
                done
            }
            Step::FullServerDisk { vm, after } => {
                let disk = &disks.context("no small disk")?.server;
                disk.fill()?;
                let done = self.migrate(vm, after, false).await;
                disk.free()?;
                done
            }
        }
    }

    fn is_up(&self, host: &str) -> bool {
        self.fleet.host_names().any(|(name, up)| name == host && up)
    }

    /// Index of the host of a VM's owner.
    async fn place(&self, uid: &str) -> anyhow::Result<Option<usize>> {
        let truth = Truth::read(&self.fleet).await?;
        let owner = truth.owner(uid).map(|owner| owner.host.clone());
        Ok(owner.and_then(|host| HOSTS.iter().position(|name| host.ends_with(name))))
    }

    /// Where a twin goes, and its name.
    async fn twin_of(
        &self,
        of: u32,
        after: usize,
    ) -> anyhow::Result<Option<(&'static str, String)>> {
        let Some((uid, name)) = self.ledger.vm(of) else {
            return Ok(None);
        };
        let place = self.place(&uid).await?;
        let id = name.strip_prefix("vms/").unwrap_or(&name).to_owned();
        Ok(place.map(|place| (HOSTS[(place + after) % HOSTS.len()], id)))
    }

    async fn create(
        &mut self,
        vm: u32,
        endpoint: &slat_proto::transport::Address,
        id: String,
        host: String,
    ) -> anyhow::Result<Done> {
        let backend = if vm.is_multiple_of(2) {
            self.backend
        } else {
            Backend::Software
        };
        let mut vms = self.fleet.vms(endpoint);
        let request = v1::CreateVmRequest {
            vm_id: id,
            spec: Some(busy(backend, VM_MIB, 1, Some(MIB / 4))),
            host,
            validate_only: false,
        };
        let made = match gives(vms.create_vm(request).await) {
            Ok(made) => made,
            Err(error) => {
                self.refused.push(vm);
                return Ok(Done::refused("create", &error));
            }
        };
        let named = (made.uid.clone(), made.name.clone());
        self.ledger.made.insert(vm, named);
        let request = v1::StartVmRequest {
            uid: made.uid.clone(),
            ..Default::default()
        };
        Ok(match gives(vms.start_vm(request).await) {
            Ok(vm) => Done::note(format!("{} {} on {}", vm.name, vm.uid, vm.host)),
            Err(error) => Done::refused("start", &error),
        })
    }

    async fn delete(&mut self, vm: u32) -> anyhow::Result<Done> {
        let Some((uid, _)) = self.ledger.vm(vm) else {
            return Ok(Done::void());
        };
        let request = v1::DeleteVmRequest {
            uid: uid.clone(),
            ..Default::default()
        };
        let mut vms = self.fleet.vms(&self.fleet.server());
        // Where it is refused the plan goes on without the VM, and the VM must go on being shown.
        Ok(match gives(vms.delete_vm(request).await) {
            Ok(_) => {
                self.ledger.made.remove(&vm);
                self.ledger.deleted.insert(uid);
                Done::note("deleted")
            }
            Err(error) => Done::refused("delete", &error),
        })
    }

    async fn migrate(&mut self, vm: u32, after: usize, slow: bool) -> anyhow::Result<Done> {
        let Some((uid, name)) = self.ledger.vm(vm) else {
            return Ok(Done::void());
        };
        let Some(place) = self.place(&uid).await? else {
            return Ok(Done::void());
        };
        let host = HOSTS[(place + after) % HOSTS.len()];
        let request = v1::CreateMigrationRequest {
            migration: Some(v1::Migration {
                vm: name,
                vm_uid: uid.clone(),
                destination: format!("hosts/{host}"),
                params: Some(if slow { paced(SLOW) } else { fast() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let answer = gives(self.fleet.migrations().create_migration(request).await);
        Ok(match answer {
            Ok(migration) => {
                let note = format!("{} to {host}", migration.name);
                self.ledger.migrations.push(Asked {
                    name: migration.name,
                    uid,
                    judged: false,
                });
                Done::note(note)
            }
            Err(error) => Done::refused("migrate", &error),
        })
    }

    async fn migrate_and_kill(
        &mut self,
        vm: u32,
        after: usize,
        victim: Victim,
        millis: u64,
    ) -> anyhow::Result<Done> {
        let Some((uid, _)) = self.ledger.vm(vm) else {
            return Ok(Done::void());
        };
        let Some(place) = self.place(&uid).await? else {
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
    async fn freeze(&mut self, vm: u32, after: usize) -> anyhow::Result<Done> {
        let Some((uid, _)) = self.ledger.vm(vm) else {
            return Ok(Done::void());
        };
        let Some(place) = self.place(&uid).await? else {
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
    async fn adopt(&mut self, vm: u32) -> anyhow::Result<Done> {
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
    async fn force_delete(&mut self, vm: u32) -> anyhow::Result<Done> {
        let Some((uid, _)) = self.ledger.vm(vm) else {
            return Ok(Done::void());
        };
        let Some(place) = self.place(&uid).await? else {
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

    async fn cancel(&mut self, vm: u32) -> anyhow::Result<Done> {
        let asked = match self.ledger.vm(vm) {
            Some((uid, _)) => self.ledger.last_of(&uid).map(|asked| asked.name.clone()),
            None => None,
        };
        let Some(name) = asked else {
            return Ok(Done::void());
        };
        let request = v1::CancelMigrationRequest { name };
        let answer = gives(self.fleet.migrations().cancel_migration(request).await);
        Ok(match answer {
            Ok(migration) => Done::note(format!("{} {:?}", migration.name, migration.phase())),
            Err(error) => Done::refused("cancel", &error),
        })
    }

    async fn kill_vm(&mut self, vm: u32) -> anyhow::Result<Done> {
        let Some((uid, _)) = self.ledger.vm(vm) else {
            return Ok(Done::void());
        };
        let Some(place) = self.place(&uid).await? else {
            return Ok(Done::void());
        };
        let dir = self.fleet.host_vms(HOSTS[place]).join(&uid);
        let Some(process) = VmProcess::behind(&dir)? else {
            return Ok(Done::void());
        };
        process.kill()?;
        Ok(Done::note(format!("killed on {}", HOSTS[place])))
    }

    /// Starts a second agent under the name of one that reports, waits until the host shows it as a
    /// contender, and ends it.
    async fn second_agent(&self, host: &'static str) -> anyhow::Result<Done> {
        let root = self.fleet.root();
        let state = root.join(format!("{host}-twin"));
        let mut args = vec!["agent".into(), "--state-dir".into(), state.clone().into()];
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
        let shown = tokio::time::timeout(PATIENCE.min(SHOWN_WITHIN), shown).await;
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

/// A call to a stopped process, and the next, end within as long.
const UNREACHABLE_WITHIN: Duration = Duration::from_secs(25);
/// A destination's process is started within as long.
const PREPARED_WITHIN: Duration = Duration::from_secs(3);
/// So that a step that hangs is told rather than waited for: no answer takes as long.
pub const STEP_WITHIN: Duration = Duration::from_secs(120);
