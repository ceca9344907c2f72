//! Damaged input for decoders: what they must do with it is refuse it or understand it, and never
//! panic. Each decoder of what comes from outside has a [`Target`] beside it: valid inputs, and one
//! function that is given damaged ones. Tests do so in bounded rounds ([`bounded`]); `fuzz/` gives
//! the same functions to libFuzzer (`cargo xtask fuzz`).
//!
//! Inputs are made of valid ones, the corpus: bits flipped, bytes and whole numbers replaced by
//! those that break arithmetic, pieces cut out, doubled and moved from one input to another. What
//! has a checksum is given the right one again by its test, or nothing behind it would be reached.
//!
//! The order is that of a seed, so a run can be had again: a failure prints seed, round and input.
//! `SLAT_FUZZ_SEED` and `SLAT_FUZZ_ROUNDS` choose others. With `SLAT_FUZZ_SEEDS` a folder gets the
//! valid inputs, by target, for libFuzzer to begin with.

/// A decoder, and what it is given.
pub struct Target {
    /// As libFuzzer's target is called.
    pub name: &'static str,
    /// Rounds of a test, in a thousand of the usual many.
    pub rounds: u64,
    /// Valid inputs.
    pub corpus: fn() -> Vec<Vec<u8>>,
    /// Gives the decoder an input, whose checksum it may set right, and looks at what comes of it.
    /// Whether it was understood.
    pub(crate) check: fn(&mut Vec<u8>) -> bool,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Target {
    /// Gives the decoder one input. Whether it was understood.
    ///
    /// # Panics
    /// When the decoder does, or what it made of the input is wrong.
    pub fn run(&self, input: &[u8]) -> bool {
        (self.check)(&mut input.to_vec())
    }
}

/// The rounds of a target's test. How many inputs were understood.
#[cfg(test)]
pub(crate) fn bounded(target: &Target) -> u64 {
    let corpus = (target.corpus)();
    if let Some(folder) = std::env::var_os("SLAT_FUZZ_SEEDS") {
        let folder = std::path::Path::new(&folder).join(target.name);
        std::fs::create_dir_all(&folder).unwrap();
        for (index, input) in corpus.iter().enumerate() {
            std::fs::write(folder.join(format!("valid-{index}")), input).unwrap();
        }
    }
    damaged(target.name, target.rounds, &corpus, target.check)
}

#[cfg(test)]
pub(crate) use self::rounds::damaged;

#[cfg(test)]
mod rounds {
    use std::fmt::Write as _;

    /// Some seconds of rounds for all decoders together, in a debug build.
    const ROUNDS: u64 = 20_000;
    /// No input grows beyond this.
    const LONGEST: usize = 1 << 16;
    /// Lengths and counts at the edges of their types.
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

    /// Where numbers come from: a xorshift generator.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn below(&mut self, end: usize) -> usize {
            if end == 0 {
                return 0;
            }
            (self.next() % end as u64) as usize
        }

        fn change(&mut self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
            let at = self.below(bytes.len());
            match self.below(7) {
                0 => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << (self.next() % 8);
                    }
                }
                1 => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = self.next() as u8;
                    }
                }
                2 => {
                    let edge = EDGES[self.below(EDGES.len())].to_le_bytes();
                    let width = [1, 2, 4, 8][self.below(4)];
                    // Numbers are aligned more often than not.
                    let at = if self.next().is_multiple_of(4) {
                        at
                    } else {
                        at / width * width
                    };
                    for (to, from) in bytes.iter_mut().skip(at).zip(&edge[..width]) {
                        *to = *from;
                    }
                }
                3 => bytes.truncate(at),
                4 => {
                    let end = (at + self.below(32)).min(bytes.len());
                    bytes.drain(at..end);
                }
                5 => {
                    let end = (at + self.below(64)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => {
                    let other = &corpus[self.below(corpus.len())];
                    let from = self.below(other.len());
                    let end = (from + self.below(64)).min(other.len());
                    bytes.splice(at..at, other[from..end].iter().copied());
                }
            }
            bytes.truncate(LONGEST);
        }
    }

    /// What is printed when a round panics.
    struct Round<'a> {
        name: &'a str,
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
                println!(
                    "{}: SLAT_FUZZ_SEED={}, round {}, input {hex}",
                    self.name, self.seed, self.round
                );
            }
        }
    }

    /// Gives `check` every input of the corpus and damaged ones made of it, `rounds` in a thousand
    /// of the usual many. Says how many `check` understood, which it answers by true.
    pub(crate) fn damaged(
        name: &str,
        rounds: u64,
        corpus: &[Vec<u8>],
        mut check: impl FnMut(&mut Vec<u8>) -> bool,
    ) -> u64 {
        let seed = number("SLAT_FUZZ_SEED", 0x5eed_0051_a7ed).max(1);
        let rounds = number("SLAT_FUZZ_ROUNDS", ROUNDS) * rounds / 1000;
        println!("{name}: seed {seed}, {rounds} rounds");
        let mut random = Random(seed);
        let mut understood = 0;
        for input in corpus {
            assert!(
                check(&mut input.clone()),
                "{name}: {input:x?} is of the corpus"
            );
        }
        for round in 0..rounds {
            let mut input = corpus[random.below(corpus.len())].clone();
            for _ in 0..=random.below(4) {
                random.change(&mut input, corpus);
            }
            let kept = input.clone();
            let shown = Round {
                name,
                seed,
                round,
                input: &kept,
            };
            understood += u64::from(check(&mut input));
            drop(shown);
        }
        understood
    }
}
