//! The client of an endpoint: a server, an agent or one VM's socket. All serve the same API.

use std::time::Duration;

use slat_proto::{
    transport::{Address, TracedChannel, connect},
    v1::{
        host_service_client::HostServiceClient, memory_service_client::MemoryServiceClient,
        migration_service_client::MigrationServiceClient,
        paging_service_client::PagingServiceClient, snapshot_service_client::SnapshotServiceClient,
        vm_service_client::VmServiceClient,
    },
};

use serde_json::Value;

use crate::{
    failure::Failure,
    output::{self, Format},
};

/// How much longer than its call a command waits: a server that waits for an agent says so first.
const MARGIN: Duration = Duration::from_secs(5);

/// Options every client command takes.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ClientArgs {
    /// Endpoint to ask: a server, an agent or a VM's socket, as 192.0.2.1:7400 or unix:/run/vm.sock
    #[arg(
        long,
        env = "SLAT_SERVER",
        default_value = "127.0.0.1:7400",
        value_name = "ADDR",
        global = true
    )]
    pub(crate) server: Address,
    /// How to print the answer; under json and yaml errors are JSON, too
    #[arg(
        short,
        long,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        global = true
    )]
    pub(crate) output: Format,
}

/// A client of one endpoint, connected at the first call.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    channel: TracedChannel,
}

impl Client {
    /// Of the endpoint at `address`.
    pub(crate) fn new(address: &Address) -> Result<Self, Failure> {
        Ok(Self {
            channel: connect(address)?.with_margin(MARGIN),
        })
    }

    /// Virtual machines.
    pub(crate) fn vms(&self) -> VmServiceClient<TracedChannel> {
        VmServiceClient::new(self.channel.clone())
    }

    /// Their memory.
    pub(crate) fn memory(&self) -> MemoryServiceClient<TracedChannel> {
        MemoryServiceClient::new(self.channel.clone())
    }

    /// Hosts.
    pub(crate) fn hosts(&self) -> HostServiceClient<TracedChannel> {
        HostServiceClient::new(self.channel.clone())
    }

    /// Saves, restores and forks.
    pub(crate) fn snapshots(&self) -> SnapshotServiceClient<TracedChannel> {
        SnapshotServiceClient::new(self.channel.clone())
    }

    /// Guests that are paged by the Common MMU.
    pub(crate) fn pagings(&self) -> PagingServiceClient<TracedChannel> {
        PagingServiceClient::new(self.channel.clone())
    }

    /// Migrations.
    pub(crate) fn migrations(&self) -> MigrationServiceClient<TracedChannel> {
        MigrationServiceClient::new(self.channel.clone())
    }
}

/// What a client command works with.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    /// The endpoint to ask.
    pub(crate) client: Client,
    /// Its address.
    pub(crate) endpoint: Address,
    /// How to print.
    pub(crate) output: Format,
}

impl Session {
    /// As the options say.
    pub(crate) fn open(args: &ClientArgs) -> Result<Self, Failure> {
        Ok(Self {
            client: Client::new(&args.server)?,
            endpoint: args.server.clone(),
            output: args.output,
        })
    }

    /// Prints one answer: its JSON or YAML, `name` under `-o name`, else `text`.
    pub(crate) fn answer(
        &self,
        json: impl FnOnce() -> Value,
        name: &str,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        output::answer(self.output, json, name, text)
    }
}
