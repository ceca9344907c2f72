//! VMs: made, waited for, looked at.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use slat_proto::{
    ApiError,
    transport::Address,
    v1::{self},
};
use tokio::time::{Instant, timeout_at};
use tokio_stream::StreamExt as _;

use super::{Fleet, list};
use crate::wait::{PATIENCE, eventually};

/// Before a broken watch is opened again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl Fleet {
    /// One VM as an endpoint shows it.
    ///
    /// # Errors
    /// What the endpoint answers.
    pub async fn vm(&self, endpoint: &Address, name: &str) -> Result<v1::Vm, ApiError> {
        let request = v1::GetVmRequest {
            name: name.into(),
            ..Default::default()
        };
        Ok(self.vms(endpoint).get_vm(request).await?.into_inner())
    }

    /// Creates and starts a VM through the server, which chooses where `host` is empty; returns
    /// when its guest has written something (an idle one: when it runs).
    ///
    /// # Errors
    /// What the server answers.
    pub async fn run_vm(&self, id: &str, host: &str, spec: v1::VmSpec) -> anyhow::Result<v1::Vm> {
        let idle = matches!(&spec.guest, Some(v1::vm_spec::Guest::Memstress(memstress))
            if memstress.dirty_rate_bytes_per_second == Some(0));
        let mut client = self.vms(&self.server());
        let vm = client
            .create_vm(v1::CreateVmRequest {
                vm_id: id.into(),
                spec: Some(spec),
                host: match host {
                    "" => String::new(),
                    host => format!("hosts/{host}"),
                },
                validate_only: false,
            })
            .await?
            .into_inner();
        client
            .start_vm(v1::StartVmRequest {
                name: vm.name.clone(),
                ..Default::default()
            })
            .await?;
        self.vm_until(&self.server(), &vm.name, "it runs and writes", |vm| {
            vm.state() == v1::vm::State::Running && (idle || pages_written(vm) > 0)
        })
        .await
    }

    /// Watches a VM at an endpoint until `found`; watches again when the stream breaks.
    ///
    /// # Errors
    /// When it is not found in time, with the VM as last seen.
    pub async fn vm_until(
        &self,
        endpoint: &Address,
        name: &str,
        what: &str,
        mut found: impl FnMut(&v1::Vm) -> bool,
    ) -> anyhow::Result<v1::Vm> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = String::from("nothing");
        let watch = async {
            loop {
                let request = v1::WatchVmRequest {
                    name: name.into(),
                    ..Default::default()
                };
                match self.vms(endpoint).watch_vm(request).await {
                    Ok(stream) => {
                        let mut stream = stream.into_inner();
                        while let Some(Ok(vm)) = stream.next().await {
                            if found(&vm) {
                                return vm;
                            }
                            last = format!("{vm:#?}");
                        }
                    }
                    Err(status) => last = format!("{status:?}"),
                }
                // The stream of a VM that moves away ends; it can be watched again where it went.
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        match timeout_at(deadline, watch).await {
            Ok(vm) => Ok(vm),
            Err(_) => bail!(
                "{name} at {endpoint}: after {} s still not: {what}: {last}",
                PATIENCE.as_secs()
            ),
        }
    }

    /// Proves that the guest runs on `host` and is sound: the VM is RUNNING there without a
    /// migration or dirty logging, its guest writes on from where it is now, and has found no
    /// error.
    ///
    /// # Errors
    /// When one of these is not so.
    pub async fn runs_soundly_on(&self, vm: &str, host: &str) -> anyhow::Result<v1::Vm> {
        let home = format!("hosts/{host}");
        let now = self
            .vm_until(
                &self.server(),
                vm,
                &format!("RUNNING on {host}, quiet"),
                |vm| {
                    vm.state() == v1::vm::State::Running
                        && vm.host == home
                        && vm.migration.is_empty()
                        && !vm.dirty_logging
                },
            )
            .await?;
        let before = pages_written(&now);
        let after = self
            .vm_until(&self.server(), vm, "the guest writes on", |vm| {
                pages_written(vm) > before + 100
            })
            .await?;
        let counters = after.guest_counters.context("no guest counters")?;
        ensure!(counters.errors == 0, "the guest found errors: {after:#?}");
        ensure!(after.host == home, "{after:#?}");
        Ok(after)
    }

    /// Waits until a host's VM directory is gone.
    ///
    /// # Errors
    /// When it stays.
    pub async fn vm_dir_gone(&self, host: &str, vm: &str) -> anyhow::Result<()> {
        eventually(&format!("{vm} is gone from {host}"), || async {
            let dir = self.vm_dir(host, vm);
            ensure!(!dir.exists(), "{:?}", list(&dir));
            Ok(())
        })
        .await
    }

    /// Waits until an agent and the server agree that VMs take `bytes` of a host's memory.
    ///
    /// # Errors
    /// When they do not.
    pub async fn memory_used(&self, host: &str, bytes: u64) -> anyhow::Result<()> {
        for endpoint in [self.agent(host), self.server()] {
            eventually(
                &format!("{bytes} bytes of {host} used, at {endpoint}"),
                || async {
                    let request = v1::GetHostRequest {
                        name: format!("hosts/{host}"),
                    };
                    let host = self.hosts(&endpoint).get_host(request).await?.into_inner();
                    ensure!(host.memory_used_bytes == bytes, "{host:?}");
                    Ok(())
                },
            )
            .await?;
        }
        Ok(())
    }
}

fn pages_written(vm: &v1::Vm) -> u64 {
    vm.guest_counters
        .map_or(0, |counters| counters.pages_written)
}
