//! How a command fails: what an operator reads and which exit code a script sees.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed |
//! | 2 | the command line or a value in it is wrong |
//! | 3 | no such VM, host, migration, slot or cursor |
//! | 4 | refused as things stand: state, precondition, capacity, exists already |
//! | 5 | unavailable or out of time: server, agent or VM process does not answer |
//! | 6 | the migration was cancelled |
//! | 7 | not known whether the migration committed (IN_DOUBT) |
//! | 130, 143 | ended by Ctrl-C, by SIGTERM |
//! | 141 | the reader of standard output went away |

use std::{error::Error, io};

use slat_proto::{ApiError, Reason, error::GRPC_CODE, transport::Address};
use tonic::Code;

use crate::escape::one_line;

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
            Self::Usage(_) => 2,
            Self::Local { .. } => 1,
            Self::Api { error, .. } => exit_code(error),
            Self::Said(code) => *code,
            Self::BrokenPipe => 141,
        }
    }

    /// What standard error shows; empty when nothing is left to say.
    pub(crate) fn render(&self) -> String {
        match self {
            Self::Usage(message) => {
                format!("error: {message}\n  next: slat help, or --help after the command")
            }
            Self::Local { message, advice } if advice.is_empty() => format!("error: {message}"),
            Self::Local { message, advice } => format!("error: {message}\n  next: {advice}"),
            Self::Api { doing, error } => render_api(doing, error),
            Self::Said(_) | Self::BrokenPipe => String::new(),
        }
    }
}

/// A refused value, in the words of the API.
impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        if error.reason == Reason::BadParameter {
            Self::Usage(error.message)
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

fn render_api(doing: &str, error: &ApiError) -> String {
    // Words of an endpoint: they draw nothing and end no line.
    let mut text = format!(
        "error: cannot {}: {}",
        one_line(doing),
        one_line(&error.message)
    );
    let mut add = |label: &str, value: &str| {
        if !value.is_empty() {
            text.push_str(&format!("\n  {label:<7} {}", one_line(value)));
        }
    };
    add("reason:", error.reason.as_str());
    let place = error.metadata.get("vm_location").map_or("", String::as_str);
    add("vm is:", location_words(place));
    let shown = ["advice", "vm_location", GRPC_CODE];
    let details: Vec<String> = error
        .metadata
        .iter()
        .filter(|(key, value)| !shown.contains(&key.as_str()) && !value.is_empty())
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    add("detail:", &details.join(" "));
    let advice = error
        .metadata
        .get("advice")
        .map_or_else(|| default_advice(error), Clone::clone);
    add("next:", &advice);
    text
}

/// A place as people say it; unknown words are shown as they came.
pub(crate) fn location_words(place: &str) -> &str {
    match place.trim_start_matches("VM_LOCATION_") {
        "SOURCE" | "source" => "on the source",
        "DESTINATION" | "destination" => "on the destination",
        "PAUSED_BOTH" | "paused_both" => "paused on both hosts until a journal is read",
        "UNKNOWN" | "unknown" => "not known: neither host answers",
        "LOST" | "lost" => "lost: its process died with its memory",
        _ => place,
    }
}

/// What to do next when the endpoint gave no advice of its own.
fn default_advice(error: &ApiError) -> String {
    let detail = |key: &str| error.metadata.get(key).map(String::as_str);
    let advice = match error.reason {
        Reason::NoSuchVm => "slat get vms",
        Reason::NoSuchHost => "slat get hosts",
        Reason::NoSuchMigration => "slat get migrations",
        Reason::NoSuchSlot | Reason::BadSlotTable => "slat memory slots VM",
        Reason::NoSuchCursor => "slat memory dirty VM --cursor NAME makes one",
        Reason::VmExists => "choose another name, or slat delete vm NAME",
        Reason::VmRunning => "slat pause vm NAME",
        Reason::VmNotRunning => "slat get vm NAME; slat start or resume vm NAME",
        Reason::MigrationInProgress => match detail("migration") {
            Some(migration) => {
                return format!(
                    "slat get migration {migration} --watch, or slat cancel {migration}"
                );
            }
            None => "slat get migrations",
        },
        Reason::PeerUnreachable => {
            "is it running? give the address of a server, agent or VM socket with --server or SLAT_SERVER"
        }
        Reason::HostUnreachable => "slat get hosts; start the agent there again",
        Reason::NoSuchMethod => {
            "ask another one with --server; migrations are served by the server alone"
        }
        Reason::MessageTooLarge => "ask for less at once: one VM, one slot, a smaller page",
        Reason::MessageUndecodable => "slat version at both ends: can they talk to each other?",
        Reason::DiskFull => "free space there; what waits for it goes on by itself",
        Reason::DescriptorsExhausted => "raise LimitNOFILE of that process; see its connections",
        Reason::Store => "see the server's log and its state directory",
        Reason::StaleGeneration => "look at the slots again and repeat",
        Reason::DstNoMemory | Reason::NoMemory | Reason::NoHost => {
            "slat get hosts shows what is free; choose less memory or another host"
        }
        Reason::NotConverging | Reason::CompletionTimeout => {
            "allow a longer --max-downtime, or --on-timeout force-switchover"
        }
        Reason::InDoubt => {
            "bring either host back: its journal decides; nothing runs twice meanwhile"
        }
        _ => "",
    };
    advice.to_owned()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_what_where_and_what_next() {
        let error = ApiError::new(Reason::ConnectionLost, "the stream to hosts/b broke")
            .with("vm", "vms/web")
            .with("vm_location", "VM_LOCATION_SOURCE")
            .with("advice", "try again: slat migrate web --to b");
        let failure = Failure::api("migrate vms/web to hosts/b", error);
        assert_eq!(
            failure.render(),
            "error: cannot migrate vms/web to hosts/b: the stream to hosts/b broke\n  \
             reason: CONNECTION_LOST\n  \
             vm is:  on the source\n  \
             detail: vm=vms/web\n  \
             next:   try again: slat migrate web --to b"
        );
        assert_eq!(failure.exit_code(), 5);
    }

    #[test]
    fn a_known_reason_brings_advice_of_its_own() {
        let error = ApiError::new(Reason::MigrationInProgress, "vms/web migrates")
            .with("migration", "migrations/m1");
        let text = Failure::api("delete vms/web", error).render();
        assert!(text.contains("slat cancel migrations/m1"), "{text}");
    }

    #[test]
    fn each_reason_has_a_documented_exit_code() {
        for &reason in Reason::ALL {
            let code = exit_code(&ApiError::new(reason, ""));
            assert!((1..=7).contains(&code), "{reason} {code}");
            assert!(EXIT_CODES.contains(&format!(" {code} ")), "{code}");
        }
        let code = |reason| exit_code(&ApiError::new(reason, ""));
        assert_eq!(code(Reason::BadParameter), 2);
        assert_eq!(code(Reason::NoSuchHost), 3);
        assert_eq!(code(Reason::SameHost), 4);
        assert_eq!(code(Reason::DstNoMemory), 4);
        assert_eq!(code(Reason::PeerUnreachable), 5);
        assert_eq!(code(Reason::InDoubt), 7);
    }

    #[test]
    fn an_endpoint_that_does_not_answer_is_named() {
        let endpoint: Address = "127.0.0.1:1".parse().unwrap();
        let status = tonic::Status::unavailable("tcp connect error");
        let failure = Failure::call("list vms", status).at(&endpoint);
        let text = failure.render();
        assert!(
            text.starts_with(
                "error: cannot list vms: 127.0.0.1:1 does not answer: tcp connect error"
            ),
            "{text}"
        );
        assert_eq!(failure.exit_code(), 5);
        let named = ApiError::new(
            Reason::PeerUnreachable,
            "127.0.0.1:1 does not answer: refused",
        )
        .with("address", "127.0.0.1:1")
        .with(GRPC_CODE, "Unavailable")
        .with("advice", "see that it runs");
        let text = Failure::call("list vms", named.into())
            .at(&endpoint)
            .render();
        assert!(
            text.starts_with("error: cannot list vms: 127.0.0.1:1 does not answer: refused\n"),
            "{text}"
        );
        assert!(text.contains("--server or SLAT_SERVER"), "{text}");
        let ours = ApiError::new(Reason::PeerUnreachable, "hosts/b does not answer");
        let text = Failure::call("list vms", ours.into())
            .at(&endpoint)
            .render();
        assert!(text.contains("vms: hosts/b does not answer"), "{text}");
    }

    #[test]
    fn what_an_endpoint_says_draws_nothing_and_forges_no_line() {
        let error = ApiError::new(Reason::Internal, "\x1b[2Jgone\n  next:   rm -rf /")
            .with("vm", "vms/a\u{202e}")
            .with("advice", "a\rb");
        let text = Failure::api("get vms/a\u{9b}", error).render();
        assert_eq!(
            text,
            "error: cannot get vms/a\\u{9b}: \\u{1b}[2Jgone\\u{a}  next:   rm -rf /\n  \
             reason: INTERNAL\n  \
             detail: vm=vms/a\\u{202e}\n  \
             next:   a\\u{d}b"
        );
    }

    #[test]
    fn an_endpoint_without_the_service_sends_to_another() {
        let failure = Failure::call("list migrations", tonic::Status::unimplemented(""));
        assert!(
            failure.render().contains("--server"),
            "{}",
            failure.render()
        );
        assert_eq!(failure.exit_code(), 4);
    }

    #[test]
    fn causes_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot listen on 127.0.0.1:7400")]
        struct Outer(#[source] io::Error);
        let error = Outer(io::Error::from(io::ErrorKind::AddrInUse));
        assert_eq!(
            chain(&error),
            "cannot listen on 127.0.0.1:7400: address in use"
        );
        assert_eq!(io_cause(&error), Some(io::ErrorKind::AddrInUse));
    }
}
