//! A failure as programs read it, on standard error:
//! `{"error":{"code","reason","message","metadata","advice","exitCode"}}`.
//!
//! `code` is the gRPC code by name. A failure that no endpoint answered has the reason LOCAL, a
//! wrong command line BAD_PARAMETER.

use serde_json::{Value, json};
use slat_proto::{ApiError, Reason, code_name};
use tonic::Code;

use super::{advice, kinds::Failure, options::in_options};

/// The document; `None` when everything is said already.
pub(super) fn of(failure: &Failure) -> Option<Value> {
    let exit = failure.exit_code();
    match failure {
        Failure::Usage(message) => Some(document(
            &code_name(Code::InvalidArgument),
            Reason::BadParameter.as_str(),
            message,
            &json!({}),
            "slat help, or --help after the command",
            exit,
        )),
        Failure::Value { message, advice } => Some(document(
            &code_name(Code::InvalidArgument),
            Reason::BadParameter.as_str(),
            message,
            &json!({}),
            advice,
            exit,
        )),
        Failure::Local { message, advice } => {
            let code = code_name(Code::Internal);
            Some(document(&code, "LOCAL", message, &json!({}), advice, exit))
        }
        Failure::Api { doing, error } => Some(api(
            &format!("cannot {doing}: {}", in_options(&error.message)),
            error,
            exit,
        )),
        Failure::Ended { what, error, code } if error.message.is_empty() => {
            Some(api(what, error, *code))
        }
        Failure::Ended { what, error, code } => {
            let message = format!("{what}: {}", in_options(&error.message));
            Some(api(&message, error, *code))
        }
        Failure::Said(_) | Failure::BrokenPipe => None,
    }
}

fn api(message: &str, error: &ApiError, exit: u8) -> Value {
    document(
        &code_name(error.reason.code()),
        error.reason.as_str(),
        message,
        &json!(error.metadata),
        &advice::of(error),
        exit,
    )
}

fn document(
    code: &str,
    reason: &str,
    message: &str,
    metadata: &Value,
    advice: &str,
    exit: u8,
) -> Value {
    json!({"error": {
        "code": code,
        "reason": reason,
        "message": message,
        "metadata": metadata,
        "advice": advice,
        "exitCode": exit,
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_get_code_reason_metadata_and_advice() {
        let error = ApiError::new(Reason::NoSuchVm, "no VM vms/web here").with("vm", "vms/web");
        let document = of(&Failure::api("get vms/web", error)).unwrap();
        assert_eq!(
            document,
            json!({"error": {
                "code": "NOT_FOUND",
                "reason": "NO_SUCH_VM",
                "message": "cannot get vms/web: no VM vms/web here",
                "metadata": {"vm": "vms/web"},
                "advice": "slat get vms",
                "exitCode": 3,
            }})
        );
        let range = ApiError::bad_parameter("range", "frame 0x100 is in no slot");
        let document = of(&Failure::api("discard memory", range)).unwrap();
        let message = &document["error"]["message"];
        let said = "cannot discard memory: address 0x100000 is in no slot";
        assert_eq!(message, said, "in the words that people get");
        assert_eq!(of(&Failure::Said(6)), None);
        let usage = of(&Failure::Usage("--memory 0".into())).unwrap();
        assert_eq!(usage["error"]["code"], "INVALID_ARGUMENT");
        assert_eq!(usage["error"]["exitCode"], 2);
        let local = of(&Failure::local("cannot read x")).unwrap();
        assert_eq!(local["error"]["reason"], "LOCAL");
    }
}
