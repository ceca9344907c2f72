//! Upcalls to the server: RegisterHost, then ReportHost at each interval and at once on changes.
//!
//! ```text
//! register --ok--> report --interval or change--> report ...
//!    ^               |  STALE_INCARNATION: at once
//!    +---------------+  anything else: after a pause that doubles, with jitter
//! ```
//! A pause ends when this agent has other credentials: it may have been refused for the old ones.
//!
//! What only a registration says is said by another one, of the same incarnation, when it changes:
//! which backends there are.
//!
//! A report says when it was sent, by the agent's wall clock, and how long the one before took
//! until its answer, by the monotonic clock: the server measures the offset of the wall clock so.
//!
//! A report is put together from the caches only, after directories that could not be read were
//! tried again. Contact with the server, its loss and a refusal are each logged once, when they
//! begin, and shown in this agent's own Host while they last. An agent whose name another one has
//! (HOST_NAME_TAKEN) goes on trying, with the longest pause: the other may go. So does one whose
//! host was fenced (HOST_FENCED): see `fenced`. The task ends with the agent's token.

use std::{
    hash::{BuildHasher as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    model::{proto_duration, timestamp},
    transport::{Address, TracedChannel},
    v1::{self, fleet_service_client::FleetServiceClient},
};
use slat_trust::Credentials;
use tokio::{sync::watch, time::Instant};

use super::{admission::Found, host_api::HostCard};

/// How long the server may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Pause after the first failure, doubling to the last.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LAST: Duration = Duration::from_secs(5);
/// In a pause it is looked this often whether the own credentials are others by now.
const LOOK: Duration = Duration::from_millis(100);
/// Changes within this are reported together.
const GATHER: Duration = Duration::from_millis(20);
/// Contact that lasted this long was good: when it ends, the agent registers again at once. Shorter
/// contact (two agents of one name, a server that dies over every report) counts as one more
/// failure.
const SETTLED: Duration = Duration::from_secs(5);
/// What the server may ask for.
const INTERVAL: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(50)..=Duration::from_secs(60);
/// When it asks for nothing.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(1);

/// How contact with the server stands, for logging its changes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Contact {
    Unknown,
    Registered,
    Lost(Reason),
}

/// Reports until the agent stops.
pub(super) async fn report(card: Arc<HostCard>, server: Address, channel: TracedChannel) {
    let stop = card.supervisor.stop.clone();
    let reporter = Reporter {
        backends: card.supervisor.backends.changes(),
        card,
        server,
        client: FleetServiceClient::new(channel),
        contact: Contact::Unknown,
        round_trip: None,
        shown: 0,
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = reporter.run() => {}
    }
}

struct Reporter {
    card: Arc<HostCard>,
    server: Address,
    client: FleetServiceClient<TracedChannel>,
    contact: Contact,
    /// Which backends there are: said at registration alone.
    backends: watch::Receiver<Found>,
    /// Of the report before the next one.
    round_trip: Option<Duration>,
    /// Generation of the own credentials when the server was called last.
    shown: u64,
}

impl Reporter {
    async fn run(mut self) {
        let mut pause = PAUSE_FIRST;
        loop {
            let begun = Instant::now();
            let error = match self.register().await {
                Ok(()) => {
                    self.turned(Contact::Registered, None);
                    self.keep_reporting().await
                }
                Err(error) => error,
            };
            if begun.elapsed() > SETTLED {
                pause = PAUSE_FIRST;
                if error.reason == Reason::StaleIncarnation {
                    tracing::info!(server = %self.server, "the server asks for a new registration");
                    continue;
                }
            }
            self.turned(Contact::Lost(error.reason), Some(&error));
            if matches!(error.reason, Reason::HostNameTaken | Reason::HostFenced) {
                pause = PAUSE_LAST;
            }
            let shown = self.shown;
            pause = match wait(jittered(pause), || self.generation() != shown).await {
                Waited::Out => (pause * 2).min(PAUSE_LAST),
                Waited::Renewed => PAUSE_FIRST,
            };
        }
    }

    /// Of the own credentials; without any always the same.
    fn generation(&self) -> u64 {
        let credentials = self.card.supervisor.credentials.as_ref();
        credentials.map_or(0, Credentials::generation)
    }

    fn turned(&mut self, contact: Contact, error: Option<&ApiError>) {
        self.card.fenced.note(error);
        self.card.set_trouble(match error {
            Some(error) if matches!(error.reason, Reason::HostNameTaken | Reason::HostFenced) => {
                format!("the server refuses this agent: {}", error.message)
            }
            Some(error) => format!(
                "no contact with the server {}: {}",
                self.server, error.message
            ),
            None => String::new(),
        });
        if self.contact == contact {
            return;
        }
        match error {
            Some(error) if error.reason == Reason::HostNameTaken => {
                tracing::error!(
                    server = %self.server, host = %self.card.supervisor.host, uid = self.card.uid, %error,
                    "another agent reports under this host's name: give this one another with --name, or stop the other"
                );
            }
            Some(error) => {
                tracing::warn!(server = %self.server, %error, reason = %error.reason, "no contact with the server")
            }
            None => tracing::info!(server = %self.server, "registered with the server"),
        }
        self.contact = contact;
    }

    async fn register(&mut self) -> Result<(), ApiError> {
        self.backends.mark_unchanged();
        let request = v1::RegisterHostRequest {
            host: Some(self.card.host()),
        };
        self.shown = self.generation();
        // The first report follows at once; its answer says when the next one is due.
        let said = answer(self.client.register_host(request)).await?;
        self.learn(&said.grant_keys);
        Ok(())
    }

    /// Takes the server's keys in. The disk is not waited for.
    fn learn(&self, keys: &[v1::GrantKey]) {
        let supervisor = &self.card.supervisor;
        let grants = Arc::clone(&supervisor.grants);
        if grants.learn(keys) {
            supervisor
                .tasks
                .spawn(async move { grants.save_keys().await });
        }
    }

    /// Reports until the server refuses or does not answer.
    async fn keep_reporting(&mut self) -> ApiError {
        let mut changes = self.card.supervisor.registry.changes();
        self.round_trip = None;
        loop {
            let begun = Instant::now();
            changes.mark_unchanged();
            self.card.supervisor.reread().await;
            let mut request = self.request();
            self.shown = self.generation();
            // Read last: what is between this and the wire counts as the way there.
            request.send_time = Some(timestamp((self.card.clock)()));
            let sent = Instant::now();
            let said = match answer(self.client.report_host(request)).await {
                Ok(said) => said,
                Err(error) => return error,
            };
            self.round_trip = Some(sent.elapsed());
            let every = interval(said.report_interval_millis);
            self.learn(&said.grant_keys);
            tokio::select! {
                () = tokio::time::sleep_until(begun + every) => {}
                // The sender lives as long as the registry, which this task's card holds.
                _ = changes.changed() => tokio::time::sleep(GATHER).await,
                _ = self.backends.changed() => {
                    if let Err(error) = self.register().await {
                        return error;
                    }
                    self.round_trip = None;
                }
            }
        }
    }

    fn request(&self) -> v1::ReportHostRequest {
        let supervisor = &self.card.supervisor;
        v1::ReportHostRequest {
            host: supervisor.host.to_string(),
            incarnation: self.card.incarnation.clone(),
            vms: supervisor.snapshots(),
            transfers: supervisor.sides().into_iter().map(reported).collect(),
            memory_used_bytes: supervisor.registry.memory().1,
            leftovers: supervisor.leftovers(),
            last_round_trip: self.round_trip.map(proto_duration),
            state_message: self.card.disk_message(),
            huge_pages: self.card.pools.get(),
            trust: Some((self.card.trust)()),
            ..Default::default()
        }
    }
}

/// A side as it is reported: the server looks at what it is and how it stands; its figures it has
/// from watching it.
fn reported(side: v1::Transfer) -> v1::Transfer {
    v1::Transfer {
        progress: None,
        phase_times: Vec::new(),
        ..side
    }
}

async fn answer<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(status.into()),
        Err(_) => Err(ApiError::new(
            Reason::PeerUnreachable,
            format!("no answer within {} s", ANSWER.as_secs()),
        )),
    }
}

/// How a pause ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waited {
    Out,
    Renewed,
}

/// Waits for `pause`, or until the own credentials are `renewed`.
async fn wait(pause: Duration, renewed: impl Fn() -> bool) -> Waited {
    let end = Instant::now() + pause;
    while !renewed() {
        let now = Instant::now();
        if now >= end {
            return Waited::Out;
        }
        tokio::time::sleep_until(end.min(now + LOOK)).await;
    }
    Waited::Renewed
}

fn interval(millis: u32) -> Duration {
    match millis {
        0 => INTERVAL_DEFAULT,
        millis => Duration::from_millis(millis.into()).clamp(*INTERVAL.start(), *INTERVAL.end()),
    }
}

/// `pause`, shortened at random by up to one part of two, so that hosts do not return in step.
fn jittered(pause: Duration) -> Duration {
    // A hasher's keys are this process's only source of chance that needs no crate.
    let chance = std::hash::RandomState::new().build_hasher().finish();
    let part = u32::try_from(chance % 1000).unwrap_or(0);
    pause / 2 + pause * part / 2000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_in_their_range() {
        for _ in 0..100 {
            let pause = jittered(PAUSE_LAST);
            assert!(pause >= PAUSE_LAST / 2 && pause <= PAUSE_LAST, "{pause:?}");
        }
    }

    #[tokio::test]
    async fn a_pause_ends_when_the_credentials_change() {
        let begun = Instant::now();
        let looks = std::cell::Cell::new(0);
        let renewed = || looks.replace(looks.get() + 1) == 3;
        let hour = Duration::from_secs(3600);
        let waited = tokio::time::timeout(hour / 60, wait(hour, renewed)).await;
        assert_eq!(waited, Ok(Waited::Renewed));
        assert_eq!(looks.get(), 4);
        assert!(begun.elapsed() >= LOOK * 3);
        let begun = Instant::now();
        assert_eq!(wait(LOOK * 2, || false).await, Waited::Out);
        assert!(begun.elapsed() >= LOOK * 2);
    }

    #[test]
    fn a_report_says_how_a_side_stands_and_carries_no_history() {
        let mut progress = v1::MigrationProgress::default();
        for iteration in 0..100 {
            progress.push_iteration(v1::MigrationIteration {
                iteration,
                ..Default::default()
            });
        }
        let side = v1::Transfer {
            migration: "migrations/m".into(),
            vm: "vms/web".into(),
            role: v1::TransferRole::Source.into(),
            phase: v1::TransferPhase::Relinquished.into(),
            progress: Some(progress),
            epoch: 3,
            ..Default::default()
        };
        let told = reported(side.clone());
        assert!(told.progress.is_none() && prost::Message::encoded_len(&told) < 64);
        assert_eq!((told.phase(), told.role()), (side.phase(), side.role()));
        assert_eq!(
            (told.migration, told.vm, told.epoch),
            (side.migration, side.vm, 3)
        );
    }

    #[test]
    fn the_server_cannot_ask_for_nonsense() {
        assert_eq!(interval(0), INTERVAL_DEFAULT);
        assert_eq!(interval(1), *INTERVAL.start());
        assert_eq!(interval(250), Duration::from_millis(250));
        assert_eq!(interval(u32::MAX), *INTERVAL.end());
    }
}
