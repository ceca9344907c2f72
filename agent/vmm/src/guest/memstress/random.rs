//! xorshift64*: small enough to be the same in Rust and in machine code. Good for spreading visits, for nothing secret.

/// The multiplier of the output.
pub(super) const MULTIPLIER: u64 = 0x2545_f491_4f6c_dd1d;

/// Next number. `state` is never 0 and does not become 0.
pub(super) fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(MULTIPLIER)
}

/// A state that is not 0 from a seed and a stream number (splitmix64).
pub(super) fn seeded(seed: u64, stream: u64) -> u64 {
    let mut z = seed.wrapping_add(stream.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).max(1)
}
