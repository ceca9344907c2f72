//! Before the state has come: memory is populated, connections are let in, iterations are followed.
//! When every stream has ended iteration n, IterAck n is said.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, model::proto_duration};

use super::{
    super::{
        receiver::Event,
        wire::{ECHO_SINCE, Header, Kind, WireError},
    },
    link::Link,
    parts::{DestinationDriver, Note},
    work::{Work, was_told},
};
use crate::{
    cpu_time::thread_cpu_time,
    handover::{payload::check_slots, protocol::destination::Input},
    machine::SyncProbe,
};

/// How far populating is, is published this often.
const SHOW: Duration = Duration::from_millis(100);
/// The source is told at least this often how far populating is, so that it does not take it for
/// silence.
const STILL_HERE: Duration = Duration::from_secs(5);
/// A source that has not opened every connection is given up after this long.
const SOURCE_CONNECTS: Duration = Duration::from_secs(60);
/// After a data stream broke, this long for the source's own word on why.
const LAST_WORD: Duration = Duration::from_millis(500);

impl DestinationDriver {
    /// One note before the state has come.
    pub(super) fn receive(&self, note: Note, work: &mut Work) -> Result<Option<Input>, ApiError> {
        match note {
            Note::Connected(peer) => self.connected(&mut work.link, peer)?,
            Note::Data(event) => self.data(&mut work.link, event)?,
            Note::Control(frame) => {
                let (header, payload) = frame?;
                return self.control(header, payload, work);
            }
            Note::Decided(_) | Note::Interrupted => {}
        }
        Ok(None)
    }

    fn control(
        &self,
        header: Header,
        payload: Vec<u8>,
        work: &mut Work,
    ) -> Result<Option<Input>, ApiError> {
        if header.kind == Kind::Echo && self.versions.protocol >= ECHO_SINCE {
            let synced = self.synced(work);
            work.link.answer_echo(synced)?;
            return Ok(None);
        }
        let link = &mut work.link;
        match header.kind {
            Kind::SlotTable if !link.table_seen => {
                let checked = check_slots(&payload, &self.machine.memory().table());
                checked.map_err(|error| {
                    let words = format!("slots changed after the migration was prepared: {error}");
                    ApiError::new(Reason::StaleGeneration, words)
                        .with("field", "slot_table")
                        .with("advice", "migrate it again")
                })?;
                link.table_seen = true;
                Ok(None)
            }
            Kind::State if link.ended > 0 => Err(WireError::corrupt(
                "kind",
                format!("State during iteration {}", link.iteration),
            )
            .into()),
            Kind::State if link.table_seen && link.populate.is_none() => {
                link.close_data();
                work.state = payload;
                Ok(Some(Input::StateHeard))
            }
            other => Err(WireError::corrupt(
                "kind",
                format!("{other:?} on the control connection"),
            )
            .into()),
        }
    }

    /// How long an append to the journal takes here; nothing when that cannot be measured.
    fn synced(&self, work: &mut Work) -> Duration {
        if work.probe.is_none() {
            work.probe = self.machine.sync_probe().ok();
        }
        let measured = work.probe.as_mut().map(SyncProbe::measure);
        measured.and_then(Result::ok).unwrap_or_default()
    }

    /// Tells the source how far the memory is; says so once all of it is there.
    pub(super) fn populated(&self, work: &mut Work) -> Result<Option<Input>, ApiError> {
        let link = &mut work.link;
        let Some(populate) = &link.populate else {
            return Ok(None);
        };
        let percent = populate.percent().map_err(no_memory)?;
        // Whether or not the source is there yet: who waits for this migration sees it.
        let bytes = populate.bytes();
        let due = link.published_at.elapsed() >= SHOW || percent == 100;
        if due && bytes != link.published {
            self.side
                .update(|progress| progress.populated_bytes = bytes);
            link.published = bytes;
            link.published_at = Instant::now();
        }
        if !link.table_seen {
            return Ok(None);
        }
        if link.told != Some(percent) || link.told_at.elapsed() >= STILL_HERE {
            link.say(Kind::Populated, percent, &[])?;
            link.told = Some(percent);
            link.told_at = Instant::now();
        }
        if percent < 100 {
            return Ok(None);
        }
        if let Some(populate) = link.populate.take() {
            link.populate_cpu = populate.finish();
        }
        Ok(Some(Input::Populated))
    }

    /// A source that does not come is given up.
    pub(super) fn check_presence(&self, work: &Work) -> Result<(), ApiError> {
        let link = &work.link;
        let missing =
            link.control.is_none() || !link.table_seen || link.data.len() < self.streams as usize;
        if missing && work.started.elapsed() > SOURCE_CONNECTS {
            return Err(ApiError::new(
                Reason::ConnectionLost,
                format!(
                    "the source did not open every connection within {} s",
                    SOURCE_CONNECTS.as_secs()
                ),
            ));
        }
        Ok(())
    }

    fn data(&self, link: &mut Link, event: Event) -> Result<(), ApiError> {
        match event {
            Event::IterationEnd { stream, iteration } => {
                if iteration != link.iteration {
                    return Err(WireError::corrupt(
                        "iteration",
                        format!(
                            "stream {stream} ended iteration {iteration} during iteration {}",
                            link.iteration
                        ),
                    )
                    .into());
                }
                link.ended += 1;
                if link.ended == self.streams {
                    link.ended = 0;
                    link.iteration += 1;
                    self.publish(link);
                    link.say(Kind::IterAck, iteration, &[])?;
                }
                Ok(())
            }
            Event::Ended {
                error: Some(error), ..
            } => Err(self.last_word(error)),
            Event::Ended {
                stream,
                error: None,
            } => Err(self.last_word(ApiError::new(
                Reason::ConnectionLost,
                format!("data stream {stream} closed during the migration"),
            ))),
        }
    }

    /// When a data stream breaks, the source may be about to say why on the control connection.
    fn last_word(&self, error: ApiError) -> ApiError {
        if was_told(&error) {
            return error;
        }
        let until = Instant::now() + LAST_WORD;
        while let Ok(note) = self
            .notes
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            match note {
                Note::Control(Err(theirs)) if was_told(&theirs) => return theirs,
                Note::Control(Err(_)) | Note::Interrupted => break,
                _ => {}
            }
        }
        error
    }

    pub(super) fn publish(&self, link: &Link) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let intake = &link.intake;
        let cpu =
            Duration::from_nanos(load(&intake.cpu_nanos)) + link.populate_cpu + thread_cpu_time();
        self.side.update(|progress| {
            progress.iteration = link.iteration;
            progress.bytes_transferred = load(&intake.bytes);
            progress.pages_normal = load(&intake.pages_normal);
            progress.pages_zero = load(&intake.pages_zero);
            progress.cpu_time = Some(proto_duration(cpu));
        });
        let refused = self.listener.refused();
        if refused > 0 {
            tracing::debug!(refused, "connections turned away on the data port");
        }
    }
}

/// Memory could not be populated.
pub(super) fn no_memory(error: std::io::Error) -> ApiError {
    ApiError::new(
        Reason::DstNoMemory,
        format!("the VM's memory could not be populated here: {error}"),
    )
    .with(
        "advice",
        "the VM runs on at the source; free memory on this host or choose another",
    )
}
