//! What std does before `main` and when something panics.
//!
//! A loader enters at `_start` with a stack; a machine without one sets the stack pointer here and clears `.bss`.

use core::panic::PanicInfo;

use crate::{console::say, platform};

/// Linux enters with a stack aligned to 16 bytes and no return address, where a function expects one: so a call is made.
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
