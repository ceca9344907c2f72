//! The header: what must be known before anything else is understood.

use super::{
    KNOWN, NAME,
    bytes::{Bytes, put_name},
    sum,
};
use crate::{
    error::ImageError,
    names::{CLUSTER_PAGES, ImageId, ImageName, PAGE_SIZE},
};

/// Its length.
pub(crate) const HEADER: usize = 4096;
const MAGIC: [u8; 8] = *b"SLATVM\r\n";
const FEATURES: usize = 128;
const MAX_FEATURES: usize = 16;
const SUM: usize = HEADER - 8;

/// Pages of the kind "as in the base".
pub(crate) const BASE: &str = "base";
/// Clusters that are zstd frames.
pub(crate) const ZSTD: &str = "zstd";
/// What this program understands.
const FEATURES_HERE: [&str; 2] = [BASE, ZSTD];

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) id: ImageId,
    pub(crate) base: Option<ImageName>,
    /// Clusters may be zstd frames.
    pub(crate) zstd: bool,
}

impl Header {
    /// As it stands in a file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let features = [(self.base.is_some(), BASE), (self.zstd, ZSTD)];
        let features: Vec<&str> = features
            .iter()
            .filter_map(|(has, name)| has.then_some(*name))
            .collect();
        self.encode_with(&features)
    }

    fn encode_with(&self, features: &[&str]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let numbers = [
            self.version,
            PAGE_SIZE as u32,
            CLUSTER_PAGES as u32,
            u32::from(self.base.is_some()),
        ];
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend(self.id.0);
        bytes.extend(self.base.map_or([0; 16], |base| base.id.0));
        bytes.extend(self.base.map_or(0, |base| base.index_sum).to_le_bytes());
        bytes.extend((features.len() as u32).to_le_bytes());
        bytes.resize(FEATURES, 0);
        for name in features {
            put_name(name, &mut bytes);
        }
        bytes.resize(SUM, 0);
        let sum = sum::of_header(&bytes);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    /// Whether bytes, fewer than a header's, may be the beginning of one.
    pub(crate) fn may_begin_with(bytes: &[u8]) -> bool {
        bytes.len() >= MAGIC.len() && bytes.starts_with(&MAGIC)
    }

    /// Reads a header, and what its checksum is.
    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Result<(Self, u64), ImageError> {
        let mut left = Bytes::new(bytes, 0);
        if left.array()? != MAGIC {
            return Err(ImageError::NotAnImage);
        }
        let version = left.u32()?;
        if !(KNOWN.0..=KNOWN.1).contains(&version) {
            return Err(ImageError::Version {
                found: version,
                known: KNOWN,
            });
        }
        let said = Bytes::new(&bytes[SUM..], SUM as u64).u64()?;
        if sum::of_header(&bytes[..SUM]) != said {
            return Err(ImageError::corrupt(
                "the header's checksum is wrong",
                SUM as u64,
            ));
        }
        for (wanted, what) in [
            (PAGE_SIZE, "the size of a page"),
            (CLUSTER_PAGES, "the size of a group"),
        ] {
            let at = left.at();
            if left.u32()? != wanted as u32 {
                return Err(ImageError::corrupt(what, at));
            }
        }
        let at = left.at();
        let has_base = left.u32()?;
        let id = ImageId(left.array()?);
        let base = ImageName {
            id: ImageId(left.array()?),
            index_sum: left.u64()?,
        };
        let base = match has_base {
            0 if base.id.0 == [0; 16] && base.index_sum == 0 => None,
            1 => Some(base),
            _ => return Err(ImageError::corrupt("whether there is a base", at)),
        };
        let at = left.at();
        let features = features(&mut left)?;
        let has = |name| features.iter().any(|feature| feature == name);
        if has(BASE) != base.is_some() {
            return Err(ImageError::corrupt("a base without its feature", at));
        }
        let zstd = has(ZSTD);
        let header = Self {
            version,
            id,
            base,
            zstd,
        };
        Ok((header, said))
    }
}

/// Names of what a reader must have, all of which are known here.
fn features(left: &mut Bytes<'_>) -> Result<Vec<String>, ImageError> {
    let at = left.at();
    let count = left.u32()? as usize;
    if count > MAX_FEATURES {
        return Err(ImageError::corrupt("too many features", at));
    }
    left.zeroes(FEATURES - left.at() as usize)?;
    let mut features = Vec::new();
    for _ in 0..count {
        let name = left.name()?;
        if !FEATURES_HERE.contains(&name.as_str()) {
            return Err(ImageError::Feature { name });
        }
        features.push(name);
    }
    left.zeroes(SUM - FEATURES - count * NAME)?;
    Ok(features)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            version: KNOWN.1,
            id: ImageId([3; 16]),
            base: Some(ImageName {
                id: ImageId([4; 16]),
                index_sum: 5,
            }),
            zstd: true,
        }
    }

    fn decode(bytes: &[u8]) -> Result<Header, ImageError> {
        Ok(Header::decode(bytes.try_into().unwrap())?.0)
    }

    #[test]
    fn a_header_survives() {
        let alone = Header {
            base: None,
            zstd: false,
            ..header()
        };
        for header in [header(), alone] {
            assert_eq!(decode(&header.encode()).unwrap(), header);
        }
    }

    #[test]
    fn an_unknown_feature_is_refused_by_its_name() {
        let error = decode(&header().encode_with(&[BASE, "holograms"])).unwrap_err();
        assert!(matches!(error, ImageError::Feature { name } if name == "holograms"));
    }

    #[test]
    fn another_version_is_refused_before_anything_else_is_understood() {
        let later = Header {
            version: KNOWN.1 + 1,
            ..header()
        };
        let mut bytes = later.encode();
        // Its checksum may be elsewhere.
        bytes[SUM..].fill(0);
        let error = decode(&bytes).unwrap_err();
        assert!(matches!(error, ImageError::Version { found, known }
            if found == KNOWN.1 + 1 && known == KNOWN));
        bytes[0] = b'x';
        assert!(matches!(decode(&bytes), Err(ImageError::NotAnImage)));
    }

    #[test]
    fn a_base_needs_its_feature() {
        assert!(decode(&header().encode_with(&[ZSTD])).is_err());
    }
}
