//! One served connection, from its first byte to its end.
//!
//! A connection that brings no request within [`FIRST_REQUEST`] is closed; one without a request
//! for [`IDLE`] is told to go away (GOAWAY) and closed. A peer that is gone without a word is found
//! by HTTP/2 pings, and below HTTP by TCP keepalive and the user timeout. Requests are counted from
//! their headers to the end of their answer's body.

use std::{
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body as AxumBody, response::Response};
use bytes::Bytes;
use http::Request;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, watch},
    time::Instant,
};
use tower::ServiceExt as _;

use super::{
    access::{Access, Permit},
    guest::Guest,
};

/// How long a connection may take to bring its first request.
pub(super) const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// How long it may be without a request afterwards.
pub(super) const IDLE: Duration = Duration::from_secs(300);
/// How long the headers of an HTTP/1 request may take, and an HTTP/1 connection be idle.
const HEADERS: Duration = Duration::from_secs(60);
/// A silent HTTP/2 peer is pinged this often, and given up after as long again.
const PING: Duration = Duration::from_secs(15);
/// From GOAWAY to the end of a connection that does not close.
const LEAVE: Duration = Duration::from_secs(5);
/// Requests on one connection at a time.
const STREAMS: u32 = 256;
/// Bytes of headers of one request.
const HEADER_BYTES: u32 = 32 << 10;

/// How a connection is used; shared with what decides which one is closed.
#[derive(Debug)]
pub(super) struct Activity {
    begun: Instant,
    /// Milliseconds after `begun`, when a request last began or ended.
    last: AtomicU64,
    running: AtomicUsize,
    /// Who is there is known.
    greeted: AtomicBool,
    spoken: AtomicBool,
    /// Told when it must make room for another.
    evicted: Notify,
}

impl Activity {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            begun: Instant::now(),
            last: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            greeted: AtomicBool::new(false),
            spoken: AtomicBool::new(false),
            evicted: Notify::new(),
        })
    }

    /// When it was last used; `None` while a request runs.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let last = Duration::from_millis(self.last.load(Ordering::Acquire));
        (self.running.load(Ordering::Acquire) == 0).then(|| self.begun + last)
    }

    /// Whether it is known who is there.
    pub(super) fn is_greeted(&self) -> bool {
        self.greeted.load(Ordering::Acquire)
    }

    /// It is known who is there.
    pub(super) fn greet(&self) {
        self.greeted.store(true, Ordering::Release);
    }

    /// Ends the connection.
    pub(super) fn evict(&self) {
        self.evicted.notify_one();
    }

    /// Returns when it is to end.
    pub(super) async fn evicted(&self) {
        self.evicted.notified().await;
    }

    fn touch(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Release);
    }

    /// When it is to be closed if nothing happens until then, and as what.
    fn limit(&self) -> (Instant, &'static str) {
        let (limit, cause) = if self.spoken.load(Ordering::Acquire) {
            (IDLE, "idle")
        } else {
            (FIRST_REQUEST, "silent")
        };
        match self.idle_since() {
            Some(since) => (since + limit, cause),
            // Looked at again.
            None => (Instant::now() + limit, cause),
        }
    }
}

/// A request that runs; its drop is its end.
struct Running(Arc<Activity>);

impl Running {
    fn begin(activity: &Arc<Activity>) -> Self {
        activity.running.fetch_add(1, Ordering::AcqRel);
        activity.spoken.store(true, Ordering::Release);
        Self(Arc::clone(activity))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.touch();
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// An answer's body, which keeps its request running.
struct CountedBody {
    inner: AxumBody,
    _running: Running,
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Returns when the endpoint is stopped.
pub(super) async fn wait(stopped: &mut watch::Receiver<bool>) {
    // An error means the handle is gone: that is a stop too.
    drop(stopped.wait_for(|stop| *stop).await);
}

/// Serves one connection until it ends, `stopped`, or its time is up. Says why it was closed, when
/// it was.
pub(super) async fn serve(
    guest: Guest<impl AsyncRead + AsyncWrite + Unpin + Send + 'static>,
    access: Access,
    router: Router,
    activity: Arc<Activity>,
    mut stopped: watch::Receiver<bool>,
) -> Option<&'static str> {
    let counting = Arc::clone(&activity);
    let Guest {
        stream,
        caller,
        permit,
        http2,
        place: _place,
    } = guest;
    let service = tower::service_fn(move |mut request: Request<Incoming>| {
        // A user's role may have changed since the connection began.
        let permit: Permit = access.permit_now(&caller, &permit);
        request.extensions_mut().insert(caller.clone());
        request.extensions_mut().insert(permit);
        let running = Running::begin(&counting);
        let answer = router.clone().oneshot(request.map(AxumBody::new));
        async move {
            let answer: Response = answer.await?;
            Ok::<_, std::convert::Infallible>(answer.map(|inner| CountedBody {
                inner,
                _running: running,
            }))
        }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    if http2 {
        // Its settings go out at once: the caller waits for them, see `tls`.
        builder = builder.http2_only();
    }
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADER_BYTES);
    let mut connection =
        pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)));
    let mut leaving: Option<(Instant, Option<&'static str>)> = None;
    loop {
        let (limit, cause) = activity.limit();
        let until = leaving.map_or(limit, |(until, _)| until);
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "a connection broke");
                }
                return leaving.and_then(|(_, cause)| cause);
            }
            () = activity.evicted() => return Some("evicted"),
            () = wait(&mut stopped), if leaving.is_none() => {
                // The endpoint's drain ends what outlives it.
                leaving = Some((Instant::now() + IDLE, None));
                connection.as_mut().graceful_shutdown();
            }
            () = tokio::time::sleep_until(until) => match leaving {
                Some((_, cause)) => return cause,
                None if activity.limit().0 > Instant::now() => {}
                None if cause == "silent" => return Some(cause),
                None => {
                    leaving = Some((Instant::now() + LEAVE, Some(cause)));
                    connection.as_mut().graceful_shutdown();
                }
            },
        }
    }
}
