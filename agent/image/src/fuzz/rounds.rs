//! Bounded rounds of damaged images, made of valid ones: bits flipped, bytes and numbers replaced
//! by those that break arithmetic, pieces cut out, doubled, and moved from one to another. Most
//! damage goes where numbers are: the header's first bytes, and all behind the clusters.

use std::fmt::Write as _;

use super::{NAME, corpus, run};

/// Some seconds.
const ROUNDS: u64 = 20_000;
/// No input grows beyond this.
const LONGEST: usize = 1 << 16;
const EDGES: [u64; 10] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 63,
    u64::MAX,
];

fn number(name: &str, otherwise: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// A place to damage.
fn place(bytes: &[u8], random: &mut fastrand::Rng) -> usize {
    if bytes.is_empty() {
        return 0;
    }
    match random.u8(..8) {
        0 => random.usize(..bytes.len()),
        1 => random.usize(..bytes.len().min(160)),
        _ => random.usize(bytes.len().saturating_sub(800)..bytes.len()),
    }
}

fn change(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut fastrand::Rng) {
    let at = place(bytes, random);
    match random.u8(..8) {
        0 | 1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.u8(..8);
            }
        }
        2 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = random.u8(..);
            }
        }
        3 | 4 => {
            let edge = EDGES[random.usize(..EDGES.len())].to_le_bytes();
            let width = [1, 2, 4, 8][random.usize(..4)];
            // Numbers are aligned: to the beginning in the header, to the end behind the clusters.
            let at = match random.u8(..4) {
                0 => at,
                1 => at / width * width,
                _ => {
                    bytes.len()
                        - ((bytes.len() - at) / width * width)
                            .max(width)
                            .min(bytes.len())
                }
            };
            for (to, from) in bytes.iter_mut().skip(at).zip(&edge[..width]) {
                *to = *from;
            }
        }
        5 => {
            let end = (at + random.usize(..64)).min(bytes.len());
            bytes.drain(at..end);
        }
        6 => {
            let end = (at + random.usize(..64)).min(bytes.len());
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece);
        }
        _ => {
            let other = &corpus[random.usize(..corpus.len())];
            let from = place(other, random);
            let piece = &other[from..(from + random.usize(..64)).min(other.len())];
            for (to, from) in bytes.iter_mut().skip(at).zip(piece) {
                *to = *from;
            }
        }
    }
    bytes.truncate(LONGEST);
}

/// What is printed when a round panics.
struct Round<'a> {
    seed: u64,
    round: u64,
    input: &'a [u8],
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut hex = String::new();
            for byte in self.input {
                let _ = write!(hex, "{byte:02x}");
            }
            let (seed, round) = (self.seed, self.round);
            println!("{NAME}: SLAT_FUZZ_SEED={seed}, round {round}, input {hex}");
        }
    }
}

#[test]
fn damaged_images_are_refused_or_understood() {
    let corpus = corpus();
    if let Some(folder) = std::env::var_os("SLAT_FUZZ_SEEDS") {
        let folder = std::path::Path::new(&folder).join(NAME);
        std::fs::create_dir_all(&folder).unwrap();
        for (index, input) in corpus.iter().enumerate() {
            std::fs::write(folder.join(format!("valid-{index}")), input).unwrap();
        }
    }
    let seed = number("SLAT_FUZZ_SEED", 0x5eed_0051_a7ed);
    let rounds = number("SLAT_FUZZ_ROUNDS", ROUNDS);
    println!("{NAME}: seed {seed}, {rounds} rounds");
    let mut random = fastrand::Rng::with_seed(seed);
    assert_eq!(corpus.len(), 4, "all are written");
    for input in &corpus {
        assert!(run(input), "a valid image");
    }
    let mut understood = 0;
    for round in 0..rounds {
        let mut input = corpus[random.usize(..corpus.len())].clone();
        for _ in 0..random.u8(1..4) {
            change(&mut input, &corpus, &mut random);
        }
        let shown = Round {
            seed,
            round,
            input: &input,
        };
        understood += u64::from(run(&input));
        drop(shown);
    }
    println!("{understood} were understood");
    assert!(understood > 0);
}
