//! What a save's file has beside memory, as sections: the VM as a migration would announce it, its
//! state, and what is shown of the save.
//!
//! A file comes from outside, so what is read is checked: a section that is missing or that cannot
//! be decoded makes the save a corrupt one.

use std::collections::BTreeMap;

use prost::Message as _;
use slat_image::{
    ImageError, MAX_WORKING_SET, MemorySpec, Reader, Section, Storage, WorkingRun,
    working_set_section,
};
use slat_proto::v1;

/// `PrepareIncomingRequest`.
const MANIFEST: &str = "manifest";
/// The sections of a handover's State, as one.
const STATE: &str = "state";
/// `Save`.
const SHOWN: &str = "save";
/// Of all three.
const VERSION: u32 = 1;

/// What is written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Contents {
    pub(crate) manifest: v1::PrepareIncomingRequest,
    pub(crate) state: Vec<u8>,
    pub(crate) shown: v1::Save,
}

impl Contents {
    /// As sections of a file.
    pub(crate) fn into_sections(self) -> Vec<Section> {
        let section = |name: &str, optional, contents| Section {
            name: name.to_owned(),
            version: VERSION,
            optional,
            contents,
        };
        vec![
            section(MANIFEST, false, self.manifest.encode_to_vec()),
            section(STATE, false, self.state),
            section(SHOWN, true, self.shown.encode_to_vec()),
        ]
    }

    /// From a file.
    ///
    /// # Errors
    /// As the reader's; `Corrupt` for one that is missing or means nothing.
    pub(super) fn read<S: Storage>(reader: &Reader<S>) -> Result<Self, ImageError> {
        let manifest = needed(reader, MANIFEST)?;
        let manifest = v1::PrepareIncomingRequest::decode(manifest.as_slice());
        Ok(Self {
            manifest: manifest.map_err(|_| wrong("a manifest that cannot be decoded"))?,
            state: needed(reader, STATE)?,
            shown: shown(reader)?,
        })
    }
}

/// What the guest had touched, as a section; nothing when that is not known. What does not fit the
/// slots is left out: they may have changed since.
pub(crate) fn working_set(slots: &[v1::Slot], touched: &[v1::WorkingSetRun]) -> Option<Section> {
    let memories = slots.iter().map(|slot| (slot.slot, slot.pages));
    let memories: BTreeMap<u32, u64> = memories.collect();
    let mut runs: Vec<WorkingRun> = Vec::new();
    for run in touched {
        let Some(pages) = memories.get(&run.slot) else {
            continue;
        };
        let end = run.page.saturating_add(run.pages).min(*pages);
        let after =
            |last: &WorkingRun| (last.memory, last.first + last.pages) <= (run.slot, run.page);
        if run.page < end && runs.last().is_none_or(after) && runs.len() < MAX_WORKING_SET {
            runs.push(WorkingRun {
                memory: run.slot,
                first: run.page,
                pages: end - run.page,
            });
        }
    }
    let memories: Vec<MemorySpec> = memories
        .into_iter()
        .map(|(number, pages)| MemorySpec { number, pages })
        .collect();
    let section = (!runs.is_empty()).then(|| working_set_section(&runs, &memories));
    section.transpose().unwrap_or_else(|error| {
        // A save does not fail for want of a hint.
        tracing::warn!(%error, "a working set that is not written");
        None
    })
}

/// What is shown of a save; without that section, nothing of it is known.
pub(super) fn shown<S: Storage>(reader: &Reader<S>) -> Result<v1::Save, ImageError> {
    let section = reader.section(SHOWN)?.filter(|is| is.version == VERSION);
    let bytes = section.map(|section| section.contents).unwrap_or_default();
    v1::Save::decode(bytes.as_slice()).map_err(|_| wrong("a description that cannot be decoded"))
}

fn needed<S: Storage>(reader: &Reader<S>, name: &str) -> Result<Vec<u8>, ImageError> {
    let section = reader.section(name)?;
    let section = section.ok_or_else(|| wrong("a section is missing"))?;
    if section.version == VERSION {
        return Ok(section.contents);
    }
    Err(ImageError::Version {
        found: section.version,
        known: (VERSION, VERSION),
    })
}

/// Of a section, whose place in the file does not matter.
fn wrong(what: &'static str) -> ImageError {
    ImageError::Corrupt { what, offset: 0 }
}
