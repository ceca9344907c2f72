//! How a VM process ended, where the agent is its parent: by which signal, or with which code.
//!
//! Of a process that an agent before this one started only the end itself is known.

use std::{fmt, os::unix::process::ExitStatusExt as _, process::ExitStatus};

use rustix::process::Signal;
use slat_proto::ApiError;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End(ExitStatus);

impl From<ExitStatus> for End {
    fn from(status: ExitStatus) -> Self {
        Self(status)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.code() {
            Some(code) => write!(f, "exited with code {code}"),
            // `signal: 9 (SIGKILL)`, with `(core dumped)` where one was.
            None => {
                let words = self.0.to_string();
                write!(f, "ended by {}", words.replacen("signal: ", "signal ", 1))
            }
        }
    }
}

impl End {
    /// Whether it ended because it had nothing left to do.
    pub(crate) fn is_clean(self) -> bool {
        self.0.success()
    }

    /// `error` with what a program looks at.
    pub(crate) fn tell(self, error: ApiError) -> ApiError {
        let error = match (self.0.signal(), self.0.code()) {
            (Some(signal), _) => error.with("signal", signal),
            (None, Some(code)) => error.with("exit_code", code),
            (None, None) => error,
        };
        error.with("end", self).with("advice", self.advice())
    }

    /// What to do about it.
    fn advice(self) -> &'static str {
        let by = |signal: Signal| self.0.signal() == Some(signal.as_raw());
        if by(Signal::XFSZ) {
            "raise the limit on the size of files that the agent runs with (ulimit -f, LimitFSIZE=)"
        } else if by(Signal::KILL) {
            "look into the kernel's log: when memory ran out it says who was killed; free memory, or raise the limit of \
             the agent's cgroup"
        } else if by(Signal::SYS) {
            "it made a system call that it has no leave to make: --vm-seccomp log says which"
        } else {
            "the end of its log says more; mend that and try again"
        }
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::Reason;

    use super::*;

    #[test]
    fn an_end_has_its_signal_or_code_and_what_to_do() {
        let told = |status| {
            let end = End::from(ExitStatus::from_raw(status));
            let error = end.tell(ApiError::new(Reason::Internal, end.to_string()));
            assert_eq!(error.metadata["end"], error.message);
            error
        };
        let limit = told(Signal::XFSZ.as_raw());
        assert_eq!(limit.message, "ended by signal 25 (SIGXFSZ)");
        assert_eq!(limit.metadata["signal"], "25");
        assert!(limit.metadata["advice"].contains("LimitFSIZE"));
        let dumped = told(Signal::ABORT.as_raw() | 0x80);
        assert_eq!(dumped.message, "ended by signal 6 (SIGABRT) (core dumped)");
        let code = told(3 << 8);
        assert_eq!(code.message, "exited with code 3");
        assert_eq!(code.metadata["exit_code"], "3");
        assert!(told(Signal::KILL.as_raw()).metadata["advice"].contains("memory"));
    }
}
