//! Refuses a call that its caller may not make, before a service sees it.
//!
//! A user who is limited by labels asks the server, whose services know the limits: no page is for
//! such a user, and nothing at an endpoint that refuses them ([`super::super::Endpoint`]).

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::Body as AxumBody,
    response::{IntoResponse as _, Response},
};
use http::{Request, StatusCode};
use metrics::counter;
use tonic::Status;
use tower::Service;

use super::{
    super::{caller::Caller, methods},
    Access, Permit, Role,
    lasting::{Ends, Lasting},
    right, right_of_path,
};
use crate::{ApiError, Reason};

/// See the module.
#[derive(Clone)]
pub(in super::super) struct AccessGuard<S> {
    inner: S,
    access: Access,
    /// Requests are gRPC; else plain HTTP.
    grpc: bool,
    /// Services here know no limits by labels.
    refuses_limited: bool,
}

impl<S> fmt::Debug for AccessGuard<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessGuard").finish_non_exhaustive()
    }
}

impl<S> AccessGuard<S> {
    pub(in super::super) fn grpc(inner: S, access: Access, refuses_limited: bool) -> Self {
        Self {
            inner,
            access,
            grpc: true,
            refuses_limited,
        }
    }

    pub(in super::super) fn http(inner: S, access: Access) -> Self {
        Self {
            inner,
            access,
            grpc: false,
            refuses_limited: true,
        }
    }

    /// When the answer ends whatever the service does, and with which words.
    fn lasts(&self, request: &Request<AxumBody>) -> Option<(Ends, ApiError)> {
        let extensions = request.extensions();
        let (caller, permit) = (extensions.get::<Caller>()?, extensions.get::<Permit>()?);
        let path = request.uri().path();
        if right(methods::known(path)?) == Some(super::Right::Anyone) {
            return None;
        }
        let ends = self.access.changes(caller, permit)?;
        Some((Box::pin(ends), changed(path, caller)))
    }

    fn refusal(&self, request: &Request<AxumBody>) -> Option<ApiError> {
        let path = request.uri().path();
        let extensions = request.extensions();
        // Both are there for every request that came over a connection.
        let (Some(caller), Some(permit)) = (extensions.get::<Caller>(), extensions.get::<Permit>())
        else {
            return Some(denied(path, None, None));
        };
        if let Err(refused) = self.access.call(caller, permit) {
            counter!("slat_calls_refused_total", "cause" => "rate").increment(1);
            return Some(refused);
        }
        let right = if self.grpc {
            // Of what does not exist, the guard behind this says so.
            right(methods::known(path)?)
        } else {
            Some(right_of_path(path))
        };
        let allowed = match (right, permit.role) {
            (Some(right), Some(role)) => right.allows(role),
            (Some(right), None) => right == super::Right::Anyone,
            (None, _) => false,
        };
        if !allowed {
            counter!("slat_calls_refused_total", "cause" => "role").increment(1);
            return Some(denied(path, Some(caller), permit.role));
        }
        let limited = self.refuses_limited && !permit.scope.is_all();
        if limited && right != Some(super::Right::Anyone) {
            counter!("slat_calls_refused_total", "cause" => "scope").increment(1);
            return Some(limited_elsewhere(path, caller, permit.role));
        }
        None
    }
}

/// What an answer ends with whose caller may something else now.
fn changed(path: &str, caller: &Caller) -> ApiError {
    let (who, method) = (caller.who(), shown(path));
    ApiError::new(
        Reason::Permission,
        format!("what {who} may do was changed, and {method} ends here"),
    )
    .with("identity", who)
    .with("method", method)
    .with("advice", "ask again; what is still allowed goes on")
}

fn limited_elsewhere(path: &str, caller: &Caller, role: Option<Role>) -> ApiError {
    let method = shown(path);
    let who = caller.who();
    let words = format!("{who} is limited by labels, and no limits are known to {method} here");
    ApiError::new(Reason::Permission, words)
        .with("identity", who)
        .with("role", role.map_or("none", Role::as_str))
        .with("method", method)
        .with("advice", "ask the server, by its API or by slat")
}

fn shown(path: &str) -> String {
    let path: String = path.chars().take(120).collect();
    path.trim_start_matches('/').escape_default().to_string()
}

fn denied(path: &str, caller: Option<&Caller>, role: Option<Role>) -> ApiError {
    let method = shown(path);
    let who = caller.map_or("nobody known", Caller::who);
    let (words, advice) = match role {
        Some(role) => (
            format!("{who} is {role}, who may not call {method}"),
            "ask somebody whose role may; docs/access.md has the table",
        ),
        None => (
            format!("{who} has no role here"),
            "have the user entered in the file that the endpoint reads with --access",
        ),
    };
    ApiError::new(Reason::Permission, words)
        .with("identity", who)
        .with("role", role.map_or("none", Role::as_str))
        .with("method", method)
        .with("advice", advice)
}

impl<S> Service<Request<AxumBody>> for AccessGuard<S>
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
        let Some(refused) = self.refusal(&request) else {
            let ends = self.grpc.then(|| self.lasts(&request)).flatten();
            let answer = self.inner.call(request);
            return match ends {
                None => Box::pin(answer),
                Some((ends, words)) => Box::pin(async move {
                    let answer = answer.await?;
                    Ok(answer.map(|inner| AxumBody::new(Lasting::new(inner, ends, words))))
                }),
            };
        };
        let answer = if self.grpc {
            Status::from(refused)
                .into_http::<AxumBody>()
                .into_response()
        } else {
            let path = request.uri().path().chars().take(120).collect::<String>();
            let who = request.extensions().get::<Caller>().map_or("", Caller::who);
            tracing::info!(target: "audit", peer = who, method = %path.escape_default(),
                result = refused.reason.as_str(), "a page was refused");
            let status = match refused.reason {
                Reason::RateLimited => StatusCode::TOO_MANY_REQUESTS,
                _ => StatusCode::FORBIDDEN,
            };
            (status, format!("{}\n", refused.message)).into_response()
        };
        Box::pin(std::future::ready(Ok(answer)))
    }
}
