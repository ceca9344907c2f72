//! A benchmark that is interrupted takes its VMs along.
//!
//! VM processes outlive their agent, as they should, and each holds its guest's memory: a benchmark
//! that just died would leave gibibytes behind, and guests that write. So SIGINT and SIGTERM drop
//! what is being measured, and with it the fleet, which ends its VMs.

use std::future::Future;

use anyhow::bail;
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

/// Runs `work` to its end, or to a signal.
///
/// # Errors
/// Those of `work`; that it was interrupted.
pub fn measure<T>(
    runtime: &Runtime,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            done = work => done,
            _ = interrupt.recv() => bail!("interrupted; its VMs are ended"),
            _ = terminate.recv() => bail!("told to end; its VMs are ended"),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use super::*;

    /// Notes that it went.
    struct Fleet(Arc<AtomicBool>);

    impl Drop for Fleet {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn what_is_measured_goes_when_a_signal_comes() {
        use rustix::process::{Signal, getpid, kill_process};
        let runtime = Runtime::new().unwrap();
        let gone = Arc::new(AtomicBool::new(false));
        let fleet = Fleet(Arc::clone(&gone));
        let measured: anyhow::Result<()> = measure(&runtime, async move {
            let _fleet = fleet;
            // Whoever is here is polled after the signals have their handlers.
            kill_process(getpid(), Signal::TERM)?;
            std::future::pending().await
        });
        assert!(measured.unwrap_err().to_string().starts_with("told to end"));
        assert!(gone.load(Ordering::SeqCst));
        assert_eq!(measure(&runtime, async { Ok(3) }).unwrap(), 3);
    }
}
