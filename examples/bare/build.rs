//! Has Linux programs linked without a C runtime and at fixed addresses, as firmware would be.
//! Bare-metal targets link so by themselves.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        // -no-pie: nobody would apply a position-independent program's relocations.
        for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
            println!("cargo::rustc-link-arg-bins={argument}");
        }
    }
}
