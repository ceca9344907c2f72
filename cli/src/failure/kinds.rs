//! The kinds of failure, how they are made from what endpoints answer, and their exit codes.

use std::{error::Error, io};

use slat_proto::{ApiError, Reason, error::GRPC_CODE, transport::Address};
use tonic::Code;

use super::options::in_options;

/// Text of the table above, for `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0 done   1 failed   2 wrong command line or value   3 no such VM, host or migration
  4 refused: state, precondition, capacity, exists already   5 unavailable or out of time
  6 the migration was cancelled   7 not known whether it committed   130 Ctrl-C   143 SIGTERM";

/// Why a command ends without success.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line makes no sense; the sentence says why.
    Usage(String),
    /// A value that cannot be used on this machine; one sentence, and what to give instead.
    Value {
        /// What is wrong with it.
        message: String,
        /// What to do next.
        advice: String,
    },
    /// Something local failed; one sentence, and what to do about it.
    Local {
        /// What failed.
        message: String,
        /// What to do next; may be empty.
        advice: String,
    },
    /// An endpoint answered with an error.
    Api {
        /// What was being done, as `start vms/web`.
        doing: String,
        /// The answer.
        error: Box<ApiError>,
    },
    /// A migration ended without success.
    Ended {
        /// As `migrations/m1 failed`.
        what: String,
        /// Why.
        error: Box<ApiError>,
        /// For the process's exit.
        code: u8,
    },
    /// Everything is said already; only the exit code is left.
    Said(u8),
    /// The reader of standard output is gone.
    BrokenPipe,
}

impl Failure {
    /// Something local failed.
    pub(crate) fn local(message: impl Into<String>) -> Self {
        Self::Local {
            message: message.into(),
            advice: String::new(),
        }
    }

    /// Something local failed and this is the way out.
    pub(crate) fn advised(message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::Local {
            message: message.into(),
            advice: advice.into(),
        }
    }

    /// A value cannot be used on this machine.
    pub(crate) fn value(message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::Value {
            message: message.into(),
            advice: advice.into(),
        }
    }

    /// An endpoint's error while `doing`.
    pub(crate) fn api(doing: impl Into<String>, error: impl Into<ApiError>) -> Self {
        Self::Api {
            doing: doing.into(),
            error: Box::new(error.into()),
        }
    }

    /// A failed call while `doing`: as [`Failure::api`], and where the transport failed, why.
    pub(crate) fn call(doing: impl Into<String>, status: tonic::Status) -> Self {
        let cause = status.source().map(chain);
        let mut error = ApiError::from(status);
        match error.metadata.get(GRPC_CODE).map(String::as_str) {
            Some("Unimplemented") => {
                error.message = "this endpoint does not serve that".to_owned();
                error.reason = Reason::NoSuchMethod;
                error.metadata.insert(
                    "advice".to_owned(),
                    "ask another one with --server; migrations are served by the server alone"
                        .to_owned(),
                );
            }
            Some(_) if error.metadata.contains_key("address") => {}
            Some(_) => {
                let words = cause.as_deref().unwrap_or(&error.message);
                let words = words.strip_prefix("transport error: ").unwrap_or(words);
                error.message = words.to_owned();
            }
            None => {}
        }
        Self::api(doing, error)
    }

    /// Names the endpoint that was asked, where it did not answer.
    pub(crate) fn at(mut self, endpoint: &Address) -> Self {
        if let Self::Api { error, .. } = &mut self
            && error.reason == Reason::PeerUnreachable
            && error.metadata.contains_key(GRPC_CODE)
        {
            if error.metadata.get("address") == Some(&endpoint.to_string()) {
                // The channel names it itself; what to do about it is known better here.
                error.metadata.remove("address");
                error.metadata.remove("advice");
            } else {
                error.message = format!("{endpoint} does not answer: {}", error.message);
            }
        }
        self
    }

    /// A failed write to standard output.
    pub(crate) fn from_stdout(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::BrokenPipe
        } else {
            Self::local(format!("cannot write the output: {error}"))
        }
    }

    /// For the process's exit.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Value { .. } => 2,
            Self::Local { .. } => 1,
            Self::Api { error, .. } => exit_code(error),
            Self::Ended { code, .. } | Self::Said(code) => *code,
            Self::BrokenPipe => 141,
        }
    }
}

/// A refused value, in the words of the API.
impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        if error.reason == Reason::BadParameter {
            Self::Usage(in_options(&error.message))
        } else {
            Self::api("do that", error)
        }
    }
}

/// Exit code of an answer, by its gRPC code.
pub(crate) fn exit_code(error: &ApiError) -> u8 {
    match error.reason.code() {
        Code::InvalidArgument | Code::OutOfRange => 2,
        Code::NotFound => 3,
        Code::FailedPrecondition
        | Code::AlreadyExists
        | Code::Aborted
        | Code::ResourceExhausted
        | Code::PermissionDenied
        | Code::Unauthenticated => 4,
        Code::Unimplemented => 4,
        Code::Unavailable | Code::DeadlineExceeded => 5,
        Code::Unknown => 7,
        _ => 1,
    }
}

/// The worse of two exit codes.
pub(crate) fn worse(one: u8, other: u8) -> u8 {
    let rank = |code: u8| [0, 2, 3, 6, 4, 5, 1, 7].iter().position(|&c| c == code);
    match (rank(one), rank(other)) {
        (Some(a), Some(b)) => {
            if a >= b {
                one
            } else {
                other
            }
        }
        // A signal, or a reader that went away, ends everything.
        (None, _) => one,
        (_, None) => other,
    }
}

/// An error and its causes on one line, each said once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    text
}

/// The I/O error among an error's causes.
pub(crate) fn io_cause(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        current = error.source();
    }
    None
}
