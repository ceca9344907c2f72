//! Whether the kernel maps a block by a huge page, asked by PAGEMAP_SCAN (Linux 6.7).
//!
//! Only pages of this process, and nothing of them but their kind. A kernel without it, or a
//! process that cannot open its pagemap, is not asked again: what is not known is not said.

use std::{fs::File, os::fd::AsRawFd as _, sync::OnceLock};

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 0xc060_6610;
/// The page is mapped by a huge one.
const PAGE_IS_HUGE: u64 = 1 << 6;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

fn pagemap() -> Option<&'static File> {
    static PAGEMAP: OnceLock<Option<File>> = OnceLock::new();
    PAGEMAP
        .get_or_init(|| {
            let file = File::open("/proc/self/pagemap").ok()?;
            ask(&file, 0, 0).map(|_| file)
        })
        .as_ref()
}

/// Whether `[start, start + len)` of this process is mapped by huge pages throughout; `None` when
/// the kernel does not say.
pub(super) fn is_huge(start: u64, len: u64) -> Option<bool> {
    Some(ask(pagemap()?, start, start + len)? == len)
}

/// Whether the kernel says it at all.
pub(super) fn is_said() -> bool {
    pagemap().is_some()
}

/// Bytes of the first run of huge pages in `[start, end)`.
fn ask(pagemap: &File, start: u64, end: u64) -> Option<u64> {
    let mut run = [PageRegion::default()];
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start,
        end,
        vec: run.as_mut_ptr().addr() as u64,
        vec_len: run.len() as u64,
        category_mask: PAGE_IS_HUGE,
        return_mask: PAGE_IS_HUGE,
        ..ScanArg::default()
    };
    // SAFETY: the kernel reads and writes `arg`, and writes at most `vec_len` entries of `run`;
    // both live across the call. No flag is set that would change a mapping.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
    match found {
        ..0 => None,
        0 => Some(0),
        _ => Some(run[0].end - run[0].start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pages_are_not_huge() {
        let page = Box::new([1_u8; 1 << 16]);
        let start = (page.as_ptr().addr() as u64).next_multiple_of(4096);
        if is_said() {
            assert_eq!(is_huge(start, 4096), Some(false));
        } else {
            eprintln!("SKIPPED: this kernel has no PAGEMAP_SCAN");
            assert_eq!(is_huge(start, 4096), None);
        }
    }
}
