//! Takes connections for an endpoint, no more than [`MAX_CONNECTIONS`] at a time.
//!
//! When all places are taken, a new connection takes that of the one which has been without a
//! request for longest; when all have requests running, it is closed. A process without descriptors
//! waits before it accepts again, longer each time, and never spins.
//!
//! A connection counts from its first moment, its handshake included ([`super::tls`]). Those of
//! which nobody knows yet who is there have a quarter of the places, and are the first to lose
//! them: whoever shows no certificate pushes nobody out who did. One identity has a bounded number
//! of connections ([`super::access`]).
//!
//! Metrics: `slat_connections` and `slat_connections_closed_total{cause}`.
//!
//! # Locking
//! `open` is a leaf mutex over the list of connections, held for one look or change. The task of a
//! connection takes itself off the list when it ends. All tasks are in one set that ends with
//! [`accept`].

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::Router;
use metrics::{counter, describe_counter, describe_gauge, gauge};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::watch,
    task::JoinSet,
};

use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;

use super::{
    access::{Permit, Role},
    authority::AnyAuthority,
    caller::Caller,
    connection::{self, Activity, wait},
    guest::{Gate, Guest},
    options::configure,
    refusals,
    tls::{self, Judged, Link},
};
use crate::{ApiError, Reason};

/// Connections of one endpoint.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// So many of them may be unknown yet, however few places there are; else a quarter.
const FEWEST_UNKNOWN: usize = 4;
/// Before accepting is tried again after a failure; doubles.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What connections are taken from.
pub(super) trait Accept: Send + 'static {
    type Raw: Send + 'static;
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn next(&self) -> impl Future<Output = io::Result<Self::Raw>> + Send;

    /// Finds out who is at the other end; the error is the cause it is closed for.
    fn greet(
        raw: Self::Raw,
        gate: &Gate,
    ) -> impl Future<Output = Result<Guest<Self::Stream>, &'static str>> + Send;
}

impl Accept for TcpListener {
    type Raw = TcpStream;
    type Stream = Either<TcpStream, Judged<TlsStream<TcpStream>>>;

    async fn next(&self) -> io::Result<TcpStream> {
        let (stream, _) = self.accept().await?;
        if let Err(error) = configure(&stream) {
            tracing::debug!(%error, "an option of a connection was refused");
        }
        Ok(stream)
    }

    async fn greet(stream: TcpStream, gate: &Gate) -> Result<Guest<Self::Stream>, &'static str> {
        let peer = stream.peer_addr();
        let peer: Arc<str> = peer
            .map_or_else(|_| "gone".to_owned(), |address| address.to_string())
            .into();
        let Link::Tls { credentials, .. } = &gate.link else {
            return Ok(Guest {
                stream: Either::Left(stream),
                caller: Caller {
                    identity: None,
                    peer,
                },
                permit: Permit::of(Role::Open),
                http2: false,
                place: None,
            });
        };
        let accepted = tls::accept(stream, &peer, credentials).await;
        let accepted = accepted.map_err(|refusal| match refusal {
            Some(refusal) => {
                gate.refusals.tell(&peer, &refusal);
                "refused"
            }
            None => "silent",
        })?;
        let permit = gate.access.permit(&accepted.identity);
        let identity: Arc<str> = accepted.identity.to_string().into();
        let Some(place) = gate.access.connection(&identity, &permit) else {
            tracing::warn!(target: "audit", peer = &*identity, result = "RATE_LIMITED",
                "a connection was refused: its identity has too many");
            return Err("identity");
        };
        Ok(Guest {
            stream: Either::Right(accepted.stream),
            caller: Caller {
                identity: Some(identity),
                peer,
            },
            permit,
            http2: accepted.http2,
            place: Some(place),
        })
    }
}

impl Accept for UnixListener {
    type Raw = UnixStream;
    type Stream = AnyAuthority<UnixStream>;

    async fn next(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }

    async fn greet(stream: UnixStream, _: &Gate) -> Result<Guest<Self::Stream>, &'static str> {
        let peer = match stream.peer_cred() {
            Ok(peer) => {
                let pid = peer.pid().unwrap_or_default();
                format!("unix user {} process {pid}", peer.uid())
            }
            Err(_) => "unix".to_owned(),
        };
        Ok(Guest {
            stream: AnyAuthority::new(stream),
            caller: Caller {
                identity: None,
                peer: peer.into(),
            },
            permit: Permit::of(Role::Local),
            http2: false,
            place: None,
        })
    }
}

/// The connections of an endpoint. See the module.
#[derive(Debug)]
struct Connections {
    most: usize,
    open: Mutex<BTreeMap<u64, Arc<Activity>>>,
}

impl Connections {
    fn open(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Activity>>> {
        // Only whole insertions and removals happen under it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one in, in the place of another if need be; false when there is no place.
    fn enter(&self, number: u64, activity: &Arc<Activity>) -> bool {
        let mut open = self.open();
        let unknown = || open.values().filter(|activity| !activity.is_greeted());
        if open.len() >= self.most || unknown().count() >= (self.most / 4).max(FEWEST_UNKNOWN) {
            let idle = open
                .iter()
                .filter_map(|(number, activity)| {
                    Some((activity.is_greeted(), activity.idle_since()?, *number))
                })
                .min();
            let Some((_, _, oldest)) = idle else {
                return false;
            };
            if let Some(oldest) = open.remove(&oldest) {
                oldest.evict();
            }
        }
        open.insert(number, Arc::clone(activity));
        show(open.len());
        true
    }

    fn leave(&self, number: u64) {
        let mut open = self.open();
        open.remove(&number);
        show(open.len());
    }
}

fn show(open: usize) {
    gauge!("slat_connections").set(f64::from(u32::try_from(open).unwrap_or(u32::MAX)));
}

fn closed(cause: &'static str) {
    counter!("slat_connections_closed_total", "cause" => cause).increment(1);
}

fn describe() {
    describe_gauge!("slat_connections", "Connections of this endpoint.");
    describe_counter!(
        "slat_connections_closed_total",
        "Connections that were not taken or not kept, by cause."
    );
    show(0);
    for cause in [
        "limit",
        "evicted",
        "silent",
        "idle",
        "descriptors",
        "failed",
        "refused",
        "identity",
    ] {
        counter!("slat_connections_closed_total", "cause" => cause).increment(0);
    }
    refusals::describe();
    describe_counter!(
        "slat_calls_refused_total",
        "Calls that their caller may not make, by why: its role, its limits by labels, or how \
         often it calls."
    );
    for cause in ["role", "scope", "rate"] {
        counter!("slat_calls_refused_total", "cause" => cause).increment(0);
    }
}

/// Takes connections until `stopped`, then waits for the last one.
pub(super) async fn accept<L: Accept>(
    listener: L,
    (router, gate): (Router, Gate),
    most: usize,
    mut stopped: watch::Receiver<bool>,
) {
    describe();
    let connections = Arc::new(Connections {
        most,
        open: Mutex::default(),
    });
    let mut tasks = JoinSet::new();
    let mut number = 0;
    let mut pause = PAUSE;
    let stop = stopped.clone();
    loop {
        let raw = tokio::select! {
            () = wait(&mut stopped) => break,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            accepted = listener.next() => match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    if is_of_one_connection(&error) {
                        continue;
                    }
                    if pause == PAUSE {
                        tracing::error!(%error, "no connection can be taken; trying again");
                    }
                    closed(if is_exhausted(&error) { "descriptors" } else { "failed" });
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    continue;
                }
            },
        };
        pause = PAUSE;
        number += 1;
        let activity = Activity::new();
        if !connections.enter(number, &activity) {
            closed("limit");
            tracing::debug!(
                most,
                "a connection was closed: all places have requests running"
            );
            continue;
        }
        let (connections, router, stop) = (Arc::clone(&connections), router.clone(), stop.clone());
        let (gate, mut stopping) = (gate.clone(), stop.clone());
        tasks.spawn(async move {
            let greeted = tokio::select! {
                () = wait(&mut stopping) => Err(None),
                () = activity.evicted() => Err(Some("evicted")),
                greeted = L::greet(raw, &gate) => greeted.map_err(Some),
            };
            let cause = match greeted {
                Ok(guest) => {
                    activity.greet();
                    connection::serve(guest, gate.access, router, activity, stop).await
                }
                Err(cause) => cause,
            };
            if let Some(cause) = cause {
                closed(cause);
            }
            connections.leave(number);
        });
    }
    drop(listener);
    while tasks.join_next().await.is_some() {}
}

/// Whether this process or the machine has no descriptor left.
fn is_exhausted(error: &io::Error) -> bool {
    let refused = ApiError::new(Reason::PeerUnreachable, "").because_of(error);
    refused.reason == Reason::DescriptorsExhausted
}

/// Whether an error of accept is that of a connection which is gone already.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A process that has no descriptor left.
    struct NoneLeft(Arc<AtomicUsize>);

    impl Accept for NoneLeft {
        type Raw = UnixStream;
        type Stream = UnixStream;

        async fn next(&self) -> io::Result<UnixStream> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Err(io::Error::from_raw_os_error(24))
        }

        async fn greet(_: UnixStream, _: &Gate) -> Result<Guest<UnixStream>, &'static str> {
            Err("failed")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_without_descriptors_does_not_spin() {
        let asked = Arc::new(AtomicUsize::new(0));
        let (stop, stopped) = watch::channel(false);
        let listener = NoneLeft(Arc::clone(&asked));
        let task = tokio::spawn(accept(
            listener,
            (Router::new(), Gate::default()),
            1,
            stopped,
        ));
        tokio::time::sleep(Duration::from_secs(60)).await;
        stop.send_replace(true);
        task.await.unwrap();
        let asked = asked.load(Ordering::SeqCst);
        assert!((10..=70).contains(&asked), "{asked}");
    }

    #[test]
    fn who_is_not_known_yet_pushes_out_its_like_and_nobody_who_is() {
        let connections = Connections {
            most: 16,
            open: Mutex::default(),
        };
        let known = |number: u64| {
            let activity = Activity::new();
            assert!(connections.enter(number, &activity));
            activity.greet();
        };
        (0..12).for_each(known);
        for number in 20..50 {
            assert!(connections.enter(number, &Activity::new()));
        }
        let left: Vec<u64> = connections.open().keys().copied().collect();
        let expected: Vec<u64> = (0..12).chain(46..50).collect();
        assert_eq!(left, expected);
        // Who becomes known has a place, at the cost of one who is not.
        known(50);
        let left: Vec<u64> = connections.open().keys().copied().collect();
        let expected: Vec<u64> = (0..12).chain([47, 48, 49, 50]).collect();
        assert_eq!(left, expected);
    }
}
