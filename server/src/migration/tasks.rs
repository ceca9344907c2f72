//! The tasks that a reconciler owns: what is under way, and how it ends. They end before their
//! owner does.

use std::collections::HashMap;

use slat_proto::ApiError;
use tokio::task::{Id, JoinSet};

use super::{
    calls::Ended,
    protocol::{Action, Answer, Side},
};

/// What a task was begun for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// Waits for sides of earlier migrations.
    Wait,
    /// Stores the record.
    Store,
    /// Carries an action out.
    Call(Action),
    /// Looks the VM up where it is after the end.
    LookUp,
}

/// How a task ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Waited(Result<(), (Side, ApiError)>),
    Stored,
    Called(Action, Ended),
    LookedUp,
    /// It panicked: begin it again.
    Lost(Work),
}

/// Owns the tasks. At most one for each kind of work: the protocol asks for no second one.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    set: JoinSet<Outcome>,
    works: HashMap<Id, Work>,
}

impl Tasks {
    pub(super) fn spawn(
        &mut self,
        work: Work,
        task: impl Future<Output = Outcome> + Send + 'static,
    ) {
        let id = self.set.spawn(task).id();
        self.works.insert(id, work);
    }

    pub(super) fn call(
        &mut self,
        action: Action,
        call: impl Future<Output = Ended> + Send + 'static,
    ) {
        let task = async move { Outcome::Called(action, call.await) };
        self.spawn(Work::Call(action), task);
    }

    /// The next that ends; `None` when there is none.
    pub(super) async fn next(&mut self) -> Option<Outcome> {
        match self.set.join_next_with_id().await? {
            Ok((id, outcome)) => {
                self.works.remove(&id);
                Some(outcome)
            }
            Err(error) => {
                tracing::error!(%error, "a migration's task failed");
                Some(match self.works.remove(&error.id())? {
                    // Whether it had its effect is not known.
                    Work::Call(action) => Outcome::Called(action, Ended::with(Answer::Silent)),
                    work => Outcome::Lost(work),
                })
            }
        }
    }

    /// Ends them all; returns when they are gone.
    pub(super) async fn shut_down(&mut self) {
        self.set.shutdown().await;
    }
}
