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
//!
//! A command on several things goes on after an error and ends with the worst code: 7, 1, 5, 4, 6,
//! 3, 2, from the worst on.
//!
//! [`render`] says it to people, [`document`] to programs; both name options where the API has
//! fields ([`options`]), and what to do next ([`advice`]).

mod advice;
mod document;
mod kinds;
mod options;
mod render;

pub(crate) use advice::migration as migration_advice;
pub(crate) use kinds::{EXIT_CODES, Failure, chain, exit_code, io_cause, worse};
pub(crate) use options::in_options;
pub(crate) use render::location_words;

impl Failure {
    /// What standard error shows to people; empty when nothing is left to say.
    pub(crate) fn render(&self) -> String {
        render::text(self, &render::typed())
    }

    /// What standard error shows to programs; `None` when nothing is left to say.
    pub(crate) fn document(&self) -> Option<serde_json::Value> {
        document::of(self)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use slat_proto::{ApiError, Reason, error::GRPC_CODE, transport::Address};

    use super::*;

    #[test]
    fn an_answer_says_what_where_and_what_next() {
        let error = ApiError::new(Reason::ConnectionLost, "the stream to hosts/b broke")
            .with("vm", "vms/web")
            .with("vm_location", "SOURCE")
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
    fn the_worst_code_ends_a_command_on_several() {
        assert_eq!(worse(0, 3), 3);
        assert_eq!(worse(3, 0), 3);
        assert_eq!(worse(4, 3), 4);
        assert_eq!(worse(5, 4), 5);
        assert_eq!(worse(1, 5), 1);
        assert_eq!(worse(130, 7), 130);
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
