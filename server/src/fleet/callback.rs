//! Calls agents back under the address they advertise: READY means that others reach the agent, not
//! only that it reaches the server.
//!
//! The first call is part of the registration. From then on one task calls every host that reports,
//! each at times of its own, a few at once; one that fails is called again soon. What an agent must
//! answer is its own name, uid and incarnation: another agent at that address, or this server, is
//! no answer.

use std::{
    collections::HashMap,
    error::Error as _,
    hash::{BuildHasher as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use slat_proto::{
    ApiError,
    v1::{self, host_service_client::HostServiceClient},
};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::shared::Fleet;

/// How long an agent may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// Calls under way at once.
const AT_ONCE: usize = 8;
/// A host that answers is called again after ten report intervals, within these.
const PERIOD: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(10);
/// One that does not is called again after one, within these.
const AGAIN: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(2);

/// `duration`, at random a quarter longer or shorter, so that hosts are not called in step.
fn spread(duration: Duration) -> Duration {
    // A hasher's keys are a source of chance that needs no crate.
    let chance = std::hash::RandomState::new().build_hasher().finish();
    let part = u32::try_from(chance % 500).unwrap_or(0);
    duration * (750 + part) / 1000
}

/// Text from elsewhere, fit to be shown.
fn shown(text: &str) -> String {
    text.chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect()
}

/// Why a call failed, down to the system's own word for it.
fn why(status: Status) -> String {
    let mut words = None;
    let mut cause = status.source();
    while let Some(error) = cause {
        words = Some(error.to_string());
        cause = error.source();
    }
    shown(&words.unwrap_or_else(|| ApiError::from(status).message))
}

/// Whether the agent that answered is the one that registered.
fn compare(registered: &v1::Host, answer: &v1::Host) -> Result<(), String> {
    if answer.name != registered.name {
        return Err(format!("it answers as {}", shown(&answer.name)));
    }
    let uids = !registered.uid.is_empty() && !answer.uid.is_empty();
    if uids && answer.uid != registered.uid {
        let uid = shown(&answer.uid);
        return Err(format!(
            "it answers as another agent of that name, uid {uid}"
        ));
    }
    if answer.incarnation != registered.incarnation {
        return Err("it answers as another agent of that name, or another start of it".to_owned());
    }
    // A server says of the host what the agent told it, and that it is not READY yet.
    if answer.state() != v1::host::State::Ready {
        return Err("it does not answer as an agent".to_owned());
    }
    Ok(())
}

impl Fleet {
    /// Calls a host's agent back and keeps how it went.
    pub(crate) async fn call_back(&self, host: &v1::Host) -> bool {
        let result = self.ask(host).await;
        let answers = result.is_ok();
        self.table().called(&host.name, &host.incarnation, result);
        answers
    }

    async fn ask(&self, host: &v1::Host) -> Result<(), String> {
        let channel = self.channel(&host.name).map_err(|error| error.message)?;
        let request = v1::GetHostRequest {
            name: host.name.clone(),
        };
        let mut agent = HostServiceClient::new(channel);
        match timeout(ANSWER, agent.get_host(request)).await {
            Ok(Ok(answer)) => compare(host, answer.get_ref()),
            Ok(Err(status)) => Err(why(status)),
            Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
        }
    }
}

/// Calls hosts back until `stop`.
pub(crate) async fn call_back(fleet: Arc<Fleet>, stop: CancellationToken) {
    let every = (fleet.interval() * 10).clamp(*PERIOD.start(), *PERIOD.end());
    let again = fleet.interval().clamp(*AGAIN.start(), *AGAIN.end());
    let mut tick = interval(again.min(Duration::from_secs(1)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // When each is due; `None`: it is being called.
    let mut due: HashMap<String, Option<Instant>> = HashMap::new();
    let mut calls: JoinSet<(String, bool)> = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = tick.tick() => {}
            Some(ended) = calls.join_next() => {
                if let Ok((host, answers)) = ended {
                    let pause = spread(if answers { every } else { again });
                    due.insert(host, Some(Instant::now() + pause));
                }
            }
        }
        let reporting = fleet.table().reporting(std::time::Instant::now());
        let known = |host: &String| reporting.iter().any(|other| other.name == *host);
        due.retain(|host, at| at.is_none() || known(host));
        for host in reporting {
            if calls.len() >= AT_ONCE {
                break;
            }
            let now = Instant::now();
            // One that just registered was called then.
            let first = Some(now + spread(again));
            let at = due.entry(host.name.clone()).or_insert(first);
            if at.is_none_or(|at| at > now) {
                continue;
            }
            *at = None;
            let fleet = Arc::clone(&fleet);
            calls.spawn(async move {
                let answers = fleet.call_back(&host).await;
                (host.name, answers)
            });
        }
    }
    calls.shutdown().await;
}
