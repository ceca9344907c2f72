//! See `slat_image::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| slat_fuzz::run("image", input));
