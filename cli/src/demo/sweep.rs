//! VM processes that outlived the demo's daemons: found by the lock each holds in its directory
//! below the demo's own state, and ended. Nothing else is ever looked at.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use slat_record::dir::VmDir;

/// Between two looks at the locks.
const LOOK: Duration = Duration::from_millis(20);

/// A VM process that lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Living {
    dir: PathBuf,
    pid: u32,
}

/// Those below `<state>/vms/` of each state directory.
pub(super) fn living(states: &[PathBuf]) -> Vec<Living> {
    let mut found = Vec::new();
    for entry in states
        .iter()
        .filter_map(|state| std::fs::read_dir(state.join("vms")).ok())
        .flatten()
        .flatten()
    {
        let dir = entry.path();
        if let Some(pid) = holder(&dir) {
            found.push(Living { dir, pid });
        }
    }
    found
}

fn holder(dir: &Path) -> Option<u32> {
    VmDir::new(dir).living_pid().ok().flatten()
}

/// Waits until none lives; those that do when `bound` has passed.
pub(super) async fn all_ended(states: &[PathBuf], bound: Duration) -> Vec<Living> {
    let started = Instant::now();
    loop {
        let left = living(states);
        if left.is_empty() || started.elapsed() > bound {
            return left;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Kills those that live; says what it found.
pub(super) async fn sweep(states: &[PathBuf], bound: Duration) -> Vec<String> {
    let found = living(states);
    for one in &found {
        kill(one);
    }
    if !found.is_empty() {
        all_ended(states, bound).await;
    }
    found
        .iter()
        .map(|one| {
            format!(
                "the VM process {} in {} had to be killed",
                one.pid,
                one.dir.display()
            )
        })
        .collect()
}

/// The handle is taken before the lock is read again, so the signal cannot reach another process
/// that has the same number by then.
fn kill(one: &Living) {
    let pid = i32::try_from(one.pid).ok().and_then(Pid::from_raw);
    let Some(pid) = pid else { return };
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    if holder(&one.dir) == Some(one.pid)
        && let Err(error) = pidfd_send_signal(&handle, Signal::KILL)
    {
        tracing::debug!(pid = one.pid, %error, "SIGKILL");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_holders_of_locks_below_the_state_are_found() {
        let root = slat_test_dir::TestDir::new();
        let state = root.path().join("host-a");
        for name in ["held", "free"] {
            std::fs::create_dir_all(state.join("vms").join(name)).unwrap();
        }
        let states = [state.clone(), root.path().join("never-made")];
        assert_eq!(living(&states), []);
        let free = VmDir::new(state.join("vms/free")).lock().unwrap();
        drop(free);
        let held = VmDir::new(state.join("vms/held")).lock().unwrap().unwrap();
        let expected = Living {
            dir: state.join("vms/held"),
            pid: std::process::id(),
        };
        assert_eq!(living(&states), [expected]);
        drop(held);
        assert_eq!(all_ended(&states, Duration::from_secs(5)).await, []);
        assert_eq!(
            sweep(&states, Duration::from_secs(5)).await,
            Vec::<String>::new()
        );
    }
}
