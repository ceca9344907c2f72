//! `slat get --watch`: what changes, as it changes, through restarts of the server.
//!
//! A watch of one VM or migration follows the server's stream; a watch of several asks again every
//! second and prints the rows that changed. When the server stops answering, [`Patience`] asks
//! again. A VM that the server does not know is gone only if every host has reported: a server that
//! has just started may not have heard of it yet. The figures of a migration change ten times a
//! second: people get a row of them once a second, programs get all.

use std::time::{Duration, Instant};

use slat_proto::{ApiError, Reason, v1};
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::{
    super::{follow::follow, patience::Patience, saves, target::VmTarget},
    listing::Listing,
};
use crate::{
    client::Client,
    failure::Failure,
    output::{Changes, Format, ListStyle, Resource},
    term::out,
    view,
};

/// How often a watch of several asks again.
const POLL: Duration = Duration::from_secs(1);
/// Before a stream that ended is opened again.
const AGAIN: Duration = Duration::from_millis(200);
/// A server that has just come back may take this long to hear of a VM.
const HEARSAY: Duration = Duration::from_secs(10);

/// A save, to its end.
pub(super) async fn save(
    client: &Client,
    style: ListStyle,
    patience: Patience,
    name: &str,
) -> Result<(), Failure> {
    let mut changes = Changes::new(style);
    let mut broken = Ok(());
    let ended = saves::follow(client, name, patience, |save| {
        if broken.is_ok() {
            broken = changes.show(std::slice::from_ref(save));
        }
    });
    let ended = ended.await?;
    broken?;
    saves::outcome(format!("watch {name}"), &ended)
}

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

/// Which states of a migration are worth a row.
#[derive(Debug)]
struct Rows {
    /// Programs get them all.
    all: bool,
    /// Phase and iterations of the last one, and when that was.
    last: Option<(v1::MigrationPhase, Option<u32>, Instant)>,
}

impl Rows {
    fn of(format: Format) -> Self {
        Self {
            all: !matches!(format, Format::Table | Format::Wide),
            last: None,
        }
    }

    /// Whether one that came `now` is: a new phase or iteration, the end, or a second after the
    /// last one.
    fn due(&mut self, migration: &v1::Migration, now: Instant) -> bool {
        let phase = migration.phase();
        let iterations = migration.progress.as_ref().and_then(view::iterations);
        let due = self.all
            || view::ended(phase)
            || self.last.is_none_or(|(last, count, at)| {
                (last, count) != (phase, iterations) || now.saturating_duration_since(at) >= POLL
            });
        if due {
            self.last = Some((phase, iterations, now));
        }
        due
    }
}

/// One migration, to its end.
pub(super) async fn migration(
    client: &Client,
    style: ListStyle,
    patience: Patience,
    name: &str,
) -> Result<(), Failure> {
    let mut rows = Rows::of(style.format);
    let mut changes = Changes::new(style);
    let patience = patience.once_heard();
    follow(client, name, patience, |migration| {
        if rows.due(migration, Instant::now()) {
            changes.show(std::slice::from_ref(migration))
        } else {
            Ok(())
        }
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

#[cfg(test)]
mod tests {
    use v1::MigrationPhase as Phase;

    use super::*;

    #[test]
    fn figures_that_grow_are_a_row_a_second() {
        let at = |phase: Phase, iteration: u32| v1::Migration {
            phase: phase.into(),
            progress: Some(v1::MigrationProgress {
                iteration,
                total_bytes: 1,
                ..Default::default()
            }),
            ..Default::default()
        };
        let begun = Instant::now();
        let due = |format: Format| -> Vec<bool> {
            let mut rows = Rows::of(format);
            [
                (Phase::PrecopyActive, 1, 0),
                (Phase::PrecopyActive, 1, 100),
                (Phase::PrecopyActive, 1, 1000),
                (Phase::PrecopyActive, 2, 1100),
                (Phase::Switchover, 2, 1200),
                (Phase::Completed, 2, 1300),
                (Phase::Completed, 2, 1400),
            ]
            .map(|(phase, iterations, millis)| {
                let now = begun + Duration::from_millis(millis);
                rows.due(&at(phase, iterations), now)
            })
            .to_vec()
        };
        let shown = [true, false, true, true, true, true, true];
        assert_eq!(due(Format::Table), shown);
        assert_eq!(due(Format::Wide), shown);
        assert_eq!(due(Format::Json), [true; 7]);
    }
}
