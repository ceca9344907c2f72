//! What a connection shows inside its TLS: the migration's ticket, bound to this one handshake and
//! to the number of the stream.

use ring::hmac;
use subtle::ConstantTimeEq as _;

/// Label of the exporter that a token is made from.
pub const EXPORTER: &[u8] = b"EXPORTER-slat-page-stream";
/// Bytes of a token, of a ticket, and of what is exported.
pub const TOKEN: usize = 32;

/// HMAC-SHA256 by `ticket` over what the handshake exported ([`EXPORTER`]) and the stream's number.
#[must_use]
pub fn token(ticket: &[u8; TOKEN], exported: &[u8; TOKEN], stream: u32) -> [u8; TOKEN] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, ticket);
    let mut context = hmac::Context::with_key(&key);
    context.update(exported);
    context.update(&stream.to_be_bytes());
    let mut token = [0; TOKEN];
    token.copy_from_slice(context.sign().as_ref());
    token
}

/// Whether both are the same; how long it takes does not tell where they differ.
#[must_use]
pub fn same(one: &[u8; TOKEN], other: &[u8; TOKEN]) -> bool {
    one.ct_eq(other).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_depends_on_everything_it_is_made_from() {
        let right = token(&[1; TOKEN], &[2; TOKEN], 3);
        assert!(same(&right, &token(&[1; TOKEN], &[2; TOKEN], 3)));
        for other in [
            token(&[9; TOKEN], &[2; TOKEN], 3),
            token(&[1; TOKEN], &[9; TOKEN], 3),
            token(&[1; TOKEN], &[2; TOKEN], 4),
        ] {
            assert!(!same(&right, &other));
        }
    }
}
