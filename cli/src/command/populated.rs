//! Waits until a VM's memory is populated, and says how far it is.
//!
//! The VM is there meanwhile: whoever stops waiting finds it CREATED, and deleting it ends the
//! work.

use std::time::Duration;

use slat_proto::{ApiError, Reason, v1};

use crate::{client::Session, failure::Failure, term::out, view};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// Returns when all of it is there, or when nobody asked for that. Bounded by the work: each look
/// that fails, and memory that is short, end it.
pub(super) async fn populated(session: &Session, vm: &v1::Vm) -> Result<(), Failure> {
    let mut told = None;
    let mut shown = vm.prefault.clone();
    while let Some(prefault) = shown.filter(|prefault| !prefault.done) {
        let words = view::prefault(&prefault);
        if !prefault.error.is_empty() {
            let error = ApiError::new(Reason::NoMemory, words).with(
                "advice",
                "it is there, not started: free memory and start it, or delete it",
            );
            return Err(Failure::api(format!("populate {}", vm.name), error));
        }
        let tenth = tenths(&prefault);
        if told != Some(tenth) {
            out::say(format!("{}: {words}", vm.name));
            told = Some(tenth);
        }
        tokio::time::sleep(LOOK).await;
        let request = v1::GetVmRequest {
            name: vm.name.clone(),
            uid: vm.uid.clone(),
            ..Default::default()
        };
        let answer = session.client.vms().get_vm(request).await;
        shown = answer
            .map_err(|status| Failure::call(format!("populate {}", vm.name), status))?
            .into_inner()
            .prefault;
    }
    Ok(())
}

/// How many tenths of it are there.
fn tenths(prefault: &v1::Prefault) -> u64 {
    let all = prefault.total_bytes.max(1);
    prefault.populated_bytes.saturating_mul(10) / all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_by_tenths() {
        let at = |populated_bytes, total_bytes| {
            tenths(&v1::Prefault {
                populated_bytes,
                total_bytes,
                ..Default::default()
            })
        };
        assert_eq!(
            [at(0, 0), at(0, 50), at(4, 50), at(5, 50), at(50, 50)],
            [0, 0, 0, 1, 10]
        );
    }
}
