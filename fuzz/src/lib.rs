//! The targets of slat-vmm and slat-image, for libFuzzer: the same functions that their tests give
//! damaged input in bounded rounds. `cargo xtask fuzz` runs them.

/// Gives one input to the decoder of that name.
///
/// # Panics
/// When there is none, and when the decoder panics, which is what is looked for.
pub fn run(name: &str, input: &[u8]) {
    if name == slat_image::fuzz::NAME {
        let _ = slat_image::fuzz::run(input);
        return;
    }
    let target = slat_vmm::FUZZ_TARGETS
        .iter()
        .find(|target| target.name == name)
        .unwrap_or_else(|| panic!("no target {name} on this architecture"));
    target.run(input);
}
