//! A command on several things: each is done, whatever became of the one before; every failure is
//! reported as it happens, and the command ends with the worst code.

use serde_json::Value;
use slat_proto::transport::Address;

use crate::{
    client::Session,
    failure::{self, Failure},
    output,
    term::out,
};

/// How it has gone so far.
#[derive(Debug)]
pub(crate) struct Several {
    endpoint: Address,
    many: bool,
    worst: u8,
}

impl Several {
    /// `count` things at this endpoint.
    pub(crate) fn new(session: &Session, count: usize) -> Self {
        Self {
            endpoint: session.endpoint.clone(),
            many: count > 1,
            worst: 0,
        }
    }

    /// Prints one answer; of several, each as an element of a stream.
    pub(crate) fn answer(
        &self,
        session: &Session,
        json: &Value,
        name: &str,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.many && session.output.is_for_programs() {
            return output::element(session.output, json);
        }
        session.answer(|| json.clone(), name, text)
    }

    /// Notes how one went. A single thing's failure is the command's.
    ///
    /// # Errors
    /// What ends the command here and now.
    pub(crate) fn note(&mut self, done: Result<(), Failure>) -> Result<(), Failure> {
        match done {
            Err(failure) if self.many && !matches!(failure, Failure::BrokenPipe) => {
                self.worst = failure::worse(self.worst, failure.exit_code());
                out::report(&failure.at(&self.endpoint));
                Ok(())
            }
            done => done,
        }
    }

    /// How all of it went.
    pub(crate) fn end(self) -> Result<(), Failure> {
        match self.worst {
            0 => Ok(()),
            code => Err(Failure::Said(code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_after_an_error_and_ends_with_the_worst() {
        let several = |many| Several {
            endpoint: "127.0.0.1:1".parse().unwrap(),
            many,
            worst: 0,
        };
        let mut all = several(true);
        all.note(Err(Failure::Said(3))).unwrap();
        all.note(Ok(())).unwrap();
        all.note(Err(Failure::Said(5))).unwrap();
        all.note(Err(Failure::Said(4))).unwrap();
        assert_eq!(all.end().unwrap_err().exit_code(), 5);
        assert!(several(false).note(Err(Failure::Said(3))).is_err());
        assert!(several(true).note(Err(Failure::BrokenPipe)).is_err());
        several(true).end().unwrap();
    }
}
