//! `Abort`: why the other side gave up.

use slat_proto::{ApiError, Reason};

use super::MAX_ABORT;

/// `Abort`'s payload: the reason, a newline, the message.
pub(crate) fn encode_abort(error: &ApiError) -> Vec<u8> {
    let mut text = format!("{}\n{}", error.reason, error.message);
    let mut end = text.len().min(MAX_ABORT as usize);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text.into_bytes()
}

pub(super) fn decode_abort(payload: &[u8]) -> ApiError {
    let text = String::from_utf8_lossy(payload);
    let (reason, message) = text.split_once('\n').unwrap_or((&text, ""));
    let message: String = message.chars().filter(|c| !c.is_control()).collect();
    ApiError::new(Reason::parse(reason).unwrap_or(Reason::Internal), message)
}
