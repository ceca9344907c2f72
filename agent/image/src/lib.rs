//! The file that a saved VM is kept in: its memory, page by page, and beside it named sections of
//! bytes that mean something to others only.
//!
//! ```no_run
//! # use std::{fs::File, path::Path, sync::Arc};
//! # use slat_image::{Compression, Draft, ImageId, MemorySpec, Options, Reader, Writer};
//! # fn main() -> Result<(), slat_image::ImageError> {
//! let draft = Draft::create(Path::new("/srv/saved"), "vm-1")?;
//! let options = Options {
//!     id: ImageId([7; 16]), // chosen at random
//!     compression: Compression::Zstd(1),
//!     base: None,
//! };
//! let writer = Writer::new(draft.file(), &options)?;
//! writer.add_memory(MemorySpec { number: 0, pages: 1024 })?;
//! writer.write(0, 16, &[1; 16 * 4096])?;
//! writer.finish()?;
//! draft.publish()?;
//!
//! let file = File::open("/srv/saved/vm-1").unwrap();
//! let reader = Reader::open(file, None)?;
//! let mut page = [0; 4096];
//! reader.page(0, 17, &mut page)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is where
//! * `format` is the bytes of a file, one by one: the reference.
//! * [`Writer`] writes a file, [`Reader`] reads one and the files that it builds on, both through
//!   [`Storage`], which is a file or whatever a test wants.
//! * [`Draft`] gives a file its name when it is whole; [`sweep`] removes what the dead left.
//!
//! An image may be an *increment*: a page is then also "as in the base", another image, which is
//! named by its id and by the checksum of its index.
//!
//! # Rules
//! * What comes out of a file was summed when it went in, or is refused. A file that is not whole
//!   is told from one that is.
//! * Every length of a file is bounded before it is used. No file makes this panic.
//! * Nothing here has a thread, a clock or a task of its own. All calls may block on the disk.
#![forbid(unsafe_code)]

mod codec;
mod draft;
mod error;
mod format;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod names;
mod reader;
mod storage;
mod working_set;
mod writer;

pub use codec::ClusterBuffer;
pub use draft::{Draft, sweep};
pub use error::ImageError;
pub use names::{
    Base, CLUSTER_PAGES, Compression, ImageId, ImageName, Mark, MemorySpec, NoCompression, Options,
    PAGE_SIZE, Page, PageKind, Progress, Section, SectionInfo, Summary,
};
pub use reader::{Cluster, Clusters, Fault, Pages, Reader, Verified, inspect};
pub use storage::Storage;
pub use working_set::{MAX_WORKING_SET, WORKING_SET, WorkingRun, working_set_section};
pub use writer::Writer;
