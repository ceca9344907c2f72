//! Who did what, and who may not: each call is logged once, at the endpoint where its caller asked,
//! with target `audit`. One that changes something, or is refused for who makes it, at level INFO;
//! one that only looks at level DEBUG.
//!
//! | field | what |
//! |---|---|
//! | `peer` | the caller's identity; without one its address, or its user and process |
//! | `address` | the address it calls from |
//! | `role` | what it is to Slat ([`super::access`]) |
//! | `method` | `slat.v1.VmService/DeleteVm` |
//! | `what` | the names and switches in the request, as `name=vms/web force=true` |
//! | `uid` | the VM's identity, from the request or else from the answer |
//! | `migration` | the migration's name, likewise |
//! | `trace` | the caller's trace, when it brought one |
//! | `result` | `OK`, the error's reason, or `CANCELLED` when the caller went away first |
//! | `seconds` | from the request to the end of the answer |
//!
//! Everything is taken to change something but what [`READS`] lists, so a new method is logged
//! before anybody thinks of it. The server asks agents, and agents ask VM processes, on behalf of a
//! caller whom they have logged: such a call says so ([`RELAYED`]) and is logged at level DEBUG,
//! unless it is refused. Only a server is believed, and whoever has the Unix socket or comes where
//! nobody is asked for a certificate; at an endpoint that nobody relays to
//! ([`super::Endpoint::entry`]) nobody is.
//!
//! One layer does it for all services: it reads the messages as they pass, up to a limit, by their
//! descriptors, and of them only what a line says ([`pick`]). What comes from outside is bounded
//! and escaped. The line is written by the drop of [`Entry`], which the answer's body owns: once,
//! however the call ends.

mod pick;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    convert::Infallible,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    task::{Context, Poll},
    time::Instant,
};

use axum::{body::Body as AxumBody, response::Response};
use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body::{Body, Frame, SizeHint};
use opentelemetry::trace::TraceContextExt as _;
use prost_reflect::{DescriptorPool, DynamicMessage, ReflectMessage as _, Value};
use tonic::Status;
use tonic_types::StatusExt as _;
use tower::Service;

use self::pick::Picked;
use super::{
    access::{Permit, Role},
    caller::Caller,
};
use crate::v1;

/// The header of a call that is made on behalf of another one.
pub(super) const RELAYED: &str = "slat-relayed";
/// Methods that change nothing: beginnings of their names, and reports, which order nothing.
const READS: [&str; 7] = [
    "Get",
    "List",
    "Watch",
    "Describe",
    "Digest",
    "Verify",
    "ReportHost",
];
/// Results that say that the caller may not do this.
const REFUSALS: [&str; 7] = [
    "PERMISSION",
    "RATE_LIMITED",
    "IDENTITY_WRONG",
    "GRANT_INVALID",
    "GRANT_EXPIRED",
    "GRANT_USED",
    "GRANT_KEY_UNKNOWN",
];
/// Of a message, so much is looked at.
const LOOK_AT: usize = 4 << 20;
/// Of a text from outside, so many characters are logged.
const TEXT: usize = 128;
/// Names in a request that say what it is about, where they are texts.
const NAMES: [&str; 13] = [
    "name",
    "vm_id",
    "vm",
    "host",
    "source",
    "destination",
    "migration",
    "migration_id",
    "cursor",
    "address",
    "save",
    "save_id",
    "base",
];
/// Messages inside a request that are looked into.
const INSIDE: [&str; 3] = ["migration", "vm", "host"];
/// Where the VM's identity stands.
const UIDS: [&str; 2] = ["vm_uid", "uid"];
/// Switches that are worth a word when they are on.
const SWITCHES: [&str; 4] = ["validate_only", "force", "give_up", "give_up_vms"];

#[derive(Debug)]
struct Method {
    name: String,
    /// It changes something, for all that is known.
    changes: bool,
    input: Picked,
    output: Picked,
}

/// Methods, by path.
static METHODS: LazyLock<BTreeMap<String, Method>> = LazyLock::new(|| {
    // Our own descriptor set. Without it nothing could be served either.
    let Ok(pool) = DescriptorPool::decode(v1::FILE_DESCRIPTOR_SET) else {
        return BTreeMap::new();
    };
    let services: Vec<_> = pool.services().collect();
    services
        .iter()
        .flat_map(|service| service.methods())
        .map(|method| {
            let name = format!("{}/{}", method.parent_service().full_name(), method.name());
            let method = Method {
                name: name.clone(),
                changes: !READS.iter().any(|read| method.name().starts_with(read)),
                input: Picked::new(
                    method.input(),
                    NAMES.iter().chain(&INSIDE).chain(&SWITCHES).chain(&UIDS),
                ),
                output: Picked::new(method.output(), UIDS.iter().chain(&INSIDE).chain(&["name"])),
            };
            (format!("/{name}"), method)
        })
        .collect()
});

/// What has passed of a body, no more than its first message: a stream may last for days.
#[derive(Clone, Debug, Default)]
struct Passed(Arc<Mutex<First>>);

#[derive(Debug, Default)]
struct First {
    pieces: Vec<Bytes>,
    bytes: usize,
    /// All that will be looked at is here.
    whole: bool,
}

impl First {
    fn all(&self) -> Cow<'_, [u8]> {
        match &*self.pieces {
            [one] => Cow::Borrowed(&**one),
            many => Cow::Owned(many.concat()),
        }
    }

    /// Bytes of the message, by the head of five bytes that comes before it.
    fn length(&self) -> Option<usize> {
        let mut bytes = self.pieces.iter().flat_map(|piece| piece.iter());
        let mut head = [0; 5];
        for byte in &mut head {
            *byte = *bytes.next()?;
        }
        let length = u32::from_be_bytes(head[1..].try_into().ok()?);
        usize::try_from(length).ok()
    }
}

impl Passed {
    fn add(&self, data: &Bytes) {
        // Only whole pushes happen under it.
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if first.whole {
            return;
        }
        first.bytes += data.len();
        first.pieces.push(data.clone());
        let there = first
            .length()
            .is_some_and(|length| first.bytes >= 5 + length);
        first.whole = there || first.bytes > LOOK_AT;
    }

    fn message(&self, of: &Picked) -> Option<DynamicMessage> {
        let first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let message = first.all();
        of.from(message.get(5..5 + first.length()?)?)
    }
}

/// One call. Its drop writes the line.
#[derive(Debug)]
struct Entry {
    method: &'static Method,
    caller: Caller,
    role: &'static str,
    trace: String,
    relayed: bool,
    begun: Instant,
    request: Passed,
    answer: Passed,
    result: Option<String>,
}

impl Entry {
    /// Takes the result from headers or trailers, when they have one.
    fn hear(&mut self, headers: &HeaderMap) {
        let Some(status) = Status::from_header_map(headers) else {
            return;
        };
        let reason = status.get_details_error_info().map(|info| info.reason);
        self.result = Some(match (status.code(), reason) {
            (tonic::Code::Ok, _) => "OK".to_owned(),
            (_, Some(reason)) => clean(&reason),
            (code, None) => format!("{code:?}"),
        });
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let result = self.result.as_deref().unwrap_or("CANCELLED");
        let refused = REFUSALS.contains(&result);
        let loud = refused || (!self.relayed && self.method.changes);
        // What nobody reads is not picked from the messages.
        let read = if loud {
            tracing::enabled!(target: "audit", tracing::Level::INFO)
        } else {
            tracing::enabled!(target: "audit", tracing::Level::DEBUG)
        };
        if !read {
            return;
        }
        let asked = self.request.message(&self.method.input);
        let what = asked.as_ref().map_or_else(String::new, what);
        let uid = asked.as_ref().and_then(uid).or_else(|| {
            let answered = self.answer.message(&self.method.output)?;
            uid(&answered)
        });
        let uid = uid.unwrap_or_default();
        let seconds = self.begun.elapsed().as_secs_f64();
        let asked = asked.as_ref().and_then(migration);
        let migration = asked.or_else(|| {
            let answered = self.answer.message(&self.method.output)?;
            migration(&answered)
        });
        let migration = migration.unwrap_or_default();
        let (method, peer, role) = (&*self.method.name, self.caller.who(), self.role);
        let (address, trace) = (&*self.caller.peer, &*self.trace);
        if self.relayed && !loud {
            tracing::debug!(target: "audit", peer, address, role, method, what, uid, migration, trace, result, seconds, "a relayed call");
        } else if loud {
            tracing::info!(target: "audit", peer, address, role, method, what, uid, migration, trace, result, seconds, "a call");
        } else {
            tracing::debug!(target: "audit", peer, address, role, method, what, uid, migration, trace, result, seconds, "a look");
        }
    }
}

/// Whether it calls on behalf of somebody whom it has logged.
fn may_relay(permit: &Permit) -> bool {
    matches!(permit.role, Some(Role::Server | Role::Local | Role::Open))
}

/// Bounded and escaped.
fn clean(text: &str) -> String {
    let bounded: String = text.chars().take(TEXT).collect();
    bounded.escape_default().to_string()
}

fn text(message: &DynamicMessage, field: &str) -> Option<String> {
    match message.get_field_by_name(field)?.as_ref() {
        Value::String(text) if !text.is_empty() => Some(clean(text)),
        _ => None,
    }
}

fn inside(message: &DynamicMessage) -> impl Iterator<Item = DynamicMessage> {
    INSIDE.into_iter().filter_map(|field| {
        let field = message.descriptor().get_field_by_name(field)?;
        if !message.has_field(&field) {
            return None;
        }
        message.get_field(&field).as_message().cloned()
    })
}

fn what(message: &DynamicMessage) -> String {
    let mut words = Vec::new();
    let of = |message: &DynamicMessage, words: &mut Vec<String>| {
        for name in NAMES {
            if let Some(text) = text(message, name) {
                words.push(format!("{name}={text}"));
            }
        }
    };
    of(message, &mut words);
    for inner in inside(message) {
        of(&inner, &mut words);
    }
    for switch in SWITCHES {
        let on = message
            .get_field_by_name(switch)
            .and_then(|value| value.as_bool());
        if on == Some(true) {
            words.push(format!("{switch}=true"));
        }
    }
    words.join(" ")
}

fn uid(message: &DynamicMessage) -> Option<String> {
    let of = |message: &DynamicMessage| UIDS.iter().find_map(|field| text(message, field));
    of(message).or_else(|| inside(message).find_map(|inner| of(&inner)))
}

/// A migration's name, as a field of its own or as what the message is.
fn migration(message: &DynamicMessage) -> Option<String> {
    let named = ["migration", "migration_id"];
    let own = named.iter().find_map(|field| text(message, field));
    let of = |message: &DynamicMessage| {
        text(message, "name").filter(|name| name.starts_with("migrations/"))
    };
    own.or_else(|| of(message))
        .or_else(|| inside(message).find_map(|inner| of(&inner)))
}

/// The id of the trace that a request brought.
fn trace(headers: &HeaderMap) -> String {
    let context = super::trace::remote_context(headers);
    let span = context.span().span_context().clone();
    if span.is_valid() {
        span.trace_id().to_string()
    } else {
        String::new()
    }
}

/// A request's body, noted as it passes.
struct Asked {
    inner: AxumBody,
    passed: Passed,
}

/// An answer's body, noted as it passes, and the call it ends.
struct Answered {
    inner: AxumBody,
    entry: Entry,
}

impl Body for Asked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.passed.add(data);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Body for Answered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            if let Some(data) = frame.data_ref() {
                self.entry.answer.add(data);
            }
            if let Some(trailers) = frame.trailers_ref() {
                self.entry.hear(trailers);
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Logs the calls of the service inside. See the module.
#[derive(Clone)]
pub(super) struct Audit<S> {
    inner: S,
    /// Nobody relays to this endpoint.
    entry: bool,
}

impl<S> fmt::Debug for Audit<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audit").finish_non_exhaustive()
    }
}

impl<S> Audit<S> {
    pub(super) fn new(inner: S, entry: bool) -> Self {
        Self { inner, entry }
    }
}

impl<S> Service<Request<AxumBody>> for Audit<S>
where
    S: Service<Request<AxumBody>, Response = Response, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<AxumBody>) -> Self::Future {
        let Some(method) = METHODS.get(request.uri().path()) else {
            return Box::pin(self.inner.call(request));
        };
        let caller = request.extensions().get::<Caller>();
        let permit = request.extensions().get::<Permit>();
        let mut entry = Entry {
            method,
            caller: caller.cloned().unwrap_or_else(|| Caller {
                identity: None,
                peer: "unknown".into(),
            }),
            role: permit.map_or("unknown", Permit::role_name),
            trace: trace(request.headers()),
            relayed: !self.entry
                && request.headers().contains_key(RELAYED)
                && permit.is_some_and(may_relay),
            begun: Instant::now(),
            request: Passed::default(),
            answer: Passed::default(),
            result: None,
        };
        let passed = entry.request.clone();
        let answer = self
            .inner
            .call(request.map(|inner| AxumBody::new(Asked { inner, passed })));
        Box::pin(async move {
            let answer = answer.await?;
            entry.hear(answer.headers());
            if !answer.status().is_success() {
                entry.result = Some(answer.status().to_string());
            }
            Ok(answer.map(|inner| AxumBody::new(Answered { inner, entry })))
        })
    }
}
