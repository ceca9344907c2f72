//! What is to be written, as it is told.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    sync::Arc,
    time::Duration,
};

use slat_image::{Compression, ImageId, MemorySpec, Options, Reader, Section, Writer};
use slat_paging::wire::{ProblemKind, Socket, ToWriter};

use crate::{
    error::{PagerError, Trouble},
    source::{Chain, ChainBuilder, open_files, trouble},
};

/// Bytes of a section, as the format has it.
const MOST_SECTION: u64 = 16 << 20;
/// How long the agent has between two messages: it has all of it at hand.
const BOUND: Duration = Duration::from_secs(60);
/// Messages before the last.
const MOST_MESSAGES: usize = 1 << 16;

/// See the module.
pub(super) struct Job {
    /// Of the file, for people.
    pub(super) name: String,
    pub(super) writer: Writer<File>,
    /// What the file builds on.
    pub(super) base: Option<Arc<Reader<File>>>,
    pub(super) memories: Vec<MemorySpec>,
    pub(super) chain: Chain,
}

impl Job {
    /// Hears all of it, up to the word to begin.
    pub(super) fn hear(socket: &Socket) -> Result<Self, PagerError> {
        let patient = socket.set_patience(Some(BOUND));
        patient.map_err(PagerError::kernel("setting up the connection"))?;
        let first = socket.receive::<ToWriter>()?;
        let ToWriter::Begin {
            name,
            zstd_level,
            bases,
        } = first.message
        else {
            return Err(unexpected(&first.message));
        };
        let mut fds = first.fds.into_iter();
        let file = fds
            .next()
            .ok_or_else(|| PagerError::Protocol("no file".to_owned()))?;
        let below: Vec<OwnedFd> = fds.collect();
        if below.len() != bases.len() {
            let (told, came) = (bases.len(), below.len());
            return Err(PagerError::Protocol(format!("{came} bases of {told}")));
        }
        let base_name = bases.first().map_or("", String::as_str);
        let base = open_files(base_name, below)?;
        let mut id = [0; 16];
        let chosen = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
        chosen.map_err(|error| PagerError::kernel("choosing a name")(error.into()))?;
        let level = i32::try_from(zstd_level)
            .ok()
            .filter(|level| (0..=19).contains(level));
        let compression = match level {
            Some(0) => Compression::None,
            Some(level) => Compression::Zstd(level),
            None => return Err(PagerError::Protocol(format!("zstd's level {zstd_level}"))),
        };
        let options = Options {
            id: ImageId(id),
            compression,
            base: base.as_ref().map(|base| base.as_base()),
        };
        let writer = Writer::new(File::from(file), &options);
        let writer = writer.map_err(|error| failed(&name, &error))?;
        let mut memories = Vec::new();
        let mut chain = ChainBuilder::default();
        for _ in 0..MOST_MESSAGES {
            let packet = socket.receive::<ToWriter>()?;
            match packet.message {
                ToWriter::Section {
                    name: section,
                    version,
                    optional,
                } => {
                    let section = Section {
                        contents: contents(&section, packet.fds)?,
                        name: section,
                        version,
                        optional,
                    };
                    let added = writer.add_section(section);
                    added.map_err(|error| failed(&name, &error))?;
                }
                ToWriter::Memory { number, pages } => {
                    let memory = MemorySpec { number, pages };
                    let added = writer.add_memory(memory);
                    added.map_err(|error| failed(&name, &error))?;
                    memories.push(memory);
                }
                ToWriter::Layer(layer) => chain.layer(layer, packet.fds)?,
                ToWriter::LayerMemory(memory) => chain.memory(&memory, packet.fds)?,
                ToWriter::Go => {
                    let chain = chain.build()?.ok_or_else(|| {
                        PagerError::Protocol("nothing to read pages from".to_owned())
                    })?;
                    return Ok(Self {
                        name,
                        writer,
                        base,
                        memories,
                        chain: chain.releasing(),
                    });
                }
                other => return Err(unexpected(&other)),
            }
        }
        Err(PagerError::Protocol("no end of messages".to_owned()))
    }
}

/// The contents of a section, from its memfd.
fn contents(name: &str, fds: Vec<OwnedFd>) -> Result<Vec<u8>, PagerError> {
    let fd = fds.into_iter().next();
    let fd = fd.ok_or_else(|| PagerError::Protocol(format!("section {name} without contents")))?;
    let file = File::from(fd);
    let doing = PagerError::kernel("reading a section");
    let length = match file.metadata() {
        Ok(found) if found.len() <= MOST_SECTION => found.len(),
        Ok(found) => {
            let length = found.len();
            return Err(PagerError::Protocol(format!(
                "section {name} of {length} bytes"
            )));
        }
        Err(error) => return Err(doing(error)),
    };
    let mut contents = vec![0; length as usize];
    file.read_exact_at(&mut contents, 0).map_err(doing)?;
    Ok(contents)
}

fn unexpected(message: &ToWriter) -> PagerError {
    PagerError::Protocol(format!("{message:?} at this point"))
}

/// What an error of the file that is written is to those who wait for it.
pub(super) fn failed(name: &str, error: &slat_image::ImageError) -> Trouble {
    use slat_image::ImageError;
    let kind = match error {
        ImageError::NoSpace { .. } => ProblemKind::NoSpace,
        ImageError::Io { .. } => ProblemKind::Kernel,
        ImageError::Corrupt { .. } | ImageError::Truncated { .. } => return trouble(name, error),
        _ => ProblemKind::Refused,
    };
    Trouble::new(kind, format!("{name}: {error}"))
}
