//! What memory is made of now, and why of smaller pages than its mode may give.

use std::io;

use slat_proto::model::MemoryBacking;

use super::huge::{BLOCK_BYTES, Short};

/// Bytes in pages of each size; `None` where the kernel does not say. What no page holds yet is in
/// none of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MadeOf {
    /// 4 KiB.
    pub(crate) small: Option<u64>,
    /// 2 MiB.
    pub(crate) huge: Option<u64>,
    /// 1 GiB.
    pub(crate) giant: Option<u64>,
    short: Short,
}

impl MadeOf {
    pub(super) fn of(
        small: Option<u64>,
        huge: Option<u64>,
        giant: Option<u64>,
        short: Short,
    ) -> Self {
        Self {
            small,
            huge,
            giant,
            short,
        }
    }

    /// Of no memory at all.
    pub(super) fn nothing() -> Self {
        Self::of(Some(0), Some(0), Some(0), Short::default())
    }

    /// Of both.
    pub(super) fn and(self, other: Self) -> Self {
        let sum = |a: Option<u64>, b: Option<u64>| Some(a?.saturating_add(b?));
        Self {
            small: sum(self.small, other.small),
            huge: sum(self.huge, other.huge),
            giant: sum(self.giant, other.giant),
            short: self.short.and(other.short),
        }
    }

    /// Why it has smaller pages than its mode may give; empty when it has none of a block or more.
    pub(crate) fn shortfall(&self, backing: MemoryBacking) -> String {
        let small = match self.small {
            Some(bytes) if bytes >= BLOCK_BYTES => bytes,
            None if backing == MemoryBacking::Thp => {
                return "the kernel does not say which pages are huge (PAGEMAP_SCAN, Linux 6.7)"
                    .to_owned();
            }
            _ => return String::new(),
        };
        let mut why = Vec::new();
        let Short {
            dear,
            refused,
            errno,
            given_back,
        } = self.short;
        match backing {
            MemoryBacking::Hugetlb2M | MemoryBacking::Hugetlb1G | MemoryBacking::Small => {
                return String::new();
            }
            MemoryBacking::Thp => why.push(
                "not seen in huge pages at the last look, some seconds ago at most; where the \
                 kernel gave none when they were touched, this mode makes none later"
                    .to_owned(),
            ),
            MemoryBacking::Auto => {
                if refused > 0 {
                    let error = match errno {
                        libc::EINVAL => "it does not make huge pages of shared memory here \
                                         (shmem_enabled)"
                            .to_owned(),
                        other => io::Error::from_raw_os_error(other).to_string(),
                    };
                    why.push(format!(
                        "the kernel refused {refused} blocks, last: {error}"
                    ));
                }
                if dear > 0 {
                    why.push(format!(
                        "{dear} blocks were passed over while huge pages took half as long again as \
                         small ones, or longer"
                    ));
                }
                if given_back > 0 {
                    why.push(format!("pages of {given_back} blocks were given back"));
                }
                // Of those given back nothing may be there.
                let told = (refused + dear) * BLOCK_BYTES;
                if small > told {
                    why.push(
                        "touched page by page, to be made huge in the background while nothing \
                         logs writes"
                            .to_owned(),
                    );
                }
            }
        }
        format!("{} MiB in 4 KiB pages: {}", small >> 20, why.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(small: u64, short: Short) -> MadeOf {
        MadeOf::of(Some(small), Some(0), Some(0), short)
    }

    #[test]
    fn each_reason_is_said_and_none_without_small_pages() {
        let short = Short {
            dear: 3,
            refused: 2,
            errno: libc::ENOMEM,
            given_back: 1,
        };
        let words = made(20 << 20, short).shortfall(MemoryBacking::Auto);
        for part in [
            "20 MiB",
            "refused 2",
            "3 blocks were passed over",
            "1 blocks were given back",
            "background",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
        let exactly = made(10 << 20, short).shortfall(MemoryBacking::Auto);
        assert!(!exactly.contains("background"), "{exactly}");
        // Tables and ends of slots fill no block.
        assert_eq!(made(1 << 20, short).shortfall(MemoryBacking::Auto), "");
        assert_eq!(made(64 << 20, short).shortfall(MemoryBacking::Small), "");
        let thp = made(64 << 20, Short::default()).shortfall(MemoryBacking::Thp);
        assert!(thp.contains("64 MiB") && thp.contains("touched"), "{thp}");
    }

    #[test]
    fn what_one_part_does_not_know_the_sum_does_not() {
        let unknown = MadeOf::of(None, None, Some(0), Short::default());
        let sum = MadeOf::nothing().and(made(5, Short::default()));
        assert_eq!(sum.small, Some(5));
        let sum = sum.and(unknown);
        assert_eq!((sum.small, sum.huge, sum.giant), (None, None, Some(0)));
        assert!(sum.shortfall(MemoryBacking::Thp).contains("does not say"));
    }
}
