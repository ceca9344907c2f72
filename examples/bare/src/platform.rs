//! All contact with the outside, and the only file that knows Linux: printing and stopping.
//!
//! On x86-64 Linux these are two system calls, so that the example runs anywhere as a proof. On a
//! real machine `print` writes to a serial port (PL011, 16550, the SBI's debug console) and `exit`
//! resets or powers off; a port replaces the two functions at the end of this file and
//! nothing else.

/// Writes text to the console.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) fn print(text: &str) {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let mut result: isize = 1; // write
        // SAFETY: write(1, rest) reads `rest` and changes nothing of ours; the instruction clobbers
        // rcx and r11.
        unsafe {
            core::arch::asm!(
                "syscall",
                inlateout("rax") result,
                in("rdi") 1,
                in("rsi") rest.as_ptr(),
                in("rdx") rest.len(),
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        match usize::try_from(result) {
            Ok(written @ 1..) => rest = &rest[written.min(rest.len())..],
            // Nobody listens; there is nowhere to say so.
            _ => return,
        }
    }
}

/// Stops with a status: 0 if all went well.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: exit_group(status) ends the process and does not return.
    unsafe {
        core::arch::asm!(
            "syscall",
            in("rax") 231,
            in("rdi") status,
            options(noreturn, nostack),
        );
    }
}

/// No console is known for this machine: the text goes nowhere.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub(crate) fn print(text: &str) {
    let _ = text;
}

/// No way to stop this machine is known: it stands still.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub(crate) fn exit(status: i32) -> ! {
    let _ = status;
    loop {
        core::hint::spin_loop();
    }
}
