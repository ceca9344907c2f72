//! The VM's state but its memory, as it crosses hosts: sections, each named, versioned and bounded.
//!
//! # Layout
//! Little-endian. The number of sections (u32), then for each: length of the name (u8), the name,
//! version (u32), flags (u32; 1: optional), length (u32), CRC-32 of the contents (u32), the
//! contents.
//!
//! | section | version | contents |
//! |---|---|---|
//! | `monitor` | 1 | how the VM left the source and, with `verify` before the commit, the digests |
//! | `vcpu` | 1 | the backend's state of all vCPUs |
//! | `slots` | 1 | optional: the slot table's generation, u64, 1 to 2^63 - 1 |
//! | `interrupt-controller`, `clock`, `devices` | | reserved names: no backend has them yet |
//!
//! A section that this program has nothing for is passed over when its flag says that it is
//! optional. Otherwise it is refused by name, before READY: the source goes on. So is a section
//! that comes twice, or that is not optional and is missing or has a version that is not read here.

use slat_proto::{ApiError, Reason};

use super::payload::{PayloadError, decode_monitor, encode_monitor};
use crate::{machine::Switchover, memory::MemoryDigest};

const MONITOR: &str = "monitor";
const VCPU: &str = "vcpu";
const SLOTS: &str = "slots";
/// Sections read here, each with its version.
const KNOWN: [(&str, u32); 3] = [(MONITOR, 1), (VCPU, 1), (SLOTS, 1)];
const OPTIONAL: u32 = 1;
const MAX_SECTIONS: u32 = 64;
const MAX_NAME: usize = 32;

/// One section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Section {
    pub(crate) name: String,
    pub(crate) version: u32,
    /// Whoever does not know it may go on without.
    pub(crate) optional: bool,
    pub(crate) contents: Vec<u8>,
}

/// Everything but memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmState {
    /// How the VM left the source.
    pub(crate) left: Switchover,
    /// Digest of the paused memory, with `verify` before the commit.
    pub(crate) digest: Option<MemoryDigest>,
    /// From [`crate::backend::Backend::save_state`].
    pub(crate) vcpus: Vec<u8>,
    /// Of the slot table.
    pub(crate) generation: u64,
}

/// [`VmState`] as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReceivedState {
    pub(crate) left: Switchover,
    pub(crate) digests: Option<Vec<(u32, u128)>>,
    pub(crate) vcpus: Vec<u8>,
    /// Of the slot table; `None`: the source's version does not say.
    pub(crate) generation: Option<u64>,
}

/// State that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// It does not have the layout.
    #[error(transparent)]
    Layout(#[from] PayloadError),
    /// A section that nothing here reads, or not in its version.
    #[error("section {name:?}, version {version}: {message}")]
    Section {
        name: String,
        version: u32,
        message: String,
    },
}

impl From<StateError> for ApiError {
    fn from(error: StateError) -> Self {
        let message = error.to_string();
        match error {
            StateError::Layout(error) => error.into(),
            StateError::Section { name, version, .. } => ApiError::new(
                Reason::StateVersionUnsupported,
                message,
            )
            .with("section", name)
            .with("version", version)
            .with("vm_location", "SOURCE")
            .with(
                "advice",
                "the VM goes on at the source; bring both hosts to the same version of slat",
            ),
        }
    }
}

impl VmState {
    /// As it is sent.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let monitor = encode_monitor(self.left, self.digest.as_ref());
        let section = |name: &str, contents| Section {
            name: name.to_owned(),
            version: 1,
            optional: false,
            contents,
        };
        let slots = Section {
            optional: true,
            ..section(SLOTS, self.generation.to_le_bytes().to_vec())
        };
        encode(&[
            section(MONITOR, monitor),
            section(VCPU, self.vcpus.clone()),
            slots,
        ])
    }

    /// What [`VmState::encode`] made.
    ///
    /// # Errors
    /// See [`StateError`].
    pub(crate) fn decode(bytes: &[u8]) -> Result<ReceivedState, StateError> {
        let [mut monitor, mut vcpus, mut slots] = [None, None, None];
        for section in decode(bytes)? {
            let refuse = |message: &str| StateError::Section {
                name: section.name.clone(),
                version: section.version,
                message: message.to_owned(),
            };
            let Some((_, version)) = KNOWN.iter().find(|(name, _)| *name == section.name) else {
                if section.optional {
                    tracing::info!(section = section.name, "an optional section is passed over");
                    continue;
                }
                return Err(refuse("this program has nothing that reads it"));
            };
            if section.version != *version {
                if section.optional {
                    tracing::info!(section = section.name, "an optional section is passed over");
                    continue;
                }
                return Err(refuse(&format!("this program reads version {version}")));
            }
            let place = match section.name.as_str() {
                MONITOR => &mut monitor,
                VCPU => &mut vcpus,
                _ => &mut slots,
            };
            if place.is_some() {
                return Err(refuse("it comes twice"));
            }
            *place = Some(section.contents);
        }
        let missing = |name: &str| StateError::Section {
            name: name.to_owned(),
            version: 1,
            message: "it is missing".to_owned(),
        };
        let monitor = monitor.ok_or_else(|| missing(MONITOR))?;
        let vcpus = vcpus.ok_or_else(|| missing(VCPU))?;
        let (left, digests) = decode_monitor(&monitor)?;
        Ok(ReceivedState {
            left,
            digests,
            vcpus,
            generation: slots.map(|slots| generation(&slots)).transpose()?,
        })
    }
}

/// What the section `slots` says. Room to count on is left above it.
fn generation(contents: &[u8]) -> Result<u64, PayloadError> {
    let bytes = contents
        .try_into()
        .map_err(|_| PayloadError::new("length", "of section slots"))?;
    let generation = u64::from_le_bytes(bytes);
    if generation == 0 || i64::try_from(generation).is_err() {
        return Err(PayloadError::new("generation", generation));
    }
    Ok(generation)
}

fn encode(sections: &[Section]) -> Vec<u8> {
    let mut bytes = (sections.len() as u32).to_le_bytes().to_vec();
    for section in sections {
        bytes.push(section.name.len() as u8);
        bytes.extend_from_slice(section.name.as_bytes());
        let flags = if section.optional { OPTIONAL } else { 0 };
        let sum = crc32fast::hash(&section.contents);
        for word in [section.version, flags, section.contents.len() as u32, sum] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&section.contents);
    }
    bytes
}

fn decode(mut bytes: &[u8]) -> Result<Vec<Section>, PayloadError> {
    let count = word(&mut bytes)?;
    if count > MAX_SECTIONS {
        return Err(PayloadError::new(
            "sections",
            format!("{count}, at most {MAX_SECTIONS}"),
        ));
    }
    let mut sections = Vec::new();
    for _ in 0..count {
        sections.push(section(&mut bytes)?);
    }
    if !bytes.is_empty() {
        return Err(PayloadError::new(
            "length",
            format!("{} bytes after the last section", bytes.len()),
        ));
    }
    Ok(sections)
}

fn section(bytes: &mut &[u8]) -> Result<Section, PayloadError> {
    let length = usize::from(take(bytes, 1)?[0]);
    if length == 0 || length > MAX_NAME {
        return Err(PayloadError::new("name", format!("{length} bytes")));
    }
    let name = take(bytes, length)?;
    let fits = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
    if !name.iter().all(fits) {
        return Err(PayloadError::new("name", name.escape_ascii()));
    }
    let name = String::from_utf8_lossy(name).into_owned();
    let version = word(bytes)?;
    let flags = word(bytes)?;
    let length = word(bytes)?;
    let sum = word(bytes)?;
    let contents = take(bytes, length as usize)?;
    if crc32fast::hash(contents) != sum {
        return Err(PayloadError::new(
            "section",
            format!("{name}: wrong checksum"),
        ));
    }
    Ok(Section {
        name,
        version,
        optional: flags & OPTIONAL != 0,
        contents: contents.to_vec(),
    })
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8], PayloadError> {
    let (taken, rest) = bytes
        .split_at_checked(length)
        .ok_or_else(|| PayloadError::new("length", "of a section"))?;
    *bytes = rest;
    Ok(taken)
}

fn word(bytes: &mut &[u8]) -> Result<u32, PayloadError> {
    let word = take(bytes, 4)?;
    Ok(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}

#[cfg(any(test, feature = "fuzz"))]
pub(super) mod fuzzed;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::SlotDigest;

    fn sample() -> VmState {
        VmState {
            left: Switchover {
                run: true,
                never_ran: false,
            },
            digest: Some(MemoryDigest {
                slots: vec![SlotDigest {
                    slot: 3,
                    pages: 9,
                    digest: 1 << 100,
                }],
            }),
            vcpus: vec![1, 2, 3],
            generation: 7,
        }
    }

    fn with(change: impl FnOnce(&mut Vec<Section>)) -> Result<ReceivedState, StateError> {
        let mut sections = decode(&sample().encode()).unwrap();
        change(&mut sections);
        VmState::decode(&encode(&sections))
    }

    fn extra(optional: bool) -> Section {
        Section {
            name: "clock".to_owned(),
            version: 1,
            optional,
            contents: vec![7; 8],
        }
    }

    #[test]
    fn a_state_survives() {
        let back = VmState::decode(&sample().encode()).unwrap();
        assert_eq!(
            back,
            ReceivedState {
                left: sample().left,
                digests: Some(vec![(3, 1 << 100)]),
                vcpus: vec![1, 2, 3],
                generation: Some(7),
            }
        );
    }

    #[test]
    fn a_section_that_nobody_reads_is_refused_by_name_unless_it_is_optional() {
        let refused = ApiError::from(with(|sections| sections.push(extra(false))).unwrap_err());
        assert_eq!(refused.reason, Reason::StateVersionUnsupported);
        assert_eq!(refused.metadata["section"], "clock");
        with(|sections| sections.push(extra(true))).unwrap();
    }

    #[test]
    fn a_source_that_does_not_say_the_generation_is_understood() {
        let without = with(|sections| drop(sections.pop())).unwrap();
        assert_eq!(without.generation, None);
        let later = with(|sections| sections[2].version = 2).unwrap();
        assert_eq!(later.generation, None);
        for wrong in [0, 1 << 63, u64::MAX] {
            let said = |sections: &mut Vec<Section>| {
                sections[2].contents = u64::to_le_bytes(wrong).to_vec();
            };
            assert!(with(said).is_err(), "{wrong}");
        }
        assert!(with(|sections| sections[2].contents.truncate(7)).is_err());
    }

    #[test]
    fn another_version_a_twin_and_a_gap_are_refused_by_name() {
        let name = |result: Result<ReceivedState, StateError>| {
            let error = ApiError::from(result.unwrap_err());
            assert_eq!(error.reason, Reason::StateVersionUnsupported);
            error.metadata["section"].clone()
        };
        assert_eq!(name(with(|sections| sections[1].version = 9)), VCPU);
        assert_eq!(name(with(|sections| drop(sections.remove(0)))), MONITOR);
        let twice = with(|sections| {
            let twin = sections[1].clone();
            sections.push(twin);
        });
        assert_eq!(name(twice), VCPU);
    }

    #[test]
    fn every_cut_and_every_flipped_bit_of_the_contents_is_found() {
        let bytes = sample().encode();
        for cut in 0..bytes.len() {
            assert!(VmState::decode(&bytes[..cut]).is_err(), "{cut}");
        }
        for bit in 0..24 {
            let mut damaged = bytes.clone();
            let at = damaged.len() - 3 + bit / 8;
            damaged[at] ^= 1 << (bit % 8);
            assert!(VmState::decode(&damaged).is_err(), "{bit}");
        }
    }

    #[test]
    fn damaged_states_are_refused_or_understood() {
        assert!(crate::fuzz::bounded(&fuzzed::STATE) > 0);
        crate::fuzz::bounded(&fuzzed::MONITOR);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(VmState::decode(&bytes));
        }
    }
}
