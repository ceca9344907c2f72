//! What a line is about, picked from the bytes of a message. A batch of a thousand changes and a
//! harvest's bitmap are passed over by their lengths: to decode them for a name would take longer
//! than many a call.

use prost::encoding::{DecodeContext, decode_key, skip_field};
use prost_reflect::{DynamicMessage, MessageDescriptor};

/// A message, of which some fields are looked at.
#[derive(Clone, Debug)]
pub(super) struct Picked {
    of: MessageDescriptor,
    numbers: Vec<u32>,
}

impl Picked {
    /// Those of these fields that the message has.
    pub(super) fn new<'a>(
        of: MessageDescriptor,
        fields: impl IntoIterator<Item = &'a &'a str>,
    ) -> Self {
        let number = |name: &&str| Some(of.get_field_by_name(name)?.number());
        let numbers = fields.into_iter().filter_map(number).collect();
        Self { of, numbers }
    }

    /// The message without its other fields; `None` when the bytes are no message.
    pub(super) fn from(&self, message: &[u8]) -> Option<DynamicMessage> {
        let mut kept = Vec::new();
        let mut rest = message;
        while !rest.is_empty() {
            let field = rest;
            let (number, kind) = decode_key(&mut rest).ok()?;
            skip_field(kind, number, &mut rest, DecodeContext::default()).ok()?;
            if self.numbers.contains(&number) {
                kept.extend_from_slice(&field[..field.len() - rest.len()]);
            }
        }
        DynamicMessage::decode(self.of.clone(), &*kept).ok()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_reflect::{DescriptorPool, Value};

    use super::*;
    use crate::v1;

    fn of(message: &str, fields: &[&str]) -> Picked {
        let pool = DescriptorPool::decode(v1::FILE_DESCRIPTOR_SET).unwrap();
        Picked::new(pool.get_message_by_name(message).unwrap(), fields)
    }

    #[test]
    fn only_what_is_asked_for_is_there() {
        let message = v1::HarvestDirtyPagesResponse {
            batch: 7,
            dirty_pages: u64::MAX,
            bitmaps: vec![
                v1::DirtyBits {
                    gfn: 1,
                    bits: vec![3; 4096].into()
                };
                3
            ],
            created: true,
            uid: "a-uid".into(),
            ..Default::default()
        };
        let picked = of("slat.v1.HarvestDirtyPagesResponse", &["vm_uid", "uid"]);
        let found = picked.from(&message.encode_to_vec()).unwrap();
        assert_eq!(
            found.get_field_by_name("uid").unwrap().as_ref(),
            &Value::String("a-uid".into())
        );
        assert_eq!(found.encode_to_vec().len(), 2 + "a-uid".len());
    }

    #[test]
    fn what_is_no_message_is_none() {
        let picked = of("slat.v1.HarvestDirtyPagesResponse", &["uid"]);
        let whole = v1::HarvestDirtyPagesResponse {
            uid: "a-uid".into(),
            ..Default::default()
        }
        .encode_to_vec();
        assert!(picked.from(&whole[..whole.len() - 1]).is_none(), "cut off");
        assert!(picked.from(&[0xff; 12]).is_none(), "no key");
        assert!(
            picked.from(&[0x52, 1, 0xff]).is_none(),
            "a text that is none"
        );
        assert!(picked.from(&[]).is_some());
    }
}
