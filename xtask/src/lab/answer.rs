//! What `slat -o json` answers, which is proto JSON. What is not there is nothing, never zero.

use serde_json::Value;

/// A number in proto JSON: 64-bit ones are strings.
pub(crate) fn number(value: &Value) -> Option<u64> {
    let text = value.as_str().and_then(|text| text.parse().ok());
    value.as_u64().or(text)
}

/// A duration in proto JSON, in milliseconds.
pub(crate) fn milliseconds(value: &Value) -> Option<f64> {
    let seconds = value.as_str()?.strip_suffix('s')?;
    seconds.parse::<f64>().ok().map(|seconds| seconds * 1e3)
}

/// The last word of an enum's value: `COMPLETED` of `MIGRATION_PHASE_COMPLETED`.
pub(crate) fn is(value: &Value, word: &str) -> bool {
    value
        .as_str()
        .is_some_and(|text| text.ends_with(&format!("_{word}")))
}

/// Whether a migration has ended.
pub(crate) fn ended(migration: &Value) -> bool {
    ["COMPLETED", "FAILED", "CANCELLED"]
        .iter()
        .any(|phase| is(&migration["phase"], phase))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_read_as_proto_json_writes_them() {
        assert_eq!(number(&json!("17")), Some(17));
        assert_eq!(number(&json!(3)), Some(3));
        assert_eq!(number(&json!(null)), None);
        assert_eq!(milliseconds(&json!("0.300s")), Some(300.0));
        assert_eq!(milliseconds(&json!(null)), None);
        assert!(is(&json!("STATE_READY"), "READY"));
        assert!(!is(&json!("STATE_UNREADY"), "READY"));
        assert!(ended(&json!({"phase": "MIGRATION_PHASE_FAILED"})));
        assert!(!ended(&json!({"phase": "MIGRATION_PHASE_IN_DOUBT"})));
    }
}
