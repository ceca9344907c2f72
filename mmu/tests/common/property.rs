//! A runner of properties that prints its seed and writes no file. The laws of formats, in
//! `arch/tests`, use it too.

use std::{
    collections::hash_map::RandomState,
    fmt::Debug,
    hash::{BuildHasher, Hasher},
};

use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestCaseResult, TestRng, TestRunner},
};

/// Runs `test` on `cases` values. The seed is printed (the harness shows it on failure);
/// `SLAT_TEST_SEED` repeats it.
pub(crate) fn check<S: Strategy>(
    cases: u32,
    strategy: &S,
    test: impl Fn(S::Value) -> TestCaseResult,
) where
    S::Value: Debug,
{
    let seed = match std::env::var("SLAT_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SLAT_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SLAT_TEST_SEED={seed}");
    let cases = match std::env::var("SLAT_TEST_CASES") {
        Ok(cases) => cases.parse().expect("SLAT_TEST_CASES is a number"),
        Err(_) => cases,
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 4096,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    if let Err(error) = TestRunner::new_with_rng(config, rng).run(strategy, test) {
        panic!("SLAT_TEST_SEED={seed}: {error}");
    }
}
