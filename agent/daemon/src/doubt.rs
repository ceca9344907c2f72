//! A destination in doubt: its source's agent is asked how the source stands.
//!
//! The VM's process has no way to another host's agent where endpoints ask for certificates, so
//! its own agent asks in its place, showing the grant that the VM was received with, and passes the
//! answer on. It decides nothing: what the source's journal says is what ends the doubt. What is
//! needed to ask is kept in the VM's directory from before its process is prepared until the side
//! is released, so that an agent that starts meanwhile can go on asking.

use std::{
    fs::File,
    io::{self, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use prost::Message as _;
use slat_proto::{
    transport::{Address, Link, connect_by},
    v1::{
        self, TransferPhase as Phase, resolve_transfer_request::Decision,
        transfer_service_client::TransferServiceClient,
    },
};
use slat_record::dir::VmDir;
use slat_trust::{Credentials, Expects, Kind, grant::Grant};
use tokio::time::{Instant, sleep, timeout};

use super::{
    living::{LiveVm, QUICK},
    side::{SideKey, is_terminal},
};

/// A side that is READY for so long is in doubt: the source's word comes within milliseconds else.
const DOUBT: Duration = Duration::from_secs(2);
/// How often it is looked at, and the source's agent asked.
const EVERY: Duration = Duration::from_secs(1);
/// How long that may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

fn path(dir: &VmDir, key: &SideKey) -> PathBuf {
    dir.path()
        .join(format!("received-{}.pb", key.migration.id()))
}

/// Keeps what is needed to ask: of a request, the migration, the source's agent and the grant.
/// Returns when it is durable. Blocks on the disk.
///
/// # Errors
/// When it cannot be written.
pub(super) fn keep(dir: &VmDir, key: &SideKey, of: &v1::PrepareIncomingRequest) -> io::Result<()> {
    let kept = v1::PrepareIncomingRequest {
        migration: of.migration.clone(),
        source_agent_address: of.source_agent_address.clone(),
        grant: of.grant.clone(),
        ..Default::default()
    };
    let path = path(dir, key);
    let aside = path.with_extension("new");
    let mut file = File::create(&aside)?;
    file.write_all(&kept.encode_to_vec())?;
    file.sync_all()?;
    std::fs::rename(&aside, &path)?;
    File::open(dir.path())?.sync_all()
}

fn load(dir: &VmDir, key: &SideKey) -> Option<v1::PrepareIncomingRequest> {
    let bytes = std::fs::read(path(dir, key)).ok()?;
    v1::PrepareIncomingRequest::decode(bytes.as_slice()).ok()
}

/// Forgets it; best effort: the grant in it ends by itself.
pub(super) fn forget(dir: &VmDir, key: &SideKey) {
    match std::fs::remove_file(path(dir, key)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(migration = %key.migration, %error, "a grant that a VM was received with stays");
        }
        _ => {}
    }
}

/// Looks after a destination's side until it has ended, was released, or its process is gone. The
/// source's agent is called by `credentials`, and has to be the one that the grant names.
pub(super) async fn look_after(live: Arc<LiveVm>, key: SideKey, credentials: Option<Credentials>) {
    let mut ready = None;
    loop {
        tokio::select! {
            () = live.gone().cancelled() => return,
            () = sleep(EVERY) => {}
        }
        match live.side(&key) {
            None => return,
            Some(Some(side)) if is_terminal(side.phase()) => return,
            Some(Some(side)) if side.phase() == Phase::Ready => {
                let since = *ready.get_or_insert_with(Instant::now);
                if since.elapsed() >= DOUBT {
                    ask(&live, &key, &side, credentials.as_ref()).await;
                }
            }
            Some(_) => ready = None,
        }
    }
}

/// Asks once, and passes on what there is to pass on.
async fn ask(
    live: &Arc<LiveVm>,
    key: &SideKey,
    side: &v1::Transfer,
    credentials: Option<&Credentials>,
) {
    let (dir, of) = (live.dir().clone(), key.clone());
    let kept = tokio::task::spawn_blocking(move || load(&dir, &of)).await;
    // Prepared by an agent of an older version: the process asks by itself.
    let Ok(Some(kept)) = kept else { return };
    let Ok(address) = kept.source_agent_address.parse::<Address>() else {
        return;
    };
    if credentials.is_some() && matches!(address, Address::Unix(_)) {
        tracing::warn!(migration = %key.migration, %address, "a source's agent behind a Unix socket shows no certificate: it is not asked");
        return;
    }
    let grant = kept.grant.as_ref();
    let Some(Ok(granted)) = grant.map(|signed| Grant::decode(&signed.grant)) else {
        return;
    };
    let source = Expects::Named(Kind::Agent, granted.source.host);
    let link = Link::new(credentials, source);
    let request = v1::GetTransferRequest {
        migration: key.migration.to_string(),
        role: v1::TransferRole::Source.into(),
        without_progress: true,
        grant: kept.grant,
    };
    let asking = async {
        let mut source = TransferServiceClient::new(connect_by(&address, &link).ok()?);
        let said = source.get_transfer(request).await;
        said.inspect_err(|status| {
            tracing::debug!(migration = %key.migration, error = status.message(), "a source's agent does not say how it stands");
        })
        .ok()
    };
    let Ok(Some(said)) = timeout(ANSWER, asking).await else {
        return;
    };
    let said = said.into_inner();
    if said.migration != side.migration || said.epoch != side.epoch {
        tracing::warn!(migration = %key.migration, "a source's agent speaks of another side");
        return;
    }
    let decision = match said.phase() {
        Phase::Relinquished | Phase::Completed => Decision::Commit,
        Phase::Failed | Phase::Cancelled => Decision::Abort,
        _ => return,
    };
    tracing::info!(migration = %key.migration, ?decision, "a destination in doubt is told how its source stands");
    let request = v1::ResolveTransferRequest {
        migration: key.migration.to_string(),
        decision: decision.into(),
        ordered: true,
        ..Default::default()
    };
    let mut transfers = live.transfers();
    if let Err(error) = live
        .answer(QUICK, transfers.resolve_transfer(request))
        .await
    {
        tracing::warn!(migration = %key.migration, %error, "a destination in doubt does not hear it");
    }
}
