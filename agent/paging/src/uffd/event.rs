//! Reading faults.

use std::{io, mem::size_of};

use linux_raw_sys::general::{
    UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
};
use rustix::io::{Errno, read};

use super::descriptor::Uffd;

/// Bytes of a message of the kernel's (`struct uffd_msg`).
const MESSAGE: usize = size_of::<linux_raw_sys::general::uffd_msg>();
/// Messages read at once.
const AT_ONCE: usize = 16;

/// What the kernel found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// No page in the file.
    Missing,
    /// A page in the file, and not mapped.
    Minor,
    /// A mapped page that is protected.
    WriteProtect,
}

/// A thread that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address, down to the page.
    pub address: u64,
    /// What the kernel found.
    pub kind: FaultKind,
    /// Whether it wants to write.
    pub write: bool,
    /// Which thread waits; 0 where the kernel does not say.
    pub thread: i32,
}

impl Uffd {
    /// Appends faults that are told of now, a few at once.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; what else the kernel says.
    pub fn read(&self, into: &mut Vec<Fault>) -> io::Result<()> {
        let mut bytes = [0; MESSAGE * AT_ONCE];
        let got = loop {
            match read(self, &mut bytes) {
                Ok(got) => break got,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let (messages, _) = bytes[..got].as_chunks::<MESSAGE>();
        into.extend(messages.iter().filter_map(parse));
        Ok(())
    }
}

/// Other events are never asked for.
fn parse(message: &[u8; MESSAGE]) -> Option<Fault> {
    if u32::from(message[0]) != UFFD_EVENT_PAGEFAULT {
        return None;
    }
    // struct uffd_msg: event u8, 7 reserved; flags u64, address u64, thread u32.
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| message[at + i]));
    let flags = word(8);
    let has = |flag: u32| flags & u64::from(flag) != 0;
    let kind = if has(UFFD_PAGEFAULT_FLAG_WP) {
        FaultKind::WriteProtect
    } else if has(UFFD_PAGEFAULT_FLAG_MINOR) {
        FaultKind::Minor
    } else {
        FaultKind::Missing
    };
    Some(Fault {
        address: word(16) & !0xfff,
        kind,
        write: has(UFFD_PAGEFAULT_FLAG_WRITE) || kind == FaultKind::WriteProtect,
        thread: i32::from_ne_bytes(std::array::from_fn(|i| message[24 + i])),
    })
}
