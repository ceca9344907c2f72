//! Any `slat.v1` message as canonical proto JSON (field names as in the .proto files, defaults left
//! out).

use std::sync::OnceLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

use crate::v1;

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    // The descriptor set is made by this crate's build script from the files the types come from.
    POOL.get_or_init(|| {
        DescriptorPool::decode(v1::FILE_DESCRIPTOR_SET).expect("our own descriptor set")
    })
}

/// Renders `message`, whose full protobuf name is `name` (e.g. `slat.v1.Vm`).
///
/// # Panics
/// When `name` is no message of `slat.v1` or not the name of `message`'s type: a programming error.
pub fn to_json<M: Message>(name: &str, message: &M) -> serde_json::Value {
    let descriptor = pool()
        .get_message_by_name(name)
        .unwrap_or_else(|| panic!("{name} is no message of slat.v1"));
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .expect("a message decodes as its own type");
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false)
        .skip_default_fields(false);
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .expect("JSON of a valid message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_names_are_the_protos() {
        let vm = v1::Vm {
            name: "vms/a".into(),
            epoch: 3,
            state: v1::vm::State::Running.into(),
            ..Default::default()
        };
        let json = to_json("slat.v1.Vm", &vm);
        assert_eq!(json["name"], "vms/a");
        assert_eq!(json["epoch"], 3);
        assert_eq!(json["state"], "STATE_RUNNING");
    }
}
