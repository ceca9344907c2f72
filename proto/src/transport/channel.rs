//! The client's end of an endpoint: every call between processes goes through here.
//!
//! A call carries the trace context and, within a host, the time until which it may begin
//! ([`super::expiry`]). It has the deadline of its method and is made again where the table says so
//! ([`super::retry`]). What the transport says when a peer went away, in whatever
//! moment of a call or a stream, becomes PEER_UNREACHABLE with the peer's address and advice. An
//! answer is bounded before it is kept. [`GRPC_CODE`] in the metadata of an error says that this
//! end made it, or a proxy; an error without it is the peer's own.

use std::{
    error::Error,
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full};
use slat_trust::Refusal;
use tokio::time::{Instant, timeout_at};
use tonic::{Status, body::Body, transport::Channel};
use tonic_types::StatusExt as _;
use tower::{Service, ServiceExt as _};

use super::{
    address::Address,
    audit::RELAYED,
    body::{Patience, WatchedBody},
    expiry,
    retry::{self, ATTEMPTS, FIRST_PAUSE},
    tls, trace,
};
use crate::{
    ApiError, Reason,
    error::{GRPC_CODE, causes, transport_reason},
};

/// A channel to an endpoint. See the module. Clones share its connection.
#[derive(Clone)]
pub struct TracedChannel {
    channel: Channel,
    address: Arc<Address>,
    margin: Duration,
    relays: bool,
}

impl fmt::Debug for TracedChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TracedChannel")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl TracedChannel {
    pub(super) fn new(channel: Channel, address: Address) -> Self {
        Self {
            channel,
            address: Arc::new(address),
            margin: Duration::ZERO,
            relays: false,
        }
    }

    /// Waits so much longer than a call may take: for one that asks through others and would hear
    /// from them who is late.
    #[must_use]
    pub fn with_margin(mut self, margin: Duration) -> Self {
        self.margin = margin;
        self
    }

    /// For calls on behalf of a caller that this process has audited: the other end does not audit
    /// them again.
    #[must_use]
    pub fn relaying(mut self) -> Self {
        self.relays = true;
        self
    }

    async fn call_by_table(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let policy = retry::of(request.uri().path());
        let limit = policy.deadline + self.margin;
        let deadline = Instant::now() + limit;
        let called = async {
            if policy.streams {
                let answer = self.once(request).await?;
                let address = Arc::clone(&self.address);
                return Ok(answer.map(|body| {
                    let failed =
                        move |error: Box<dyn Error + Send + Sync>| failed(&address, error.as_ref());
                    Body::new(WatchedBody::new(body, Patience::Unlimited, failed))
                }));
            }
            self.whole(request, policy.idempotent).await
        };
        match timeout_at(deadline, called).await {
            Ok(answer) => answer,
            Err(_) => Err(unreachable(
                &self.address,
                Reason::PeerUnreachable,
                &format!("no answer within {} s", limit.as_secs()),
            )
            .with("deadline_seconds", limit.as_secs())
            .into()),
        }
    }

    /// A call whose answer is one message: kept whole, and made again where it may be.
    async fn whole(
        &self,
        request: Request<Body>,
        idempotent: bool,
    ) -> Result<Response<Body>, Status> {
        let (parts, body) = request.into_parts();
        // Nothing is sent that no server would take.
        let own = WatchedBody::new(body, Patience::Unlimited, Status::from_error);
        let message = own.collect().await?.to_bytes();
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let mut again = Request::new(Body::new(Full::new(message.clone())));
            again.method_mut().clone_from(&parts.method);
            again.uri_mut().clone_from(&parts.uri);
            again.headers_mut().clone_from(&parts.headers);
            again.extensions_mut().clone_from(&parts.extensions);
            match self.collected(again).await {
                Err(status) if idempotent && attempt < ATTEMPTS && may_pass(&status) => {
                    tracing::debug!(%status, method = parts.uri.path(), "a call is made again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                answer => return answer,
            }
        }
        Err(Status::internal("no attempt was made"))
    }

    async fn collected(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (parts, body) = self.once(request).await?.into_parts();
        let address = Arc::clone(&self.address);
        let failed = move |error: Box<dyn Error + Send + Sync>| failed(&address, error.as_ref());
        let body = WatchedBody::new(body, Patience::Unlimited, failed);
        let whole = body.collect().await?;
        Ok(Response::from_parts(parts, Body::new(whole)))
    }

    async fn once(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let answer = self.channel.clone().oneshot(request).await;
        answer.map_err(|error| failed(&self.address, &error))
    }
}

/// Whether another attempt may find the peer.
fn may_pass(status: &Status) -> bool {
    let reason = status.get_details_error_info().map(|info| info.reason);
    reason.is_some_and(|reason| {
        matches!(
            Reason::parse(&reason),
            Some(Reason::PeerUnreachable | Reason::DescriptorsExhausted)
        )
    })
}

/// The status of a failure of the transport; a status among its causes is our own end's.
fn failed(address: &Address, error: &(dyn Error + 'static)) -> Status {
    let own = causes(error)
        .find_map(|cause| cause.downcast_ref::<Status>())
        .filter(|status| status.get_details_error_info().is_some());
    if let Some(own) = own {
        return own.clone();
    }
    if let Address::Tcp(host) = address {
        let inadequate = Some(h2::Reason::INADEQUATE_SECURITY);
        let refused = |cause: &(dyn Error + 'static)| {
            let broken = cause.downcast_ref::<h2::Error>();
            broken.is_some_and(|error| error.reason() == inadequate)
        };
        if causes(error).any(refused) {
            return tls::speaks_tls(host).into();
        }
        // A peer that was refused while the connection lasted, by either end.
        let io = causes(error).filter_map(|cause| cause.downcast_ref::<std::io::Error>());
        let refusal = io
            .filter_map(|error| Some((Refusal::of_io(error)?, error)))
            .next();
        if let Some((refusal, error)) = refusal {
            return tls::told(&refusal, host, Refusal::is_by_peer(error)).into();
        }
    }
    unreachable(address, transport_reason(error), &words(error)).into()
}

fn unreachable(address: &Address, reason: Reason, words: &str) -> ApiError {
    let (message, advice) = if reason == Reason::DescriptorsExhausted {
        (
            format!("no descriptor is left for a connection to {address}"),
            "raise LimitNOFILE of this process, or end what holds its descriptors",
        )
    } else {
        (
            format!("{address} does not answer: {words}"),
            "see that the process of that address runs, and that the network lets calls through",
        )
    };
    ApiError::new(reason, message)
        .with("address", address)
        .with(GRPC_CODE, format!("{:?}", reason.code()))
        .with("advice", advice)
}

/// What the transport says, each cause once.
fn words(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for cause in causes(error) {
        // A status shown as a whole shows its source, too, as a programmer writes it.
        let status = cause.downcast_ref::<Status>();
        let cause = status.map_or_else(|| cause.to_string(), |own| own.message().to_owned());
        if cause != "transport error" && !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    if text.is_empty() {
        text.push_str("the connection broke");
    }
    text
}

impl Service<Request<Body>> for TracedChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    /// Always: each call waits for the connection itself, within its deadline.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        trace::inject(request.headers_mut());
        if self.relays {
            let yes = HeaderValue::from_static("1");
            request.headers_mut().insert(RELAYED, yes);
        }
        if matches!(*self.address, Address::Unix(_)) {
            let limit = retry::of(request.uri().path()).deadline + self.margin;
            expiry::inject(request.headers_mut(), limit);
        }
        Box::pin(self.clone().call_by_table(request))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_status_among_the_causes_is_told_by_its_words() {
        let broken = io::Error::new(io::ErrorKind::BrokenPipe, "the pipe is broken");
        let status = Status::from_error(Box::new(broken));
        let told = words(&status);
        assert!(told.contains("the pipe is broken"), "{told}");
        assert!(!told.contains("source:"), "{told}");
    }
}
