//! Saves, restored VMs and forks.

use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use slat_proto::{
    transport::{Address, TracedChannel},
    v1::{
        self, paging_service_client::PagingServiceClient, save::State,
        snapshot_service_client::SnapshotServiceClient,
    },
};
use tokio_stream::StreamExt as _;

use super::{Fleet, list};

impl Fleet {
    /// Saves, restores and forks behind an endpoint.
    #[must_use]
    pub fn snapshots(&self, endpoint: &Address) -> SnapshotServiceClient<TracedChannel> {
        SnapshotServiceClient::new(self.channel(endpoint))
    }

    /// Paging behind an endpoint.
    #[must_use]
    pub fn paging(&self, endpoint: &Address) -> PagingServiceClient<TracedChannel> {
        PagingServiceClient::new(self.channel(endpoint))
    }

    /// Begins to save a VM.
    ///
    /// # Errors
    /// What the server answers.
    pub async fn begin_save(&self, vm: &str, save: &str, base: &str) -> anyhow::Result<v1::Save> {
        let request = v1::CreateSaveRequest {
            vm: vm.into(),
            save_id: save.into(),
            base: base.into(),
            ..Default::default()
        };
        let mut client = self.snapshots(&self.server());
        Ok(client.create_save(request).await?.into_inner())
    }

    /// A save when it is written or failed.
    ///
    /// # Errors
    /// What the server answers, or when the watch ends before.
    pub async fn save_ends(&self, name: &str) -> anyhow::Result<v1::Save> {
        let request = v1::WatchSaveRequest { name: name.into() };
        let mut client = self.snapshots(&self.server());
        let mut watch = client.watch_save(request).await?.into_inner();
        while let Some(save) = watch.next().await {
            let save = save?;
            if matches!(save.state(), State::Written | State::Failed) {
                return Ok(save);
            }
        }
        bail!("the watch of {name} ended and it had not");
    }

    /// Saves a VM, until the file is whole.
    ///
    /// # Errors
    /// What the server answers, or why it failed.
    pub async fn save(&self, vm: &str, save: &str) -> anyhow::Result<v1::Save> {
        self.save_on(vm, save, "").await
    }

    /// The same, built on another save.
    ///
    /// # Errors
    /// As [`Fleet::save`].
    pub async fn save_on(&self, vm: &str, save: &str, base: &str) -> anyhow::Result<v1::Save> {
        let begun = self.begin_save(vm, save, base).await?;
        let save = self.save_ends(&begun.name).await?;
        ensure!(save.state() == State::Written, "{save:#?}");
        Ok(save)
    }

    /// A new, running VM from a save.
    ///
    /// # Errors
    /// What the server answers.
    pub async fn restore(&self, save: &str, vm: &str, lazy: bool) -> anyhow::Result<v1::Vm> {
        let request = v1::RestoreVmRequest {
            save: save.into(),
            vm_id: vm.into(),
            lazy,
            start: true,
            ..Default::default()
        };
        let mut client = self.snapshots(&self.server());
        let answer = client.restore_vm(request).await?.into_inner();
        answer.vm.context("an answer without a VM")
    }

    /// Copies of a VM.
    ///
    /// # Errors
    /// What the server answers.
    pub async fn fork(&self, vm: &str, children: &[&str]) -> anyhow::Result<v1::ForkVmResponse> {
        let request = v1::ForkVmRequest {
            vm: vm.into(),
            vm_ids: children.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let mut client = self.snapshots(&self.server());
        Ok(client.fork_vm(request).await?.into_inner())
    }

    /// What a host keeps saves in.
    #[must_use]
    pub fn saves_dir(&self, host: &str) -> PathBuf {
        self.host(host).state.join("saves")
    }

    /// Names of the files that a host keeps saves in.
    #[must_use]
    pub fn save_files(&self, host: &str) -> Vec<String> {
        let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into());
        list(&self.saves_dir(host))
            .into_iter()
            .filter_map(name)
            .collect()
    }
}
