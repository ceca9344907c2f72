//! Payloads of the control frames around the handover: the slot table, how the VM left the source,
//! the answer to COMMIT.
//!
//! All little-endian, all lengths explicit, all checked on receipt.
//!
//! * `SlotTable`: for each slot, number u32, flags u32 (1: read-only), base_gfn u64, pages u64.
//! * section `monitor` of `State`: flags u32 (1: the VM was running, 2: digests follow, 4: it had
//!   never run), slots u32, for each slot number u32 and digest u128. In protocol 1 the vCPUs'
//!   state follows, to the end.
//! * `Resumed`: flags u32 (1: the VM runs, or rests, as it did at the source), then for each slot
//!   number u32 and digest u128; none without `verify`.

use slat_proto::{ApiError, Reason, model::SlotSpec};

use crate::{
    machine::Switchover,
    memory::{MemoryDigest, SlotTable},
};

const SLOT: usize = 24;
const DIGEST: usize = 20;
const RUN: u32 = 1;
const DIGESTS: u32 = 2;
const NEVER_RAN: u32 = 4;

/// A payload that its layout does not allow.
#[derive(Debug, thiserror::Error)]
#[error("bad frame: {field}: {message}")]
pub(crate) struct PayloadError {
    field: &'static str,
    message: String,
}

impl PayloadError {
    pub(crate) fn new(field: &'static str, message: impl ToString) -> Self {
        Self {
            field,
            message: message.to_string(),
        }
    }
}

impl From<PayloadError> for ApiError {
    fn from(error: PayloadError) -> Self {
        ApiError::new(Reason::StreamCorrupt, error.to_string()).with("field", error.field)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn u128_at(bytes: &[u8], at: usize) -> Option<u128> {
    Some(u128::from_le_bytes(
        bytes.get(at..at + 16)?.try_into().ok()?,
    ))
}

/// The table as the source has it.
pub(crate) fn encode_slots(table: &SlotTable) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(table.slots().len() * SLOT);
    for slot in table.slots() {
        let spec = slot.spec();
        bytes.extend_from_slice(&spec.slot.to_le_bytes());
        bytes.extend_from_slice(&u32::from(spec.read_only).to_le_bytes());
        bytes.extend_from_slice(&spec.base_gfn.to_le_bytes());
        bytes.extend_from_slice(&spec.pages.to_le_bytes());
    }
    bytes
}

/// Checks that the source's table is the one announced.
pub(crate) fn check_slots(bytes: &[u8], table: &SlotTable) -> Result<(), PayloadError> {
    let wrong = |message: String| Err(PayloadError::new("slot_table", message));
    if bytes.len() != table.slots().len() * SLOT {
        return wrong(format!(
            "{} bytes for {} slots",
            bytes.len(),
            table.slots().len()
        ));
    }
    for (chunk, ours) in bytes.chunks_exact(SLOT).zip(table.slots()) {
        let theirs = (|| {
            SlotSpec::new(
                u32_at(chunk, 0)?,
                u64_at(chunk, 8)?,
                u64_at(chunk, 16)?,
                u32_at(chunk, 4)? & 1 == 1,
            )
            .ok()
        })();
        if theirs != Some(ours.spec()) {
            return wrong(format!(
                "slot {} differs: {theirs:?} here {:?}",
                ours.spec().slot,
                ours.spec()
            ));
        }
    }
    Ok(())
}

fn encode_digests(digests: impl Iterator<Item = (u32, u128)>, to: &mut Vec<u8>) {
    for (slot, digest) in digests {
        to.extend_from_slice(&slot.to_le_bytes());
        to.extend_from_slice(&digest.to_le_bytes());
    }
}

fn decode_digests(bytes: &[u8]) -> Result<Vec<(u32, u128)>, PayloadError> {
    if !bytes.len().is_multiple_of(DIGEST) {
        return Err(PayloadError::new(
            "digests",
            format!("{} bytes", bytes.len()),
        ));
    }
    Ok(bytes
        .chunks_exact(DIGEST)
        .filter_map(|chunk| Some((u32_at(chunk, 0)?, u128_at(chunk, 4)?)))
        .collect())
}

/// Digests by slot number.
pub(crate) type Digests = Vec<(u32, u128)>;

/// How the VM left the source, and the digests of its memory when they were taken.
pub(crate) fn encode_monitor(left: Switchover, digest: Option<&MemoryDigest>) -> Vec<u8> {
    let slots = digest.map_or(&[][..], |digest| &digest.slots);
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let flags =
        flag(left.run, RUN) | flag(left.never_ran, NEVER_RAN) | flag(digest.is_some(), DIGESTS);
    let mut bytes = Vec::with_capacity(8 + slots.len() * DIGEST);
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&(slots.len() as u32).to_le_bytes());
    encode_digests(
        slots.iter().map(|slot| (slot.slot, slot.digest)),
        &mut bytes,
    );
    bytes
}

/// What [`encode_monitor`] wrote.
pub(crate) fn decode_monitor(bytes: &[u8]) -> Result<(Switchover, Option<Digests>), PayloadError> {
    let short = || PayloadError::new("length", "of section monitor");
    let flags = u32_at(bytes, 0).ok_or_else(short)?;
    let slots = u32_at(bytes, 4).ok_or_else(short)? as usize;
    let end = slots
        .checked_mul(DIGEST)
        .and_then(|len| len.checked_add(8))
        .ok_or_else(short)?;
    let digests = decode_digests(bytes.get(8..end).ok_or_else(short)?)?;
    if bytes.len() != end {
        return Err(short());
    }
    let left = Switchover {
        run: flags & RUN != 0,
        never_ran: flags & NEVER_RAN != 0,
    };
    Ok((left, (flags & DIGESTS != 0).then_some(digests)))
}

/// The answer to COMMIT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resumed {
    /// The VM runs if it was to run. False: it is owned by the destination, but its vCPUs could not
    /// be started.
    pub(crate) as_it_was: bool,
    /// Digests of memory as received, by slot number.
    pub(crate) digests: Vec<(u32, u128)>,
}

impl Resumed {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(4 + self.digests.len() * DIGEST);
        bytes.extend_from_slice(&u32::from(self.as_it_was).to_le_bytes());
        encode_digests(self.digests.iter().copied(), &mut bytes);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, PayloadError> {
        let flags = u32_at(bytes, 0).ok_or_else(|| PayloadError::new("length", "of Resumed"))?;
        Ok(Self {
            as_it_was: flags & 1 == 1,
            digests: decode_digests(&bytes[4..])?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_answer_survives() {
        let resumed = Resumed {
            as_it_was: true,
            digests: vec![(0, 5), (1, u128::MAX)],
        };
        assert_eq!(Resumed::decode(&resumed.encode()).unwrap(), resumed);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            drop(decode_monitor(&bytes));
            drop(Resumed::decode(&bytes));
            drop(check_slots(&bytes, &SlotTable::default()));
        }
    }
}
