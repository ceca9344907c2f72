//! vCPU state as it travels: that there is none.
//!
//! Everything a software vCPU knows is in guest memory (memstress' control pages); its TLB is empty
//! elsewhere and its pacer begins anew. What is saved says only what it is for, so that another
//! kind, version, number of vCPUs or format is refused.
//!
//! Little-endian: magic `SLATSOFT`, version, vCPUs, format, each a `u32`.

use slat_proto::model::Format;

use crate::backend::BackendError;

const MAGIC: &[u8; 8] = b"SLATSOFT";
const VERSION: u32 = 1;
const LEN: usize = 20;

pub(super) fn save(vcpus: u32, format: Format) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for word in [VERSION, vcpus, number(format)] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// # Errors
/// `State` that says what is wrong.
pub(super) fn check(state: &[u8], vcpus: u32, format: Format) -> Result<(), BackendError> {
    let bad = |message: String| Err(BackendError::State { message });
    let Some(words) = state.strip_prefix(MAGIC) else {
        return bad("not that of the software backend".to_owned());
    };
    let (words, rest) = words.as_chunks::<4>();
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    match words.next() {
        Some(VERSION) => {}
        version => {
            return bad(match version {
                Some(version) => format!("version {version}, not {VERSION}"),
                None => "it ends before its version".to_owned(),
            });
        }
    }
    if state.len() != LEN || !rest.is_empty() {
        return bad(format!("{} bytes, not {LEN}", state.len()));
    }
    if words.next() != Some(vcpus) {
        return bad(format!("of another number of vCPUs than {vcpus}"));
    }
    if words.next() != Some(number(format)) {
        return bad(format!("of another format than {format}"));
    }
    Ok(())
}

fn number(format: Format) -> u32 {
    format.to_message() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_is_accepted() {
        let good = save(2, Format::Sv48x4);
        assert_eq!(good.len(), LEN);
        check(&good, 2, Format::Sv48x4).unwrap();
        assert!(check(&good, 3, Format::Sv48x4).is_err());
        assert!(check(&good, 2, Format::Ept4).is_err());
        for len in 0..LEN {
            assert!(check(&good[..len], 2, Format::Sv48x4).is_err(), "{len}");
        }
        for at in 0..LEN {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(check(&bad, 2, Format::Sv48x4).is_err(), "{at}");
        }
        assert!(check(&[good, vec![0]].concat(), 2, Format::Sv48x4).is_err());
    }
}
