//! From a VM that was just created to one that runs. The VM exists from the first moment on, so
//! whatever ends this before it runs says that it is there, and what to do with it.

use std::cell::Cell;

use slat_proto::{ApiError, v1};

use super::{patience::is_silence, populated::populated};
use crate::{client::Session, daemon::stop::Stop, failure::Failure, term::out, view};

/// Starts `vm` when its memory is populated, as far as that was asked for.
pub(super) async fn started(
    session: &Session,
    vm: &v1::Vm,
    stop: &mut Stop,
) -> Result<v1::Vm, Failure> {
    let ordered = Cell::new(false);
    tokio::select! {
        started = start(session, vm, &ordered) => started,
        cause = stop.wait() => {
            out::say(if ordered.get() { in_doubt(&vm.name) } else { left(&vm.name) });
            Err(Failure::Said(cause.exit_code()))
        }
    }
}

/// `ordered` tells whether the order to start it went out.
async fn start(session: &Session, vm: &v1::Vm, ordered: &Cell<bool>) -> Result<v1::Vm, Failure> {
    populated(session, vm).await?;
    ordered.set(true);
    let request = v1::StartVmRequest {
        // By its uid, too: another VM of that name is none of this command's business.
        name: vm.name.clone(),
        uid: vm.uid.clone(),
        ..Default::default()
    };
    let answer = session.client.vms().start_vm(request).await;
    answer.map(tonic::Response::into_inner).map_err(|status| {
        let silent = is_silence(&ApiError::from(status.clone()));
        out::say(if silent {
            in_doubt(&vm.name)
        } else {
            format!("{} was created and is there, not started", vm.name)
        });
        Failure::call(format!("start {}", vm.name), status)
    })
}

/// It is there and was not started.
fn left(name: &str) -> String {
    let id = view::id(name);
    format!(
        "{name} was created and is there, CREATED, not started\n  \
         look:   slat get vm {id}\n  \
         start:  slat start vm {id}\n  \
         delete: slat delete vm {id}"
    )
}

/// It is there, and the answer to the order to start it is missing.
fn in_doubt(name: &str) -> String {
    let id = view::id(name);
    format!(
        "{name} was created and is there; it may have started: slat get vm {id}\n  \
         start:  slat start vm {id}\n  \
         delete: slat delete vm {id}"
    )
}
