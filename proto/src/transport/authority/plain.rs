//! A block of headers with its strings as they are, without HPACK's Huffman code (RFC 7541).
//!
//! The decoder that keeps the table builds the code anew for every string, which takes longer than
//! all else that is done to a small request. So strings are decoded here first, by a tree that is
//! built once, and it finds none in that code.
//!
//! The code is canonical: it follows from the lengths of its words, in the order of length, then
//! symbol. What is malformed is so here, or passes and is found by the decoder.

use std::sync::LazyLock;

/// The symbol that ends a string, and must not be in one.
const END: u16 = 256;
/// Bits of each symbol's word (RFC 7541, appendix B).
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];
/// A branch that leads to a symbol; else to a node.
const SYMBOL: u16 = 1 << 15;

/// Nodes with a branch for each bit. There are as many as symbols less one.
static TREE: LazyLock<Vec<[u16; 2]>> = LazyLock::new(|| {
    let mut tree = vec![[0; 2]];
    for (symbol, word, bits) in words() {
        let mut node = 0;
        for at in (0..bits).rev() {
            let bit = (word >> at & 1) as usize;
            if at == 0 {
                tree[node][bit] = SYMBOL | symbol;
            } else if tree[node][bit] == 0 {
                let next = tree.len();
                tree.push([0; 2]);
                tree[node][bit] = next as u16;
                node = next;
            } else {
                node = tree[node][bit] as usize;
            }
        }
    }
    tree
});

/// Every symbol with its word and the word's length.
fn words() -> impl Iterator<Item = (u16, u32, u8)> {
    let mut order: Vec<u16> = (0..=END).collect();
    order.sort_by_key(|symbol| LENGTHS[usize::from(*symbol)]);
    let (mut word, mut before) = (0_u32, LENGTHS[usize::from(order[0])]);
    order.into_iter().map(move |symbol| {
        let bits = LENGTHS[usize::from(symbol)];
        word <<= bits - before;
        before = bits;
        word += 1;
        (symbol, word - 1, bits)
    })
}

/// `None` when its padding is not the beginning of the end's word, or the end is in it.
fn decode(coded: &[u8]) -> Option<Vec<u8>> {
    let tree = &*TREE;
    let mut out = Vec::with_capacity(coded.len() * 8 / 5);
    let (mut node, mut since, mut ones) = (0_usize, 0, true);
    for byte in coded {
        for at in (0..8).rev() {
            let bit = byte >> at & 1;
            since += 1;
            ones &= bit == 1;
            let next = tree[node][usize::from(bit)];
            if next & SYMBOL == 0 {
                node = next.into();
                continue;
            }
            out.push(u8::try_from(next & !SYMBOL).ok()?);
            (node, since, ones) = (0, 0, true);
        }
    }
    (since < 8 && ones).then_some(out)
}

/// Bytes of an integer with a prefix of so many bits, at the beginning; `None` when it has no end.
fn integer(bytes: &[u8], prefix: u8) -> Option<usize> {
    let full = u8::MAX >> (8 - prefix);
    if bytes.first()? & full != full {
        return Some(1);
    }
    let rest = bytes.iter().skip(1).position(|byte| byte & 0x80 == 0)?;
    Some(rest + 2)
}

/// A string's length, and the bytes that say it.
fn string_length(bytes: &[u8]) -> Option<(usize, usize)> {
    let said = integer(bytes, 7)?;
    let mut length = usize::from(bytes[0] & 0x7f);
    for (at, byte) in bytes[1..said].iter().enumerate() {
        let part = usize::from(byte & 0x7f);
        // Longer ones than any block are malformed.
        length += part.checked_shl(7 * at as u32).filter(|_| at < 4)?;
    }
    Some((length, said))
}

/// Copies the string at the beginning; returns what comes after it.
fn string<'a>(bytes: &'a [u8], out: &mut Vec<u8>) -> Option<&'a [u8]> {
    let (long, said) = string_length(bytes)?;
    let (text, rest) = bytes[said..].split_at_checked(long)?;
    if bytes[0] & 0x80 == 0 {
        out.extend_from_slice(&bytes[..said + long]);
    } else {
        let plain = decode(text)?;
        length(out, plain.len());
        out.extend_from_slice(&plain);
    }
    Some(rest)
}

/// A string's length, with the seven bits that its first byte has for it.
pub(super) fn length(out: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(127) else {
        out.push(length as u8);
        return;
    };
    out.push(127);
    while rest >= 128 {
        out.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    out.push(rest as u8);
}

/// See the module; `None` when it is malformed.
pub(super) fn plain(block: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(block.len() * 2);
    let mut rest = block;
    while let Some(first) = rest.first() {
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let said = integer(rest, prefix)?;
        out.extend_from_slice(&rest[..said]);
        let named = first & (u8::MAX >> (8 - prefix)) == 0;
        rest = &rest[said..];
        if literal {
            if named {
                rest = string(rest, &mut out)?;
            }
            rest = string(rest, &mut out)?;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use loona_hpack::Decoder;

    use super::*;

    /// In the code, with the padding that it must have.
    fn encode(text: &[u8]) -> Vec<u8> {
        let mut by_symbol = [(0, 0); 257];
        for (symbol, word, bits) in words() {
            by_symbol[usize::from(symbol)] = (word, bits);
        }
        let (mut out, mut have, mut held) = (Vec::new(), 0, 0_u64);
        for byte in text {
            let (word, bits) = by_symbol[usize::from(*byte)];
            held = held << bits | u64::from(word);
            have += bits;
            while have >= 8 {
                have -= 8;
                out.push((held >> have) as u8);
            }
        }
        if have > 0 {
            out.push((held << (8 - have)) as u8 | 0xff >> have);
        }
        out
    }

    /// A header that is named and in the code, with this kind of entry.
    fn header(kind: u8, name: &[u8], value: &[u8]) -> Vec<u8> {
        let mut block = vec![kind];
        for text in [name, value] {
            let coded = encode(text);
            let at = block.len();
            length(&mut block, coded.len());
            block[at] |= 0x80;
            block.extend(coded);
        }
        block
    }

    #[test]
    fn every_byte_is_what_the_decoder_makes_of_it() {
        let all: Vec<u8> = (0..=255).collect();
        let mut block = vec![0x82, 0x3f, 0xe1, 0x1e];
        for (number, kind) in [0x40, 0x00, 0x10].into_iter().enumerate() {
            block.extend(header(kind, format!("name-{number}").as_bytes(), &all));
        }
        // Its name from the table, its value plain; then the whole from the table.
        block.extend([0x7e, 2, b'o', b'k', 0xbe]);
        let plain = plain(&block).unwrap();
        let theirs = Decoder::new().decode(&block).unwrap();
        assert_eq!(theirs, Decoder::new().decode(&plain).unwrap());
        assert_eq!(theirs[1], (b"name-0".to_vec(), all));
        assert_eq!(theirs[5].1, b"ok");
    }

    #[test]
    fn what_is_cut_off_or_badly_padded_is_malformed() {
        let block = header(0x40, b"name", b"some value");
        let cut = |end: usize| plain(&block[..end]);
        assert!((1..block.len()).all(|end| cut(end).is_none()));
        let one = encode(b"0");
        assert_eq!(one, [0x07], "five bits and three of padding");
        assert_eq!(decode(&one).unwrap(), b"0");
        assert_eq!(decode(&[0x06]), None, "padded with a zero");
        assert_eq!(decode(&[0x07, 0xff]), None, "a byte of padding");
        assert_eq!(decode(&[0xff; 4]), None, "the end itself");
        assert_eq!(decode(&[]).unwrap(), b"");
        assert_eq!(
            plain(&[0x40, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]),
            None
        );
    }
}
