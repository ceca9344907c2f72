//! Carries steps out, on real processes, as an operator or an accident would.
//!
//! A step that cannot be done any more (its VM was never made, or died) is void. A refusal is an
//! answer like any other, if its reason is one that somebody can act upon.

mod accident;

use std::time::Duration;

use anyhow::Context as _;
use slat_proto::{
    ApiError, Reason,
    model::{now, timestamp_nanos},
    v1::{self, Backend},
};

use super::{
    judge::{Broken, Rule},
    oracle::{Asked, Ledger, Truth},
    plan::{HOSTS, SMALL_DISK, Step},
};
use crate::{
    disk::SmallDisk,
    fleet::Fleet,
    guest::{MIB, busy, fast, paced},
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
            Step::SetClock { host, ahead } => {
                let clocks = self.fleet.clocks().context("no clocks")?;
                clocks.set(HOSTS[host], ahead)?;
                Ok(Done::note("set"))
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

    /// Uid of a VM that was made, and index of its owner's host.
    async fn placed(&self, vm: u32) -> anyhow::Result<Option<(String, usize)>> {
        let Some((uid, _)) = self.ledger.vm(vm) else {
            return Ok(None);
        };
        Ok(self.place(&uid).await?.map(|place| (uid, place)))
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
        let asked = timestamp_nanos(&now());
        let made = match gives(vms.create_vm(request).await) {
            Ok(made) => made,
            Err(error) => {
                self.refused.push(vm);
                return Ok(Done::refused("create", &error));
            }
        };
        let named = (made.uid.clone(), made.name.clone());
        self.ledger.made.insert(vm, named);
        let answered = timestamp_nanos(&now());
        self.ledger.born.insert(made.uid.clone(), (asked, answered));
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
}

/// So that a step that hangs is told rather than waited for: no answer takes as long.
pub const STEP_WITHIN: Duration = Duration::from_secs(120);
