//! What a VM's process, its pager and its host's agent share about paging.
//!
//! Three processes, and what passes between them (ADR 9,
//! `docs/adr/0009-paging-by-the-mmu.md`):
//!
//! * The *VM process* makes guest memory, its views, the userfaultfd descriptor and all memory
//!   files below. It listens on [`SOCKET`] in the VM's directory and keeps every descriptor for as
//!   long as the VM lives, so that a pager or an agent that dies takes nothing along.
//! * The *pager* connects as [`Role::Pager`]. There is one at a time. It is told everything that it
//!   needs ([`wire::ToPager`]), resolves the guest's faults, and carries out what the VM process
//!   asks for.
//! * The *agent* connects as [`Role::Agent`], to hand over a page source, and to be given a
//!   snapshot's descriptors for whoever reads it.
//!
//! | module | what |
//! |---|---|
//! | [`uffd`] | the kernel's userfaultfd calls |
//! | [`wire`] | messages with descriptors, over a Unix socket |
//! | [`bits`] | a bitmap in shared memory: pages that were loaded, kept or taken |
//!
//! # A snapshot
//! A snapshot is a VM's memory as it was at one moment, which its pager keeps while the guest
//! writes on. For each memory there is a sparse *kept* file of the same length, and *marks*
//! ([`bits::Marks`]): bit `kept[p]` says that page `p` is in the kept file, bit `taken[p]` that the
//! reader does not need it any more.
//!
//! * The pager makes page `p` writable for the guest only after `kept[p]` or `taken[p]` is set. It
//!   copies the page to the kept file, then sets the bit (release).
//! * A reader of page `p` looks at `kept[p]` (acquire). If it is set it reads the kept file. If not
//!   it reads the memory file and, after an acquire fence, looks at `kept[p]` again: if the bit is
//!   still clear nobody had leave to write before that look, so what was read is the snapshot's;
//!   else it reads the kept file.
//!
//! A page that was never written to is a hole in its memory file, and must be read with `pread`:
//! through a mapping the read would make a page.

pub mod bits;
pub mod uffd;
pub mod wire;

pub use wire::Role;

/// The socket of a VM process for pagers and agents, in the VM's directory.
pub const SOCKET: &str = "pager.sock";

/// Layers of a page source: a fork of a fork has one more than its parent.
pub const MOST_LAYERS: usize = 64;

/// Bytes of a page of guest memory.
pub const PAGE: usize = 4096;
