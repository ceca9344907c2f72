//! What a fence is about, and how it is told to people. Plain data.

use slat_proto::v1;

/// A host as it is given to a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fenceable {
    pub(crate) host: String,
    pub(crate) address: String,
    pub(crate) incarnation: String,
    pub(crate) uid: String,
}

/// Of a host whose last start is over, and of what was on it.
pub(super) fn fenced_words(host: &str, fence: &v1::Fence) -> String {
    let time = fence.time.as_ref().map(ToString::to_string);
    format!(
        "{host} was fenced at {} by order of {} (fence {}): nothing that ran there runs any more",
        time.unwrap_or_default(),
        fence.ordered_by,
        fence.id
    )
}
