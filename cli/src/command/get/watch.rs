//! `slat get --watch`: what changes, as it changes, through restarts of the server.
//!
//! A watch of one VM or migration follows the server's stream; a watch of several asks again every
//! second and prints the rows that changed. When the server stops answering, [`Patience`] asks
//! again. A VM that the server does not know is gone only if every host has reported: a server that
//! has just started may not have heard of it yet.

use std::time::{Duration, Instant};

use slat_proto::{ApiError, Reason, v1};
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::{
    super::{follow::follow, patience::Patience, target::VmTarget},
    listing::Listing,
};
use crate::{
    client::Client,
    failure::Failure,
    output::{Changes, ListStyle, Resource},
    term::out,
};

/// How often a watch of several asks again.
const POLL: Duration = Duration::from_secs(1);
/// Before a stream that ended is opened again.
const AGAIN: Duration = Duration::from_millis(200);
/// A server that has just come back may take this long to hear of a VM.
const HEARSAY: Duration = Duration::from_secs(10);

/// Several of a kind, and those that have no stream.
pub(super) async fn poll<T: Resource>(
    client: &Client,
    style: ListStyle,
    patience: Patience,
    look: impl AsyncFn(&Client) -> Result<Listing<T>, Status>,
) -> Result<(), Failure> {
    let doing = format!("watch {}", T::COLLECTION);
    let mut changes = Changes::new(style);
    let mut patience = patience.once_heard();
    let mut warned = None;
    loop {
        match look(client).await {
            Ok(listing) => {
                patience.heard();
                let gaps = listing.gaps();
                if gaps != warned {
                    listing.warn();
                    warned = gaps;
                }
                if warned.is_some() {
                    // What is not listed may be on a host that is silent.
                    changes.show(&listing.items)?;
                } else {
                    for name in changes.show_all(&listing.items)? {
                        out::say(format!("{name} is no longer here"));
                    }
                }
                tokio::time::sleep(POLL).await;
            }
            Err(status) => patience.lost(&doing, status.into()).await?,
        }
    }
}

/// One migration, to its end.
pub(super) async fn migration(
    client: &Client,
    style: ListStyle,
    patience: Patience,
    name: &str,
) -> Result<(), Failure> {
    let mut changes = Changes::new(style);
    let patience = patience.once_heard();
    follow(client, name, patience, |migration| {
        changes.show(std::slice::from_ref(migration))
    })
    .await
    .map(drop)
}

/// One VM, until it is gone.
pub(super) async fn vm(
    client: &Client,
    style: ListStyle,
    patience: Patience,
    target: &VmTarget,
) -> Result<(), Failure> {
    let doing = format!("watch {target}");
    let mut changes = Changes::new(style);
    let mut patience = patience.once_heard();
    let mut silence_ended: Option<Instant> = None;
    loop {
        let streamed = stream(client, target, |vm| {
            patience.heard();
            changes.show(&[vm])
        })
        .await?;
        let error = match streamed {
            // The stream ends when the VM is gone, and when the server ends.
            Ok(()) => match client.vms().get_vm(get(target)).await {
                Ok(_) => {
                    patience.heard();
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                Err(status) => ApiError::from(status),
            },
            Err(error) => error,
        };
        if error.reason != Reason::NoSuchVm {
            patience.lost(&doing, error).await?;
            silence_ended = Some(Instant::now());
            continue;
        }
        if !changes.has_seen_any() {
            return Err(Failure::api(doing, error));
        }
        let fresh = silence_ended.is_some_and(|end| end.elapsed() < HEARSAY);
        if !fresh && !unreported(client).await {
            out::say(format!("{target} is no longer here"));
            return Ok(());
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn get(target: &VmTarget) -> v1::GetVmRequest {
    v1::GetVmRequest {
        name: target.name(),
        uid: target.uid(),
        host: target.host(),
    }
}

/// Whether some host has not reported since the server started.
async fn unreported(client: &Client) -> bool {
    let request = v1::ListVmsRequest {
        page_size: 1,
        ..Default::default()
    };
    let answer = client.vms().list_vms(request).await;
    answer.is_ok_and(|list| !list.get_ref().unreported.is_empty())
}

/// One stream to its end: the server's error, or none.
async fn stream(
    client: &Client,
    target: &VmTarget,
    mut seen: impl FnMut(v1::Vm) -> Result<(), Failure>,
) -> Result<Result<(), ApiError>, Failure> {
    let request = v1::WatchVmRequest {
        name: target.name(),
        uid: target.uid(),
        host: target.host(),
    };
    let mut stream = match client.vms().watch_vm(request).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return Ok(Err(status.into())),
    };
    while let Some(vm) = stream.next().await {
        match vm {
            Ok(vm) => seen(vm)?,
            Err(status) => return Ok(Err(status.into())),
        }
    }
    Ok(Ok(()))
}
