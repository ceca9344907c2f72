//! What happens in the demo, step by step. Findings go to the report, checks with them; an error
//! ends the script, and the caller cleans up.

use std::time::Duration;

use slat_proto::{
    ApiError, Reason,
    model::{HostName, MigrationParams, PAGE_SIZE, VmName, VmSpec, proto_duration},
    v1,
};
use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use super::{
    args::DemoArgs,
    fleet::{Fleet, HOSTS, VM},
    observer::Observer,
    report::Report,
};
use crate::{
    client::Client,
    command::{follow::follow, patience::Patience},
    daemon::memory,
    failure::Failure,
    term::{
        out,
        units::{Rate, Size},
    },
    view::{self, Progress},
};

/// Agents must be ready at the server within this time.
const READY: Duration = Duration::from_secs(30);
/// The guest must be seen to write within this time.
const WRITES: Duration = Duration::from_secs(30);
/// A guest that goes round its memory in less than half of this is waited for.
const ROUND: Duration = Duration::from_secs(60);
/// Of one migration.
const MAX_TOTAL: Duration = Duration::from_secs(900);
/// Memory beyond the two copies that the daemons need.
const OVERHEAD: u64 = 256 << 20;

/// The VM, checked.
pub(super) fn spec(args: &DemoArgs) -> Result<v1::VmSpec, Failure> {
    let spec = v1::VmSpec {
        memory_bytes: args.memory.0,
        vcpus: args.vcpus,
        backend: args.backend.to_message().into(),
        format: args.format.map_or(0, |format| format.to_message().into()),
        dirty_engine: 0,
        backing: 0,
        numa_node: None,
        prefault: false,
        paging: 0,
        guest: Some(v1::vm_spec::Guest::Memstress(v1::Memstress {
            dirty_rate_bytes_per_second: Some(args.dirty_rate.0),
            // Every page has contents, so that every page must really arrive.
            fill: v1::memstress::Fill::Random.into(),
            ..Default::default()
        })),
        labels: Default::default(),
    };
    VmSpec::from_message(&spec)?;
    Ok(spec)
}

/// The migrations' parameters, checked.
pub(super) fn params(args: &DemoArgs) -> Result<v1::MigrationParams, Failure> {
    let params = v1::MigrationParams {
        max_downtime: Some(proto_duration(args.max_downtime.0)),
        max_total_time: Some(proto_duration(MAX_TOTAL)),
        streams: args.streams,
        verify: v1::migration_params::Verify::AfterCommit.into(),
        ..Default::default()
    };
    MigrationParams::from_message(Some(&params))?;
    Ok(params)
}

/// What the steps share.
struct Stage<'a> {
    args: &'a DemoArgs,
    client: Client,
    observer: Observer,
    vm: VmName,
}

/// Plays everything up to the last check; the fleet stays up.
pub(super) async fn play(
    args: &DemoArgs,
    fleet: &mut Fleet,
    report: &mut Report,
) -> Result<(), Failure> {
    enough_memory(args)?;
    out::say("starting a server and two agents on loopback");
    // The old host's copy may still be going away while the VM comes back, so a third must fit.
    let memory = args.memory.0.saturating_mul(3);
    fleet.start(memory).await?;
    let vm = VmName::from_id(VM)?;
    let stage = Stage {
        args,
        client: server(fleet)?,
        observer: observer(fleet, &vm),
        vm,
    };
    let host = stage.hosts_ready().await?;
    let vm = stage.create(&host).await?;
    report.built(&vm, &host);
    let result = stage.perform(report).await;
    report.mmu(stage.observer.sums());
    result
}

/// How long the guest takes for one round over its memory; `None` for one that is not waited for.
fn round_time(args: &DemoArgs) -> Option<Duration> {
    let rate = args.dirty_rate.0;
    let seconds = args.memory.0.checked_div(rate)?;
    Some(Duration::from_secs(seconds)).filter(|time| *time <= ROUND / 2)
}

/// A client of the demo's server.
pub(super) fn server(fleet: &Fleet) -> Result<Client, Failure> {
    let address = fleet.address();
    let address = address.ok_or_else(|| Failure::local("the server is not running"))?;
    fleet.client(address)
}

fn observer(fleet: &Fleet, vm: &VmName) -> Observer {
    let agents = fleet.agents().into_iter();
    let clients = agents.filter_map(|(_, address)| fleet.client(address).ok());
    Observer::start(clients.collect(), vm.to_string())
}

/// Both hosts are this machine: memory for two copies must be there.
fn enough_memory(args: &DemoArgs) -> Result<(), Failure> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let needed = args.memory.0.saturating_mul(2).saturating_add(OVERHEAD);
    match memory::available(&meminfo) {
        Some(available) if available < needed => Err(Failure::advised(
            format!(
                "two copies of {} need {} of memory, and {} is available",
                args.memory,
                Size(needed),
                Size(available)
            ),
            "take less with --memory",
        )),
        _ => Ok(()),
    }
}

impl Stage<'_> {
    /// Waits until the server shows both hosts as ready; returns the first.
    async fn hosts_ready(&self) -> Result<v1::Host, Failure> {
        let deadline = Instant::now() + READY;
        loop {
            let list = self
                .client
                .hosts()
                .list_hosts(v1::ListHostsRequest::default())
                .await
                .map_err(|status| Failure::call("list the demo's hosts", status))?
                .into_inner();
            let ready: Vec<v1::Host> = list
                .hosts
                .into_iter()
                .filter(|host| host.state() == v1::host::State::Ready)
                .collect();
            if ready.len() == HOSTS.len() {
                let first = ready
                    .into_iter()
                    .find(|host| view::id(&host.name) == HOSTS[0]);
                return first.ok_or_else(|| Failure::local("the server knows other hosts"));
            }
            if Instant::now() > deadline {
                return Err(Failure::local(format!(
                    "only {} of {} hosts were ready after {} s",
                    ready.len(),
                    HOSTS.len(),
                    READY.as_secs()
                )));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn create(&self, host: &v1::Host) -> Result<v1::Vm, Failure> {
        let request = v1::CreateVmRequest {
            vm_id: self.vm.id().to_owned(),
            spec: Some(spec(self.args)?),
            host: host.name.clone(),
            validate_only: false,
        };
        let vm = self
            .client
            .vms()
            .create_vm(request)
            .await
            .map_err(|status| Failure::call("create the demo's VM", status))?
            .into_inner();
        let spec = vm.spec.clone().unwrap_or_default();
        out::say(format!(
            "created {} on {}: {}, {} vCPU, backend {}",
            vm.name,
            view::id(&vm.host),
            Size(spec.memory_bytes),
            spec.vcpus,
            view::backend(&spec)
        ));
        if spec.backend() == v1::Backend::Software && !host.backend_message.is_empty() {
            out::say(format!("  {}", host.backend_message));
        }
        Ok(vm)
    }

    /// The life of the VM.
    async fn perform(&self, report: &mut Report) -> Result<(), Failure> {
        self.start().await?;
        let mut counters = self.progress(HOSTS[0], None, report).await?;
        out::say(format!("the guest writes {}", Rate(self.args.dirty_rate.0)));
        let mut at = 0;
        for number in 1..=self.args.migrations {
            let (source, destination) = (HOSTS[at], HOSTS[1 - at]);
            let name = format!("live-{number}");
            self.migrate(&name, source, destination, report).await?;
            at = 1 - at;
            counters = self.progress(HOSTS[at], counters, report).await?;
        }
        self.paused(at, counters, report).await
    }

    /// Paused, memory cannot change: its digest before and after a migration must be the same.
    async fn paused(
        &self,
        at: usize,
        counters: Option<v1::GuestCounters>,
        report: &mut Report,
    ) -> Result<(), Failure> {
        let request = v1::PauseVmRequest {
            name: self.vm.to_string(),
            ..Default::default()
        };
        let paused = self.client.vms().pause_vm(request).await;
        let paused = paused
            .map_err(|status| Failure::call(format!("pause {}", self.vm), status))?
            .into_inner();
        let frozen = paused.guest_counters.or(counters);
        let before = self.digest().await?;
        self.migrate("paused", HOSTS[at], HOSTS[1 - at], report)
            .await?;
        let after = self.digest().await?;
        report.digests(before == after);
        report.check(
            "the paused VM's memory digest is the same on both hosts",
            before == after,
            format!("{before} before, {after} after"),
        );
        let request = v1::ResumeVmRequest {
            name: self.vm.to_string(),
            ..Default::default()
        };
        let resumed = self.client.vms().resume_vm(request).await;
        resumed.map_err(|status| Failure::call(format!("resume {}", self.vm), status))?;
        let counters = self.progress(HOSTS[1 - at], frozen, report).await?;
        self.round(counters, report).await
    }

    /// Waits until the guest has written every page once, where that can be waited for.
    async fn round(
        &self,
        counters: Option<v1::GuestCounters>,
        report: &mut Report,
    ) -> Result<(), Failure> {
        let Some(counters) = counters.filter(|_| round_time(self.args).is_some()) else {
            return Ok(());
        };
        let gone_round = |vm: &v1::Vm| vm.guest_counters.is_some_and(|now| now.passes > 0);
        let mut last = counters;
        if last.passes == 0 {
            let left = last.pages.saturating_sub(last.pages_written);
            out::say(format!(
                "the guest goes round its memory; {} are left of its first round",
                Size(left.saturating_mul(PAGE_SIZE))
            ));
            // When it takes too long, the check below says so.
            if let Ok(vm) = tokio::time::timeout(ROUND, self.watch_until(gone_round)).await {
                last = vm?.guest_counters.unwrap_or(last);
            }
        }
        report.guest(&last);
        report.check(
            "the guest went round its whole memory at least once",
            last.passes > 0,
            format!("{} of {} pages written", last.pages_written, last.pages),
        );
        report.check(
            "every page that the guest read back on its rounds was what it had written",
            last.errors == 0,
            format!("{} mismatches", last.errors),
        );
        Ok(())
    }

    async fn start(&self) -> Result<(), Failure> {
        let request = v1::StartVmRequest {
            name: self.vm.to_string(),
            ..Default::default()
        };
        let started = self.client.vms().start_vm(request).await;
        started
            .map(drop)
            .map_err(|status| Failure::call(format!("start {}", self.vm), status))
    }

    async fn digest(&self) -> Result<String, Failure> {
        let request = v1::DigestMemoryRequest {
            vm: self.vm.to_string(),
            ..Default::default()
        };
        let digest = self.client.memory().digest_memory(request).await;
        digest
            .map(|digest| digest.into_inner().digest)
            .map_err(|status| Failure::call(format!("digest the memory of {}", self.vm), status))
    }

    /// Moves the VM and notes what came of it. A migration that did not complete ends the script.
    async fn migrate(
        &self,
        id: &str,
        source: &str,
        destination: &str,
        report: &mut Report,
    ) -> Result<(), Failure> {
        let migration = move_vm(self.args, &self.client, &self.vm, id, source, destination).await?;
        let progress = migration.progress.clone().unwrap_or_default();
        let completed = migration.phase() == v1::MigrationPhase::Completed;
        report.migrated(&migration);
        report.check(
            format!("{id} completed"),
            completed,
            migration.error.as_ref().map_or_else(String::new, |error| {
                format!("{}: {}", error.reason, error.message)
            }),
        );
        if !completed {
            let error = migration.error.unwrap_or_default();
            let reason = Reason::parse(&error.reason).unwrap_or(Reason::Internal);
            let error = ApiError {
                reason,
                message: error.message,
                metadata: error.metadata.into_iter().collect(),
            };
            return Err(Failure::api(
                format!("migrate {} to {destination}", self.vm),
                error,
            ));
        }
        report.check(
            format!("{id}: source and destination hold the same memory"),
            progress.verification() == v1::Verification::Match,
            view::verification(progress.verification()),
        );
        Ok(())
    }

    /// Waits until the guest has written more than `since` on `host`, and checks what it counted.
    /// `None` for a guest that counts nothing.
    async fn progress(
        &self,
        host: &str,
        since: Option<v1::GuestCounters>,
        report: &mut Report,
    ) -> Result<Option<v1::GuestCounters>, Failure> {
        let before = since.map_or(0, |counters| counters.pages_written);
        // A tenth of a second's worth, so that more than a straggling write is seen; an idle guest
        // writes nothing.
        let wanted = match self.args.dirty_rate.0 {
            0 => 0,
            rate => (rate / PAGE_SIZE / 10).max(1),
        };
        let enough = |vm: &v1::Vm| {
            let written = vm
                .guest_counters
                .map_or(0, |counters| counters.pages_written);
            view::id(&vm.host) == host
                && vm.state() == v1::vm::State::Running
                && written >= before.saturating_add(wanted)
        };
        let seen = tokio::time::timeout(WRITES, self.watch_until(enough)).await;
        let place = format!("the guest goes on writing on {host}");
        let Ok(vm) = seen else {
            let now = self.look().await;
            report.check(place, false, now.clone());
            return Err(Failure::local(format!(
                "{} did not write {wanted} pages on {host} within {} s: {now}",
                self.vm,
                WRITES.as_secs()
            )));
        };
        let vm = vm?;
        report.check(place, true, "");
        if let Some(counters) = &vm.guest_counters {
            report.guest(counters);
            report.check(
                format!("every page the guest read back on {host} was what it had written"),
                counters.errors == 0,
                format!(
                    "{} mismatches, the first at page {}",
                    counters.errors, counters.first_error_page
                ),
            );
        }
        Ok(vm.guest_counters)
    }

    /// Follows the VM until it is as wanted; streams that end are opened again.
    async fn watch_until(&self, wanted: impl Fn(&v1::Vm) -> bool) -> Result<v1::Vm, Failure> {
        loop {
            let request = v1::WatchVmRequest {
                name: self.vm.to_string(),
                ..Default::default()
            };
            let stream = self.client.vms().watch_vm(request).await;
            let mut stream = stream
                .map_err(|status| Failure::call(format!("watch {}", self.vm), status))?
                .into_inner();
            while let Some(Ok(vm)) = stream.next().await {
                self.observer.note(&vm);
                if wanted(&vm) {
                    return Ok(vm);
                }
                if vm.state() == v1::vm::State::Failed || vm.state() == v1::vm::State::Lost {
                    return Err(Failure::local(format!(
                        "{} is {}: {}",
                        self.vm,
                        view::vm_state(vm.state()),
                        vm.state_message
                    )));
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The VM in a few words, for a failure.
    async fn look(&self) -> String {
        let request = v1::GetVmRequest {
            name: self.vm.to_string(),
            ..Default::default()
        };
        match self.client.vms().get_vm(request).await {
            Ok(vm) => {
                let vm = vm.into_inner();
                format!(
                    "it is {} on {}, {} pages written",
                    view::vm_state(vm.state()),
                    view::id(&vm.host),
                    vm.guest_counters
                        .map_or(0, |counters| counters.pages_written)
                )
            }
            Err(status) => format!("it cannot be looked at: {}", status.message()),
        }
    }
}

/// Moves the VM, showing progress, until the migration has ended one way or the other.
pub(super) async fn move_vm(
    args: &DemoArgs,
    client: &Client,
    vm: &VmName,
    id: &str,
    source: &str,
    destination: &str,
) -> Result<v1::Migration, Failure> {
    let request = v1::CreateMigrationRequest {
        migration: Some(v1::Migration {
            vm: vm.to_string(),
            destination: HostName::from_id(destination)?.to_string(),
            params: Some(params(args)?),
            ..Default::default()
        }),
        migration_id: id.to_owned(),
        validate_only: false,
    };
    let created = client.migrations().create_migration(request).await;
    let created = created
        .map_err(|status| Failure::call(format!("migrate {vm} to {destination}"), status))?
        .into_inner();
    let mut progress = Progress::new(format!("{id} {source} -> {destination}"));
    let migration = follow(client, &created.name, Patience::default(), |migration| {
        progress.update(migration);
        Ok(())
    })
    .await?;
    progress.finish();
    let figures = migration.progress.clone().unwrap_or_default();
    out::say(format!(
        "{id} {source} -> {destination}: {}, downtime {}, {} iterations, {} in {}",
        view::phase(migration.phase()),
        view::span(figures.downtime.as_ref()),
        view::iterations(&figures).unwrap_or(0),
        Size(figures.bytes_transferred),
        view::span(migration.total_time.as_ref()),
    ));
    Ok(migration)
}

#[cfg(test)]
mod tests {
    use super::{super::args::parsed, *};

    #[test]
    fn the_default_guest_is_waited_for_until_it_has_gone_round() {
        assert_eq!(round_time(&parsed("")), Some(Duration::from_secs(8)));
        assert_eq!(round_time(&parsed("--dirty-rate 0")), None, "idle");
        assert_eq!(round_time(&parsed("--dirty-rate 1MiB/s")), None, "minutes");
    }
}
