//! memstress as machine code. Step for step what
//! [`run_batch`](crate::guest::memstress::run_batch) does; change both together.
//!
//! The code lies in this program's read-only data between two labels and is copied from there into
//! guest memory, so it is position-independent: only short jumps, no data, no stack. It is never
//! executed in this process.
//!
//! | register | what |
//! |---|---|
//! | rdi | control page |
//! | r8 | next owned page (sequential) |
//! | r9 | random number generator |
//! | r10 | visits left in the batch |
//! | r11 | pages written in the batch |
//! | rsi | page number |
//! | rbx | address of its table entry |
//! | rcx | address of the page |
//! | rdx | its count |
//! | r12 | the generator's multiplier |

use std::{arch::global_asm, slice};

use super::ports::PORT_DOORBELL;
use crate::guest::memstress::{
    control::{ALWAYS, NONE, offset, pattern},
    random::MULTIPLIER,
};

// The code below tests for `ALWAYS` by its one bit and for `NONE` by a sign-extended -1.
const _: () = assert!(ALWAYS == 1 << 32 && NONE == u64::MAX && PORT_DOORBELL < 0x100);

global_asm!(
    ".pushsection .rodata.slat_memstress, \"a\", @progbits",
    ".balign 64",
    ".globl slat_memstress_code",
    ".hidden slat_memstress_code",
    "slat_memstress_code:",
    "mov r12, {multiplier}",
    // Ask until told to go.
    "2:",
    "in al, {doorbell}",
    "test al, al",
    "jnz 2b",
    "mov r8, [rdi + {position}]",
    "mov r9, [rdi + {random}]",
    "mov r10, [rdi + {batch}]",
    "xor r11d, r11d",
    // A visit: pick a page.
    "3:",
    "cmp qword ptr [rdi + {pattern}], {sequential}",
    "jne 4f",
    "mov rsi, r8",
    "inc r8",
    "cmp r8, [rdi + {pages}]",
    "jb 8f",
    "xor r8d, r8d",
    "jmp 8f",
    "4:",
    "mov rax, r9",
    "shr rax, 12",
    "xor r9, rax",
    "mov rax, r9",
    "shl rax, 25",
    "xor r9, rax",
    "mov rax, r9",
    "shr rax, 27",
    "xor r9, rax",
    "mov rax, r9",
    "imul rax, r12",
    "mov rsi, rax",
    "shr rsi, 32",
    "cmp qword ptr [rdi + {pattern}], {hot_cold}",
    "je 5f",
    "imul rsi, [rdi + {pages}]",
    "shr rsi, 32",
    "jmp 8f",
    "5:",
    "mov eax, eax",
    "cmp rax, [rdi + {hot_share}]",
    "jae 6f",
    "imul rsi, [rdi + {hot_pages}]",
    "shr rsi, 32",
    "jmp 8f",
    "6:",
    "mov rax, [rdi + {pages}]",
    "sub rax, [rdi + {hot_pages}]",
    "imul rsi, rax",
    "shr rsi, 32",
    "add rsi, [rdi + {hot_pages}]",
    // Where it and its table entry are.
    "8:",
    "add rsi, [rdi + {first_page}]",
    "mov rbx, rsi",
    "shl rbx, 2",
    "add rbx, [rdi + {expected}]",
    "cmp rbx, [rdi + {low_limit}]",
    "jb 9f",
    "add rbx, [rdi + {hole}]",
    "9:",
    "mov rcx, rsi",
    "shl rcx, 12",
    "add rcx, [rdi + {work}]",
    "cmp rcx, [rdi + {low_limit}]",
    "jb 12f",
    "add rcx, [rdi + {hole}]",
    "12:",
    // Check it.
    "mov edx, [rbx]",
    "test edx, edx",
    "jz 14f",
    "cmp [rcx], rsi",
    "jne 13f",
    "cmp [rcx + 8], rdx",
    "jne 13f",
    "cmp [rcx + 4080], rsi",
    "jne 13f",
    "cmp [rcx + 4088], rdx",
    "je 14f",
    "13:",
    "inc qword ptr [rdi + {errors}]",
    "cmp qword ptr [rdi + {first_error_page}], -1",
    "jne 14f",
    "mov [rdi + {first_error_page}], rsi",
    // Write it or not.
    "14:",
    "mov rax, [rdi + {write_share}]",
    "bt rax, 32",
    "jc 15f",
    "mov rax, r9",
    "shr rax, 12",
    "xor r9, rax",
    "mov rax, r9",
    "shl rax, 25",
    "xor r9, rax",
    "mov rax, r9",
    "shr rax, 27",
    "xor r9, rax",
    "mov rax, r9",
    "imul rax, r12",
    "shr rax, 32",
    "cmp rax, [rdi + {write_share}]",
    "jae 17f",
    "15:",
    "inc edx",
    "jnz 16f",
    "inc edx",
    "16:",
    "mov [rcx], rsi",
    "mov [rcx + 8], rdx",
    "mov [rcx + 4080], rsi",
    "mov [rcx + 4088], rdx",
    "mov [rbx], edx",
    "inc r11",
    "17:",
    "dec r10",
    "jnz 3b",
    // The end of the batch: state and counters go to memory.
    "mov [rdi + {position}], r8",
    "mov [rdi + {random}], r9",
    "add [rdi + {pages_written}], r11",
    "mov rax, [rdi + {batch}]",
    "add [rdi + {visits}], rax",
    "jmp 2b",
    ".globl slat_memstress_code_end",
    ".hidden slat_memstress_code_end",
    "slat_memstress_code_end:",
    ".popsection",
    multiplier = const MULTIPLIER,
    doorbell = const PORT_DOORBELL,
    sequential = const pattern::SEQUENTIAL,
    hot_cold = const pattern::HOT_COLD,
    position = const offset::POSITION,
    random = const offset::RANDOM,
    batch = const offset::BATCH,
    pattern = const offset::PATTERN,
    pages = const offset::PAGES,
    hot_share = const offset::HOT_SHARE,
    hot_pages = const offset::HOT_PAGES,
    first_page = const offset::FIRST_PAGE,
    expected = const offset::EXPECTED,
    work = const offset::WORK,
    low_limit = const offset::LOW_LIMIT,
    hole = const offset::HOLE,
    errors = const offset::ERRORS,
    first_error_page = const offset::FIRST_ERROR_PAGE,
    write_share = const offset::WRITE_SHARE,
    pages_written = const offset::PAGES_WRITTEN,
    visits = const offset::VISITS,
);

unsafe extern "C" {
    static slat_memstress_code: u8;
    static slat_memstress_code_end: u8;
}

/// The code's bytes.
pub(in crate::guest) fn memstress() -> Vec<u8> {
    let (start, end) = (
        &raw const slat_memstress_code,
        &raw const slat_memstress_code_end,
    );
    // SAFETY: both labels are in one section of this program's read-only data, the second after the
    // first, and the bytes between them are the assembled code, which nothing ever writes.
    let code = unsafe { slice::from_raw_parts(start, end.offset_from_unsigned(start)) };
    code.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_place() {
        // See the layout in `crate::guest`.
        let place = 0x8000;
        assert!((100..place).contains(&memstress().len()));
    }
}
