//! The client of an endpoint: a server, an agent or one VM's socket. All serve the same API.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use slat_proto::{
    model::HostName,
    transport::{Address, Link, TracedChannel, connect_by},
    v1::{
        host_service_client::HostServiceClient, memory_service_client::MemoryServiceClient,
        migration_service_client::MigrationServiceClient,
        paging_service_client::PagingServiceClient, snapshot_service_client::SnapshotServiceClient,
        vm_service_client::VmServiceClient,
    },
};

use serde_json::Value;
use slat_trust::{Credentials, Expects, Kind};

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
    /// The host whose agent is asked there in place of a server, as host-a: nobody else's
    /// certificate is taken
    #[arg(long, env = "SLAT_AGENT", value_name = "HOST", global = true)]
    pub(crate) agent: Option<HostName>,
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
    /// Directory with your certificate (tls.crt, tls.key, ca.crt), as ~/certs [default:
    /// slat/tls in the XDG configuration directory, if it is there]
    #[arg(long, env = "SLAT_TLS_DIR", value_name = "DIR", global = true)]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Speak without TLS, beyond this machine, too
    #[arg(long, env = "SLAT_INSECURE_PLAINTEXT", global = true)]
    pub(crate) insecure_plaintext: bool,
}

impl ClientArgs {
    /// How the endpoint is spoken to: by the certificate that was named, or the default one. In the
    /// clear on this machine, where there is none, and elsewhere when that was asked for.
    fn link(&self) -> Result<Link, Failure> {
        let link = self.any_link()?;
        match &self.agent {
            Some(agent) if matches!(link, Link::Plain) => Err(Failure::value(
                format!(
                    "{} is spoken to without TLS, so whether it is the agent of {} cannot be known",
                    self.server,
                    agent.id()
                ),
                "leave --agent (SLAT_AGENT) out, or say where your certificate is with --tls-dir",
            )),
            _ => Ok(link),
        }
    }

    /// Whose certificate is taken. The server's alone unless an agent was named: whoever has broken
    /// into one host has a certificate, and must not pass for the server with it.
    fn expects(&self) -> Expects {
        match &self.agent {
            Some(agent) => Expects::Named(Kind::Agent, agent.id().to_owned()),
            None => Expects::Kinds(&[Kind::Server]),
        }
    }

    fn any_link(&self) -> Result<Link, Failure> {
        let Address::Tcp(host) = &self.server else {
            return Ok(Link::Plain);
        };
        if self.insecure_plaintext && self.tls_dir.is_none() {
            return Ok(Link::Plain);
        }
        let dir = self.tls_dir.clone().or_else(own_certificate);
        if let Some(dir) = dir {
            let credentials = Credentials::load(&dir)
                .map_err(|error| Failure::advised(error.to_string(), error.advice()))?;
            return Ok(Link::Tls {
                credentials,
                expects: self.expects(),
            });
        }
        if is_here(host) {
            return Ok(Link::Plain);
        }
        Err(Failure::value(
            format!("there is no certificate to show to {host}"),
            "say where one is with --tls-dir (slat pki issue user NAME makes one), or, on a network \
             you trust, add --insecure-plaintext",
        ))
    }
}

/// Where a user's own certificate is, whether or not there is one.
pub(crate) fn own_certificate_dir() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let base = variable("XDG_CONFIG_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| Some(variable("HOME")?.join(".config")))?;
    Some(base.join("slat").join("tls"))
}

fn own_certificate() -> Option<PathBuf> {
    own_certificate_dir().filter(|dir| dir.join("tls.crt").exists())
}

/// Whether an address is of this machine by itself, whatever names resolve to.
fn is_here(host: &str) -> bool {
    let Some((host, _)) = host.rsplit_once(':') else {
        return false;
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A client of one endpoint, connected at the first call.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    channel: TracedChannel,
}

impl Client {
    /// Of the endpoint at `address`.
    pub(crate) fn new(address: &Address, link: &Link) -> Result<Self, Failure> {
        Ok(Self {
            channel: connect_by(address, link)?.with_margin(MARGIN),
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
            client: Client::new(&args.server, &args.link()?)?,
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
