//! Numbers and names in bytes that come from outside. What is not there is an error, with its place
//! in the file.

use super::NAME;
use crate::error::ImageError;

/// Bytes that are taken one after the other.
#[derive(Debug)]
pub(crate) struct Bytes<'a> {
    left: &'a [u8],
    /// Where in the file the next one is.
    at: u64,
}

impl<'a> Bytes<'a> {
    /// Bytes that stand at `at` in the file.
    pub(crate) fn new(bytes: &'a [u8], at: u64) -> Self {
        Self { left: bytes, at }
    }

    /// Where the next one is.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], ImageError> {
        let (taken, left) = self
            .left
            .split_at_checked(count)
            .ok_or_else(|| ImageError::corrupt("a length that nothing is behind", self.at))?;
        self.left = left;
        self.at += count as u64;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], ImageError> {
        let taken = self.take(N)?;
        // `take` gives as many as it was asked for.
        Ok(std::array::from_fn(|at| taken[at]))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, ImageError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, ImageError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ImageError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, ImageError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Takes `count` bytes that are all zero.
    pub(crate) fn zeroes(&mut self, count: usize) -> Result<(), ImageError> {
        let at = self.at;
        if self.take(count)?.iter().any(|byte| *byte != 0) {
            return Err(ImageError::corrupt("bytes that are to be zero are not", at));
        }
        Ok(())
    }

    /// Takes a name that is filled up with zeroes.
    pub(crate) fn name(&mut self) -> Result<String, ImageError> {
        let at = self.at;
        let field: [u8; NAME] = self.array()?;
        let length = field
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |at| at + 1);
        let name = String::from_utf8_lossy(&field[..length]).into_owned();
        if is_name(&name) {
            Ok(name)
        } else {
            Err(ImageError::corrupt("a name that is none", at))
        }
    }
}

/// Whether sections and features can be called so: lower-case letters, digits and hyphens.
pub(crate) fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=NAME).contains(&name.len()) && name.bytes().all(fits)
}

/// Appends a name and the zeroes after it.
pub(crate) fn put_name(name: &str, into: &mut Vec<u8>) {
    let end = into.len() + NAME;
    into.extend(name.bytes().take(NAME));
    into.resize(end, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_refused_with_its_place() {
        let mut left = Bytes::new(&[1, 0, 2, 0, 0, 0, 9], 100);
        assert_eq!(left.u16().unwrap(), 1);
        assert_eq!(left.u32().unwrap(), 2);
        for count in [2, 8, usize::MAX] {
            let error = left.take(count).unwrap_err();
            assert!(matches!(error, ImageError::Corrupt { offset: 106, .. }));
        }
        assert!(left.u64().is_err() && left.name().is_err() && left.zeroes(1).is_err());
        assert!(left.u8().is_err(), "the look for a zero took it");
    }

    #[test]
    fn a_name_is_filled_up_with_zeroes() {
        let mut bytes = Vec::new();
        let long = "x".repeat(NAME);
        for name in ["vcpu", "a-1", &long] {
            put_name(name, &mut bytes);
        }
        let mut left = Bytes::new(&bytes, 0);
        for name in ["vcpu", "a-1", &long] {
            assert_eq!(left.name().unwrap(), name);
        }
        for wrong in ["", "a b", "A", "a\0b", "\u{e4}"] {
            let mut bytes = Vec::new();
            put_name(wrong, &mut bytes);
            assert!(Bytes::new(&bytes, 0).name().is_err(), "{wrong:?}");
        }
    }
}
