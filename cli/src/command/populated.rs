//! From a VM that was just created to one that runs: waits until its memory is populated, says how
//! far it is, and starts it.
//!
//! The VM is there meanwhile: whoever stops waiting finds it CREATED, and deleting it ends the
//! work. So whatever ends this before the VM runs says that it is there, and what to do with it.
//!
//! *Bounded*: by the work, as long as the VM is heard. Memory that is short, and a VM that is
//! LOST, FAILED, STOPPED or gone, end the wait at once. A VM that is not heard, because its
//! process, its host or the server does not answer, is waited for [`UNHEARD`] and no longer. What
//! is told never goes backwards: a process that died has nothing populated.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, v1};
use tonic::Status;

use super::patience::is_silence;
use crate::{
    client::Session,
    daemon::stop::Stop,
    failure::Failure,
    term::{out, units::Span},
    view,
};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// How long a VM that is not heard is waited for.
const UNHEARD: Duration = Duration::from_secs(60);

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

/// Returns when all of it is there, or when nobody asked for that.
async fn populated(session: &Session, vm: &v1::Vm) -> Result<(), Failure> {
    let mut wait = Wait::of(vm);
    let mut look = Ok(vm.clone());
    loop {
        let step = wait.step(&look, Instant::now())?;
        if let Some(words) = step.say {
            out::say(format!("{}: {words}", vm.name));
        }
        if step.over {
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
        let request = v1::GetVmRequest {
            name: vm.name.clone(),
            uid: vm.uid.clone(),
            ..Default::default()
        };
        let answer = session.client.vms().get_vm(request).await;
        look = answer.map(tonic::Response::into_inner);
    }
}

/// What a look means.
#[derive(Debug, Default)]
struct Step {
    /// Nothing is left to wait for.
    over: bool,
    /// What to tell.
    say: Option<String>,
}

/// The looks until now.
#[derive(Debug)]
struct Wait {
    /// `vms/web`.
    name: String,
    /// Tenths that were told.
    told: Option<u64>,
    /// Since when the VM is not heard.
    unheard: Option<Instant>,
}

impl Wait {
    fn of(vm: &v1::Vm) -> Self {
        Self {
            name: vm.name.clone(),
            told: None,
            unheard: None,
        }
    }

    /// What `look`, which ended `now`, means.
    ///
    /// # Errors
    /// When there is nothing more to wait for, or it was waited for long enough.
    fn step(&mut self, look: &Result<v1::Vm, Status>, now: Instant) -> Result<Step, Failure> {
        use v1::vm::State;
        let vm = match look {
            Ok(vm) => vm,
            Err(status) => return self.failed(status, now),
        };
        match vm.state() {
            State::Lost => return Err(self.ended(vm, Reason::VmProcessDied)),
            State::Failed | State::Stopped => return Err(self.ended(vm, Reason::VmNotRunning)),
            State::Unresponsive => {
                return self.not_heard(Reason::VmUnreachable, "its process does not answer", now);
            }
            _ if vm.stale => {
                return self.not_heard(Reason::HostUnreachable, "its host does not answer", now);
            }
            _ => {}
        }
        let heard = self.unheard.take().map(|_| "it answers again".to_owned());
        let Some(prefault) = vm.prefault.as_ref().filter(|prefault| !prefault.done) else {
            return Ok(Step {
                over: true,
                say: heard,
            });
        };
        let words = view::prefault(prefault);
        if !prefault.error.is_empty() {
            let error = ApiError::new(Reason::NoMemory, words).with(
                "advice",
                "it is there, not started: free memory and start it, or delete it",
            );
            return Err(self.failure(error));
        }
        let tenth = tenths(prefault);
        let further = self.told.is_none_or(|told| told < tenth);
        if further {
            self.told = Some(tenth);
        }
        Ok(Step {
            over: false,
            say: if further { Some(words) } else { heard },
        })
    }

    /// The look brought no VM.
    fn failed(&mut self, status: &Status, now: Instant) -> Result<Step, Failure> {
        let error = ApiError::from(status.clone());
        if is_silence(&error) {
            let why = match error.reason {
                Reason::HostUnreachable => "its host does not answer",
                Reason::VmUnreachable => "its process does not answer",
                _ => "the endpoint does not answer",
            };
            return self.not_heard(error.reason, why, now);
        }
        if error.reason != Reason::NoSuchVm {
            return Err(self.failure(error));
        }
        if self.unheard.is_some() {
            // A server that has just come back may not have heard of it yet.
            return self.not_heard(Reason::NoSuchVm, "the endpoint knows nothing of it", now);
        }
        let error = ApiError::new(
            Reason::NoSuchVm,
            "it was created and is gone: somebody deleted it meanwhile",
        );
        Err(self.failure(error.with("vm", &self.name)))
    }

    /// Says once that nobody hears of it, and ends when that lasts.
    fn not_heard(&mut self, reason: Reason, why: &str, now: Instant) -> Result<Step, Failure> {
        let limit = Span(UNHEARD);
        let Some(since) = self.unheard else {
            self.unheard = Some(now);
            return Ok(Step {
                over: false,
                say: Some(format!("{why}; waiting for it, at most {limit}")),
            });
        };
        if now.saturating_duration_since(since) < UNHEARD {
            return Ok(Step::default());
        }
        let id = view::id(&self.name);
        let error = ApiError::new(
            reason,
            format!("{why}, for {limit} now; the VM was created and exists, not started"),
        )
        .with("vm", &self.name)
        .with(
            "advice",
            format!(
                "slat get vm {id} shows whether it answers; then slat start vm {id}, or slat delete vm {id}"
            ),
        );
        Err(self.failure(error))
    }

    /// It never runs.
    fn ended(&self, vm: &v1::Vm, reason: Reason) -> Failure {
        let why = match vm.state_message.as_str() {
            "" => String::new(),
            why => format!(": {why}"),
        };
        let state = view::vm_state(vm.state());
        let error = ApiError::new(
            reason,
            format!("the VM was created and is {state} now{why}"),
        );
        // What to do then is known by the state.
        let state = vm.state().as_str_name();
        self.failure(error.with("vm", &self.name).with("state", state))
    }

    fn failure(&self, error: ApiError) -> Failure {
        Failure::api(format!("populate {}", self.name), error)
    }
}

/// How many tenths of it are there.
fn tenths(prefault: &v1::Prefault) -> u64 {
    let all = prefault.total_bytes.max(1);
    prefault.populated_bytes.saturating_mul(10) / all
}

#[cfg(test)]
mod tests {
    use v1::vm::State;

    use super::*;

    fn vm(state: State, populated_bytes: u64) -> v1::Vm {
        v1::Vm {
            name: "vms/web".into(),
            state: state.into(),
            prefault: Some(v1::Prefault {
                populated_bytes,
                total_bytes: 100,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn stale() -> v1::Vm {
        v1::Vm {
            stale: true,
            ..vm(State::Created, 10)
        }
    }

    fn started() -> (Wait, Instant) {
        let begun = Instant::now();
        let mut wait = Wait::of(&vm(State::Created, 0));
        let step = wait.step(&Ok(vm(State::Created, 10)), begun).unwrap();
        assert_eq!(step.say.unwrap(), "10 B of 100 B populated");
        (wait, begun)
    }

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

    #[test]
    fn what_is_told_never_goes_backwards() {
        let (mut wait, now) = started();
        let mut said = Vec::new();
        for bytes in [15, 40, 0, 30, 50] {
            let step = wait.step(&Ok(vm(State::Created, bytes)), now).unwrap();
            assert!(!step.over);
            said.extend(step.say);
        }
        assert_eq!(said, ["40 B of 100 B populated", "50 B of 100 B populated"]);
        let mut done = vm(State::Created, 100);
        done.prefault.as_mut().unwrap().done = true;
        assert!(wait.step(&Ok(done), now).unwrap().over);
    }

    #[test]
    fn a_vm_that_ended_ends_the_wait() {
        for (state, words) in [
            (State::Lost, "was created and is LOST now: killed"),
            (State::Failed, "was created and is FAILED now: killed"),
            (State::Stopped, "was created and is STOPPED now: killed"),
        ] {
            let (mut wait, now) = started();
            let mut ended = vm(state, 0);
            ended.state_message = "killed".into();
            let text = wait.step(&Ok(ended), now).unwrap_err().render();
            assert!(text.contains(words), "{text}");
            assert!(text.contains("slat delete vm web"), "{text}");
        }
        let (mut wait, now) = started();
        let gone: Status = ApiError::no_such_vm("vms/web").into();
        let failure = wait.step(&Err(gone), now).unwrap_err();
        assert_eq!(failure.exit_code(), 3);
        assert!(failure.render().contains("is gone"), "{failure:?}");
    }

    #[test]
    fn a_vm_that_is_not_heard_is_said_once_and_waited_for_so_long() {
        let silent = || Err(Status::unavailable("tcp connect error"));
        for (look, why) in [
            (Ok(vm(State::Unresponsive, 0)), "its process"),
            (Ok(stale()), "its host"),
            (silent(), "the endpoint"),
        ] {
            let (mut wait, now) = started();
            let words = format!("{why} does not answer; waiting for it, at most 1m");
            let said = wait.step(&look, now).unwrap().say.unwrap();
            assert!(said.starts_with(&words), "{said}");
            let step = wait.step(&look, now + UNHEARD / 2).unwrap();
            assert!(step.say.is_none() && !step.over, "{step:?}");
            let failure = wait.step(&look, now + UNHEARD).unwrap_err();
            assert_eq!(failure.exit_code(), 5);
            let text = failure.render();
            for words in [
                "was created and exists, not started",
                "slat start vm web",
                "slat delete vm web",
            ] {
                assert!(text.contains(words), "{text}");
            }
        }
    }

    #[test]
    fn a_vm_that_is_heard_again_is_waited_for_anew() {
        let (mut wait, now) = started();
        wait.step(&Ok(stale()), now).unwrap();
        // A server that was started again may not know of it at first.
        let unknown: Status = ApiError::no_such_vm("vms/web").into();
        wait.step(&Err(unknown), now + UNHEARD / 2).unwrap();
        let again = wait.step(&Ok(vm(State::Created, 10)), now + UNHEARD / 2);
        assert_eq!(again.unwrap().say.unwrap(), "it answers again");
        wait.step(&Ok(stale()), now + UNHEARD).unwrap();
    }
}
