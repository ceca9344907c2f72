//! An answer that ends when what its caller may do changes: the services ask once, when a call
//! begins, and a watch may last for days.
//!
//! The first message of an answer is always given: it may tell of what was done.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;

use crate::ApiError;

/// Returns when an answer is to end.
pub(super) type Ends = Pin<Box<dyn Future<Output = ()> + Send>>;

/// See the module.
pub(super) struct Lasting {
    inner: Option<AxumBody>,
    ends: Ends,
    ended: bool,
    /// A message, or a part of one, was given.
    given: bool,
    words: ApiError,
}

impl Lasting {
    /// `inner` until `ends`, and then these words as the call's status.
    pub(super) fn new(inner: AxumBody, ends: Ends, words: ApiError) -> Self {
        Self {
            inner: Some(inner),
            ends,
            ended: false,
            given: false,
            words,
        }
    }

    /// The words, in place of what would come.
    fn end(&mut self) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.inner = None;
        let mut trailers = HeaderMap::new();
        let status = Status::from(self.words.clone());
        Poll::Ready(Some(match status.add_header(&mut trailers) {
            Ok(()) => Ok(Frame::trailers(trailers)),
            Err(error) => Err(axum::Error::new(error)),
        }))
    }
}

impl Body for Lasting {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let Some(inner) = &mut this.inner else {
            return Poll::Ready(None);
        };
        this.ended = this.ended || this.ends.as_mut().poll(context).is_ready();
        let frame = Pin::new(inner).poll_frame(context);
        match &frame {
            Poll::Pending if this.ended => this.end(),
            Poll::Ready(Some(Ok(data))) if data.is_data() => {
                if this.ended && this.given {
                    return this.end();
                }
                this.given = true;
                frame
            }
            _ => frame,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        // It may end earlier.
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::response::Response;
    use http::Request;
    use http_body_util::{BodyExt as _, StreamBody};
    use tokio::sync::mpsc;
    use tokio_stream::{StreamExt as _, wrappers::UnboundedReceiverStream};
    use tower::ServiceExt as _;

    use super::super::{super::caller::Caller, Access, AccessGuard, Permit, Role, Users};

    type Messages = mpsc::UnboundedSender<&'static str>;

    /// A watch by `who`, who is operator: its messages are given by hand.
    async fn watch(access: &Access, who: &str, method: &str) -> (Messages, Response) {
        let (give, given) = mpsc::unbounded_channel();
        let frames = UnboundedReceiverStream::new(given)
            .map(|words: &str| Ok::<_, Infallible>(super::Frame::data(words.into())));
        let mut body = Some(super::AxumBody::new(StreamBody::new(frames)));
        let inner = tower::service_fn(move |_: Request<super::AxumBody>| {
            let body = body.take().unwrap_or_default();
            async { Ok::<_, Infallible>(Response::new(body)) }
        });
        let mut request = Request::post(method)
            .body(super::AxumBody::empty())
            .unwrap();
        request.extensions_mut().insert(Caller {
            identity: Some(format!("spiffe://example.org/slat/{who}").into()),
            peer: "192.0.2.7:4242".into(),
        });
        request.extensions_mut().insert(Permit::of(Role::Operator));
        let guard = AccessGuard::grpc(inner, access.clone(), false);
        (give, guard.oneshot(request).await.unwrap())
    }

    fn bob_is(role: Role) -> Users {
        [("bob".to_owned(), Permit::of(role))].into_iter().collect()
    }

    #[tokio::test]
    async fn a_watch_ends_when_its_users_role_is_another() {
        let access = Access::default();
        access.set_users(bob_is(Role::Operator));
        let path = "/slat.v1.VmService/WatchVm";
        let (give, answer) = watch(&access, "user/bob", path).await;
        let mut body = answer.into_body();
        give.send("one").unwrap();
        assert!(body.frame().await.unwrap().unwrap().is_data());
        // Another user's change is nothing to this one.
        let mut users = bob_is(Role::Operator);
        users.0.insert("eve".into(), Permit::of(Role::Viewer));
        access.set_users(users);
        give.send("two").unwrap();
        assert!(body.frame().await.unwrap().unwrap().is_data());
        access.set_users(bob_is(Role::Viewer));
        give.send("three").unwrap();
        let trailers = body.frame().await.unwrap().unwrap().into_trailers();
        let trailers = trailers.expect("no message after it");
        let status = tonic::Status::from_header_map(&trailers).unwrap();
        assert_eq!(status.code(), tonic::Code::PermissionDenied);
        assert!(status.message().contains("was changed"), "{status:?}");
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn one_answer_is_given_and_an_agents_role_is_its_certificates() {
        let access = Access::default();
        access.set_users(bob_is(Role::Operator));
        let path = "/slat.v1.VmService/PauseVm";
        let (give, answer) = watch(&access, "user/bob", path).await;
        access.set_users(bob_is(Role::Viewer));
        give.send("it is done").unwrap();
        drop(give);
        let whole = answer.into_body().collect().await.unwrap();
        assert_eq!(whole.to_bytes(), "it is done");

        let (give, answer) = watch(&access, "agent/host-a", path).await;
        let mut body = answer.into_body();
        give.send("one").unwrap();
        assert!(body.frame().await.unwrap().unwrap().is_data());
        access.set_users(Users::default());
        give.send("two").unwrap();
        assert!(body.frame().await.unwrap().unwrap().is_data());
    }
}
