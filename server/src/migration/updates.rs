//! The stream behind WatchMigration.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use slat_proto::{ApiError, Reason, model::Timeline, v1};
use tokio::sync::watch;
use tokio_stream::{Stream, wrappers::WatchStream};

use super::record::shown;
use crate::phase::has_ended;

/// A migration now and at each change, ending after its terminal phase.
pub(crate) struct Updates {
    inner: WatchStream<v1::Migration>,
    timeline: Timeline,
    name: String,
    over: bool,
}

impl Updates {
    pub(super) fn new(
        shown: watch::Receiver<v1::Migration>,
        timeline: Timeline,
        name: String,
    ) -> Self {
        Self {
            inner: WatchStream::new(shown),
            timeline,
            name,
            over: false,
        }
    }
}

impl Stream for Updates {
    type Item = Result<v1::Migration, tonic::Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        let Poll::Ready(next) = Pin::new(&mut self.inner).poll_next(cx) else {
            return Poll::Pending;
        };
        Poll::Ready(Some(match next {
            Some(migration) => {
                self.over = has_ended(migration.phase());
                Ok(shown(migration, &self.timeline))
            }
            None => {
                self.over = true;
                Err(ApiError::new(
                    Reason::PeerUnreachable,
                    "the server stops watching; the migration goes on",
                )
                .with("migration", &self.name)
                .with("advice", "watch again")
                .into())
            }
        }))
    }
}
