//! Any `slat.v1` message as canonical proto JSON: field names in lowerCamelCase, 64-bit integers as
//! strings, enums by name, times as RFC 3339, durations as `1.5s`. Fields without presence are
//! written even when they hold their default; an unset message or `optional` field is left out, so
//! what is not known never reads as 0. Every proto JSON parser reads it back.

use std::sync::OnceLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

use crate::v1;

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    // The descriptor set is made by this crate's build script from the files the types come from.
    POOL.get_or_init(|| {
        DescriptorPool::decode(v1::FILE_DESCRIPTOR_SET).expect("our own descriptor set")
    })
}

/// Renders `message`.
///
/// # Panics
/// When the type of `message` is no message of `slat.v1`: a programming error.
pub fn to_json<M: Message + Name>(message: &M) -> serde_json::Value {
    let name = M::full_name();
    let descriptor = pool()
        .get_message_by_name(&name)
        .unwrap_or_else(|| panic!("{name} is no message of slat.v1"));
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .expect("a message decodes as its own type");
    let options = SerializeOptions::new().skip_default_fields(false);
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .expect("JSON of a valid message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_canonical_proto_json() {
        let vm = v1::Vm {
            name: "vms/a".into(),
            epoch: u64::MAX,
            state: v1::vm::State::Running.into(),
            create_time: Some(prost_types::Timestamp {
                seconds: 1,
                nanos: 500_000_000,
            }),
            mmu_stats: Some(v1::MmuStats {
                faults_taken: Some(0),
                ..Default::default()
            }),
            ..Default::default()
        };
        let json = to_json(&vm);
        assert_eq!(json["name"], "vms/a");
        assert_eq!(json["epoch"], "18446744073709551615");
        assert_eq!(json["state"], "STATE_RUNNING");
        assert_eq!(json["createTime"], "1970-01-01T00:00:01.500Z");
        assert_eq!(json["dirtyLogging"], false, "a default is written");
        assert_eq!(json["mmuStats"]["faultsTaken"], "0");
        assert!(json["mmuStats"].get("faultsFixed").is_none(), "not known");
        assert!(json.get("guestCounters").is_none(), "unset");
        let params = v1::MigrationParams {
            max_downtime: Some(prost_types::Duration {
                seconds: 1,
                nanos: 500_000_000,
            }),
            ..Default::default()
        };
        assert_eq!(to_json(&params)["maxDowntime"], "1.500s");
    }
}
