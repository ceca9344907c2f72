//! Canonical bytes: numbers are big-endian, texts have a length of two bytes before them.

use ring::rand::{SecureRandom as _, SystemRandom};

use super::GrantError;

/// The longest text in a grant, bytes.
pub(super) const LONGEST: usize = 255;

/// Writes a text. What is longer than [`LONGEST`] is refused.
pub(super) fn put_text(to: &mut Vec<u8>, text: &str) -> Result<(), GrantError> {
    let length = u16::try_from(text.len())
        .ok()
        .filter(|length| usize::from(*length) <= LONGEST)
        .ok_or(GrantError::Malformed("a text is too long"))?;
    to.extend_from_slice(&length.to_be_bytes());
    to.extend_from_slice(text.as_bytes());
    Ok(())
}

/// Reads what the functions above wrote.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], GrantError> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(GrantError::Malformed("it ends too early"))?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn number(&mut self) -> Result<u64, GrantError> {
        Ok(u64::from_be_bytes(self.take()?))
    }

    pub(super) fn text(&mut self) -> Result<&'a str, GrantError> {
        let length = usize::from(u16::from_be_bytes(self.take()?));
        if length > LONGEST {
            return Err(GrantError::Malformed("a text is too long"));
        }
        let (text, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(GrantError::Malformed("it ends too early"))?;
        self.0 = rest;
        std::str::from_utf8(text).map_err(|_| GrantError::Malformed("a text is not UTF-8"))
    }

    pub(super) fn end(&self) -> Result<(), GrantError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(GrantError::Malformed("something follows it"))
        }
    }
}

/// Sixteen random bytes: a grant's id.
///
/// # Errors
/// When the kernel gives no random numbers.
pub(super) fn random_id() -> Result<[u8; 16], GrantError> {
    let mut id = [0; 16];
    SystemRandom::new()
        .fill(&mut id)
        .map_err(|_| GrantError::Malformed("the kernel gives no random numbers"))?;
    Ok(id)
}

/// In hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
