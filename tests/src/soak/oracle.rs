//! What is true of the fleet, whatever anybody says of it: which VM processes live (the lock of
//! their directory), what their journals say of ownership, what each process says of its own vCPUs.
//! And what the soak was told: which VMs it made and ended, which migrations it asked for.
//!
//! Reading is not one moment: a directory may go while it is read. So a truth counts only when a
//! second reading, after everybody was asked, says the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use slat_proto::{
    transport::{Address, connect},
    v1::{self, vm::State, vm_service_client::VmServiceClient},
};
use slat_record::{
    dir::VmDir,
    journal::{Journal, Ownership},
};
use tokio::time::timeout;

use crate::{fleet::Fleet, process::VmProcess};

/// How long a VM's process may take to say how it is.
const ANSWER: Duration = Duration::from_secs(5);

/// What a journal makes of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It may run the VM.
    Owner,
    /// It gave the VM away.
    Source,
    /// It receives, or never got the VM.
    Destination,
}

/// One directory of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The VM's identity.
    pub uid: String,
    /// `vms/{vm}`.
    pub name: String,
    /// `hosts/{host}`.
    pub host: String,
    /// Of its journal; 0 for a destination.
    pub epoch: u64,
    /// Of its journal.
    pub standing: Standing,
    /// Its process lives.
    pub lives: bool,
    /// As its process says; `None` when it is dead or said nothing.
    pub state: Option<State>,
    /// Stamps that its guest did not find as written.
    pub errors: u64,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Truth {
    /// By host, then directory.
    pub records: Vec<Record>,
    /// `hosts/{host}`, and whether its agent runs.
    pub hosts: BTreeMap<String, bool>,
    /// How far the clock of each is ahead, seconds; empty where all have this machine's.
    pub clocks: BTreeMap<String, i64>,
}

impl Truth {
    /// Reads the disks, and asks every VM's process.
    ///
    /// # Errors
    /// When a clock's file cannot be read.
    pub async fn read(fleet: &Fleet) -> anyhow::Result<Self> {
        let mut truth = Self::default();
        for (host, up) in fleet.host_names() {
            truth.hosts.insert(format!("hosts/{host}"), up);
            if let Some(clocks) = fleet.clocks() {
                let ahead = clocks.ahead(host)?;
                truth.clocks.insert(format!("hosts/{host}"), ahead);
            }
            let mut dirs: Vec<_> = std::fs::read_dir(fleet.host_vms(host))
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect();
            dirs.sort();
            for dir in dirs {
                truth.records.extend(record(host, &dir).await?);
            }
        }
        Ok(truth)
    }

    /// Whether a host's agent runs.
    #[must_use]
    pub fn is_up(&self, host: &str) -> bool {
        self.hosts.get(host).copied().unwrap_or(false)
    }

    /// Every directory of a uid.
    pub fn of<'a>(&'a self, uid: &'a str) -> impl Iterator<Item = &'a Record> {
        self.records.iter().filter(move |record| record.uid == uid)
    }

    /// The owner's directory, the highest epoch where there are several.
    #[must_use]
    pub fn owner(&self, uid: &str) -> Option<&Record> {
        self.records
            .iter()
            .filter(|record| record.uid == uid && record.standing == Standing::Owner)
            .max_by_key(|record| (record.epoch, record.lives))
    }

    /// Every uid that is on a disk.
    #[must_use]
    pub fn uids(&self) -> BTreeSet<&str> {
        let uids = self.records.iter().map(|record| record.uid.as_str());
        uids.collect()
    }
}

/// `None`: nothing readable is there (any more, or yet).
async fn record(host: &str, dir: &Path) -> anyhow::Result<Option<Record>> {
    let Ok(process) = VmProcess::behind(dir) else {
        // Between the lock and the pid in it.
        return Ok(None);
    };
    let dir = VmDir::new(dir);
    let Ok(Some(journal)) = Journal::read(&dir.journal()) else {
        return Ok(None);
    };
    let (standing, epoch) = match journal.ownership {
        Ownership::Owner { epoch } => (Standing::Owner, epoch),
        Ownership::Relinquished { epoch, .. } => (Standing::Source, epoch),
        Ownership::Incoming { .. } | Ownership::Prepared { .. } | Ownership::Aborted { .. } => {
            (Standing::Destination, 0)
        }
        Ownership::Ended => return Ok(None),
    };
    let said = match &process {
        Some(_) => timeout(ANSWER, ask(&dir.socket())).await.ok(),
        None => None,
    };
    let said = said.and_then(Result::ok);
    Ok(Some(Record {
        uid: journal.uid,
        name: format!("vms/{}", journal.vm),
        host: format!("hosts/{host}"),
        epoch,
        standing,
        lives: process.is_some(),
        state: said.as_ref().map(v1::Vm::state),
        errors: said
            .and_then(|vm| vm.guest_counters)
            .map_or(0, |counters| counters.errors),
    }))
}

/// The VM as its own process shows it.
async fn ask(socket: &Path) -> anyhow::Result<v1::Vm> {
    let channel = connect(&Address::Unix(socket.to_owned()))?;
    let list = VmServiceClient::new(channel)
        .list_vms(v1::ListVmsRequest::default())
        .await?
        .into_inner();
    list.vms.into_iter().next().context("a collection of one")
}

/// A migration that the soak asked for and that was accepted.
#[derive(Clone, Debug)]
pub struct Asked {
    /// `migrations/{migration}`.
    pub name: String,
    /// Of its VM.
    pub uid: String,
    /// Its end was seen and judged.
    pub judged: bool,
}

/// What the soak did and was told.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Uid and name of each VM that was made, by its number in the plan.
    pub made: BTreeMap<u32, (String, String)>,
    /// When each was asked for and answered, nanoseconds since 1970, by uid.
    pub born: BTreeMap<String, (i128, i128)>,
    /// Uids whose deletion was confirmed.
    pub deleted: BTreeSet<String>,
    /// In the order they were asked for.
    pub migrations: Vec<Asked>,
    /// Uids that were shown while their host reported.
    pub shown: BTreeSet<String>,
}

impl Ledger {
    /// Uid and name of a VM that was made and not deleted.
    #[must_use]
    pub fn vm(&self, vm: u32) -> Option<(String, String)> {
        self.made.get(&vm).cloned()
    }

    /// The last migration of a VM.
    #[must_use]
    pub fn last_of(&self, uid: &str) -> Option<&Asked> {
        self.migrations.iter().rev().find(|asked| asked.uid == uid)
    }
}
