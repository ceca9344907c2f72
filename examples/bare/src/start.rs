//! What std does before `main` and when something panics.
//!
//! A loader enters at `_start` with a stack; a machine without one sets the stack pointer here and
//! clears `.bss`.

use core::panic::PanicInfo;

use crate::{console::say, platform};

/// Linux enters with a stack aligned to 16 bytes and no return address, where a function expects
/// one: so a call is made.
#[cfg(target_arch = "x86_64")]
// SAFETY: no other symbol of this program has the name.
#[unsafe(no_mangle)]
#[unsafe(naked)]
extern "C" fn _start() -> ! {
    core::arch::naked_asm!(
        "xor ebp, ebp",
        "and rsp, -16",
        "call {main}",
        "ud2",
        main = sym crate::main,
    )
}

/// Elsewhere a function may be entered by a jump.
#[cfg(not(target_arch = "x86_64"))]
// SAFETY: no other symbol of this program has the name.
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    crate::main()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("{info}");
    platform::exit(1)
}

/// What `alloc`, compiled to unwind, names for the case that somebody did. Nobody does: a panic
/// ends in the handler above.
#[cfg(not(target_os = "none"))]
// SAFETY: no other symbol of this program has the name.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() -> ! {
    platform::exit(1)
}

/// The same.
#[cfg(not(target_os = "none"))]
// SAFETY: no other symbol of this program has the name.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    platform::exit(1)
}
