//! See `slat_vmm::FUZZ_TARGETS`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| slat_fuzz::run("harvest", input));
