//! Damaged state of a VM, and damage inside its section `monitor`.

use super::{Section, Switchover, VCPU, VmState, decode, encode, encode_monitor};
use crate::fuzz::Target;

/// A whole state: sections as they are found, with right checksums from there on.
pub(crate) const STATE: Target = Target {
    name: "state",
    rounds: 1000,
    corpus: || {
        let clock = section("clock", true, vec![7; 8]);
        let mut more = sections(vec![1, 2, 3]);
        more.push(clock);
        vec![
            encode(&sections(vec![1, 2, 3])),
            encode(&sections(vec![9; 300])),
            encode(&more),
        ]
    },
    check: |bytes| {
        if let Ok(sections) = decode(bytes) {
            *bytes = encode(&sections);
        }
        VmState::decode(bytes).is_ok()
    },
};

/// One section, whose checksum is right.
pub(crate) const MONITOR: Target = Target {
    name: "state-monitor",
    rounds: 500,
    corpus: || vec![encode_monitor(LEFT, None), with_digest()],
    check: |contents| {
        let mut sections = sections(vec![1, 2, 3]);
        sections[0].contents = std::mem::take(contents);
        VmState::decode(&encode(&sections)).is_ok()
    },
};

const LEFT: Switchover = Switchover {
    run: true,
    never_ran: false,
};

/// How a VM left, with the digest of one slot.
fn with_digest() -> Vec<u8> {
    let digest = crate::memory::MemoryDigest {
        slots: vec![crate::memory::SlotDigest {
            slot: 3,
            pages: 9,
            digest: 1 << 100,
        }],
    };
    encode_monitor(LEFT, Some(&digest))
}

fn section(name: &str, optional: bool, contents: Vec<u8>) -> Section {
    Section {
        name: name.to_owned(),
        version: 1,
        optional,
        contents,
    }
}

fn sections(vcpus: Vec<u8>) -> Vec<Section> {
    vec![
        section(super::MONITOR, false, with_digest()),
        section(VCPU, false, vcpus),
    ]
}
