//! Patience with a server that stops answering while it is watched: a word on standard error, then
//! the question again and again, until it answers or the time is over (exit code 5). An answer that
//! something is wrong ends the watch at once.

use std::time::{Duration, Instant};

use slat_proto::{ApiError, Reason, error::GRPC_CODE};
use tonic::Code;

use crate::{
    failure::Failure,
    term::{out, units::Span},
};

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(500);

/// Option of commands that watch.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct PatienceArgs {
    /// While watching: how long to ask again when the server stops answering, as 5m; then exit
    /// code 5
    #[arg(long, default_value = "60s", value_name = "DURATION", global = true)]
    reconnect_timeout: Span,
}

impl PatienceArgs {
    /// Fresh patience.
    pub(crate) fn patience(self) -> Patience {
        Patience::of(self.reconnect_timeout.0)
    }
}

/// How long a silence has lasted, and how long it may.
#[derive(Clone, Debug)]
pub(crate) struct Patience {
    limit: Duration,
    pause: Duration,
    heard_once: bool,
    silent_since: Option<Instant>,
}

impl Default for Patience {
    fn default() -> Self {
        Self::of(Duration::from_secs(60))
    }
}

impl Patience {
    /// With a server that may be silent for `limit`. The first silence counts: whoever follows has
    /// had an answer already.
    pub(crate) fn of(limit: Duration) -> Self {
        Self {
            limit,
            pause: PAUSE.min(limit),
            heard_once: true,
            silent_since: None,
        }
    }

    /// The same, where nothing was heard yet: a first call that fails is a wrong address more often
    /// than a restart, and fails at once.
    pub(crate) fn once_heard(self) -> Self {
        Self {
            heard_once: false,
            ..self
        }
    }

    /// The server answered.
    pub(crate) fn heard(&mut self) {
        self.heard_once = true;
        if self.silent_since.take().is_some() {
            out::say("there are answers again");
        }
    }

    /// Waits before the next attempt, or gives up.
    ///
    /// # Errors
    /// `error`, when it is an answer, or when patience is over.
    pub(crate) async fn lost(&mut self, doing: &str, error: ApiError) -> Result<(), Failure> {
        if !self.heard_once || !is_silence(&error) {
            return Err(Failure::api(doing, error));
        }
        let limit = Span(self.limit);
        let since = *self.silent_since.get_or_insert_with(|| {
            out::say(format!(
                "no answer ({}); asking again for {limit}",
                error.message
            ));
            Instant::now()
        });
        if since.elapsed() >= self.limit {
            let mut error = error;
            error.reason = Reason::PeerUnreachable;
            error.message = format!("no answer for {limit}: {}", error.message);
            return Err(Failure::api(doing, error));
        }
        tokio::time::sleep(self.pause).await;
        Ok(())
    }
}

/// Whether nobody answered, as against an answer that something is wrong. A stream that breaks off
/// in the middle comes as a status of the transport's own making, whatever its code.
pub(super) fn is_silence(error: &ApiError) -> bool {
    error.reason.code() == Code::Unavailable
        || (error.reason == Reason::Internal && error.metadata.contains_key(GRPC_CODE))
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    #[test]
    fn a_broken_stream_is_silence_and_a_refusal_is_an_answer() {
        let silence = |status: Status| is_silence(&ApiError::from(status));
        assert!(silence(Status::internal("h2 protocol error")));
        assert!(silence(Status::unavailable("tcp connect error")));
        assert!(silence(
            ApiError::new(Reason::HostUnreachable, "hosts/a").into()
        ));
        assert!(!silence(Status::unimplemented("")));
        assert!(!silence(Status::out_of_range(
            "Error, decoded message length too large: found 9 bytes"
        )));
        assert!(!silence(
            ApiError::new(Reason::NoSuchMigration, "no migration m").into()
        ));
    }

    #[tokio::test]
    async fn a_silence_that_lasts_ends_with_code_5_and_a_first_one_at_once() {
        let gone = || ApiError::from(Status::unavailable("tcp connect error"));
        let mut fresh = Patience::of(Duration::from_secs(60)).once_heard();
        let failure = fresh.lost("watch vms", gone()).await.unwrap_err();
        assert_eq!(failure.exit_code(), 5);
        let mut patience = Patience::of(Duration::ZERO).once_heard();
        patience.heard();
        let failure = patience.lost("watch vms", gone()).await.unwrap_err();
        assert_eq!(failure.exit_code(), 5);
        assert!(
            failure.render().contains("no answer for 0 s"),
            "{}",
            failure.render()
        );
    }

    #[tokio::test]
    async fn whoever_is_heard_again_gets_new_patience() {
        let gone = || ApiError::from(Status::unavailable("tcp connect error"));
        let mut patience = Patience::of(Duration::from_millis(1));
        patience.limit = Duration::from_secs(60);
        patience.lost("watch vms", gone()).await.unwrap();
        assert!(patience.silent_since.is_some());
        patience.heard();
        assert!(patience.silent_since.is_none());
        let refused = ApiError::new(Reason::NoSuchVm, "no VM");
        assert_eq!(
            patience
                .lost("watch vms", refused)
                .await
                .unwrap_err()
                .exit_code(),
            3
        );
    }
}
