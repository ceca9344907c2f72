//! A call that its caller has given up is not begun.
//!
//! A process that is stopped by a signal finds, when it goes on, all the requests that came
//! meanwhile, each as whole as when it was sent. Its callers have long said that nothing was done.
//! So a call within one host says until when it may begin, and the endpoint refuses it afterwards.
//!
//! The time is that of CLOCK_MONOTONIC: one clock for all processes of a host, which nobody sets.
//! Nothing is said over TCP, where the other end's clock is another one. A call that has begun goes
//! on, however late it ends.

use std::{future::Future, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};
use rustix::time::{ClockId, clock_gettime};

use crate::{ApiError, Reason};

/// Nanoseconds of CLOCK_MONOTONIC after which the call is not begun.
const BEGIN_BEFORE: HeaderName = HeaderName::from_static("slat-begin-before-ns");

tokio::task_local! {
    static LAST: Duration;
}

fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    // Neither is negative, by the manual of clock_gettime.
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Makes the calls in `calls` such that none of them is begun by another process of this host later
/// than `limit` from now.
pub async fn begun_within<T>(limit: Duration, calls: impl Future<Output = T>) -> T {
    LAST.scope(now() + limit, calls).await
}

/// Says in the headers of a call what [`begun_within`] asked for; at most `limit` from now.
pub(super) fn inject(headers: &mut HeaderMap, limit: Duration) {
    let own = now() + limit;
    let last = LAST.try_with(|last| own.min(*last)).unwrap_or(own);
    let value = u64::try_from(last.as_nanos()).unwrap_or(u64::MAX);
    headers.insert(BEGIN_BEFORE, HeaderValue::from(value));
}

/// Why a request is not begun any more, if so.
pub(super) fn refusal(headers: &HeaderMap) -> Option<ApiError> {
    let last = headers.get(BEGIN_BEFORE)?.to_str().ok()?.parse().ok()?;
    let late = now().checked_sub(Duration::from_nanos(last))?;
    (!late.is_zero()).then(|| {
        ApiError::new(
            Reason::PeerUnreachable,
            "the caller gave this call up before it was begun: nothing was done",
        )
        .with("late_ms", late.as_millis())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_nearer_of_both_limits_is_said() {
        let said = || {
            let mut headers = HeaderMap::new();
            inject(&mut headers, Duration::from_secs(100));
            let value = headers.get(BEGIN_BEFORE).unwrap().to_str().unwrap();
            Duration::from_nanos(value.parse().unwrap()) - now()
        };
        assert!(said() > Duration::from_secs(90));
        begun_within(Duration::from_secs(10), async {
            assert!(said() <= Duration::from_secs(10) && said() > Duration::from_secs(5));
        })
        .await;
        begun_within(Duration::from_secs(1000), async {
            assert!(said() <= Duration::from_secs(100));
        })
        .await;
    }

    #[test]
    fn only_what_is_late_is_refused() {
        let mut headers = HeaderMap::new();
        assert!(refusal(&headers).is_none(), "nothing is said");
        inject(&mut headers, Duration::from_secs(100));
        assert!(refusal(&headers).is_none());
        headers.insert(BEGIN_BEFORE, HeaderValue::from(1_u64));
        let refused = refusal(&headers).unwrap();
        assert_eq!(refused.reason, Reason::PeerUnreachable);
        for nonsense in ["", "soon", "-1", "99999999999999999999999999"] {
            headers.insert(BEGIN_BEFORE, HeaderValue::from_static(nonsense));
            assert!(refusal(&headers).is_none(), "{nonsense}");
        }
    }
}
