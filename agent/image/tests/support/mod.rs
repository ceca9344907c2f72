//! What tests of images share: memory for a disk, and a model of an image that is compared page by
//! page, cluster by cluster and in the order of the file.
#![allow(dead_code, reason = "each test uses its part")]

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
};

use slat_image::{
    Base, ClusterBuffer, Compression, ImageError, ImageId, Mark, MemorySpec, Options, PAGE_SIZE,
    Page, PageKind, Reader, Section, Storage, Writer,
};

/// A disk in memory.
#[derive(Debug, Default)]
pub(crate) struct Ram(Mutex<Vec<u8>>);

impl Ram {
    pub(crate) fn of(bytes: &[u8]) -> Arc<Self> {
        Arc::new(Self(Mutex::new(bytes.to_vec())))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Storage for Ram {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut all = self.0.lock().unwrap();
        let offset = offset as usize;
        if all.len() < offset + bytes.len() {
            all.resize(offset + bytes.len(), 0);
        }
        all[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(bytes.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let all = self.0.lock().unwrap();
        let from = all.get(offset as usize..).unwrap_or_default();
        let count = from.len().min(buffer.len());
        buffer[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }
}

/// Where random numbers come from, with the seed that is printed: `SLAT_IMAGE_SEED` has it again.
pub(crate) fn random() -> fastrand::Rng {
    let seed = std::env::var("SLAT_IMAGE_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("SLAT_IMAGE_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// What a page of a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Hole,
    Zero,
    Data(Box<Page>),
}

impl Content {
    /// Contents that compress, more or less.
    pub(crate) fn random(random: &mut fastrand::Rng) -> Self {
        let mut page = Box::new([0; PAGE_SIZE]);
        match random.u8(..4) {
            0 => random.fill(&mut page[..]),
            1 => random.fill(&mut page[100..200]),
            2 => page.fill(random.u8(1..)),
            _ => page[random.usize(..PAGE_SIZE)] = random.u8(1..),
        }
        Self::Data(page)
    }

    pub(crate) fn kind(&self) -> PageKind {
        match self {
            Self::Hole => PageKind::Hole,
            Self::Zero => PageKind::Zero,
            Self::Data(_) => PageKind::Data,
        }
    }
}

/// What an image is to have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    pub(crate) memories: BTreeMap<u32, Vec<Content>>,
    pub(crate) sections: Vec<Section>,
}

pub(crate) fn section(name: &str, contents: &[u8]) -> Section {
    Section {
        name: name.to_owned(),
        version: 3,
        optional: name.len().is_multiple_of(2),
        contents: contents.to_vec(),
    }
}

pub(crate) fn options(number: u8, compression: Compression, base: Option<Base>) -> Options {
    Options {
        id: ImageId([number; 16]),
        compression,
        base,
    }
}

impl Model {
    /// A small one: two memories, three sections, all kinds of pages.
    pub(crate) fn small() -> Self {
        let mut random = fastrand::Rng::with_seed(1);
        let mut model = Self::default();
        for (number, pages) in [(1, 3), (7, 35)] {
            let pages = (0..pages).map(|page| match page % 5 {
                0 => Content::Zero,
                1 => Content::Hole,
                _ => Content::random(&mut random),
            });
            model.memories.insert(number, pages.collect());
        }
        model.memories.insert(9, Vec::new());
        for (name, contents) in [("spec", &b"one"[..]), ("slots", &[]), ("vcpu", &[9; 300])] {
            model.sections.push(section(name, contents));
        }
        model
    }

    /// Writes all of it, one memory after the other, to an image without a base.
    pub(crate) fn write(&self, storage: impl Storage, options: &Options) -> Result<(), ImageError> {
        let writer = Writer::new(storage, options)?;
        for (number, pages) in &self.memories {
            writer.add_memory(MemorySpec {
                number: *number,
                pages: pages.len() as u64,
            })?;
        }
        for (number, pages) in &self.memories {
            for (group, pages) in (0..).zip(pages.chunks(16)) {
                let given = pages.iter().map(|page| match page {
                    Content::Data(page) => Some(&**page),
                    _ => None,
                });
                writer.write_some(*number, group * 16, &given.collect::<Vec<_>>())?;
            }
            for (page, contents) in (0..).zip(pages) {
                if *contents == Content::Zero {
                    writer.mark(*number, page, 1, Mark::Zero)?;
                }
            }
        }
        for section in &self.sections {
            writer.add_section(section.clone())?;
        }
        writer.finish()?;
        Ok(())
    }

    /// Asserts that the image is this.
    pub(crate) fn check<S: Storage>(&self, reader: &Reader<S>) {
        self.same(reader).unwrap().unwrap();
    }

    /// Whether the image can be read and is this; `Err` in it: how it differs.
    pub(crate) fn same<S: Storage>(
        &self,
        reader: &Reader<S>,
    ) -> Result<Result<(), String>, ImageError> {
        let specs: Vec<(u32, u64)> = reader
            .memories()
            .iter()
            .map(|memory| (memory.number, memory.pages))
            .collect();
        let wanted = self.memories.iter();
        let wanted: Vec<(u32, u64)> = wanted
            .map(|(number, pages)| (*number, pages.len() as u64))
            .collect();
        if specs != wanted {
            return Ok(Err(format!("memories {specs:?}, not {wanted:?}")));
        }
        if reader.sections()? != self.sections {
            return Ok(Err("sections".to_owned()));
        }
        for (number, pages) in &self.memories {
            for page in 0..pages.len() as u64 {
                if let Err(how) = one_page(reader, *number, page, pages)? {
                    return Ok(Err(format!("memory {number}, page {page}: {how}")));
                }
            }
        }
        self.in_order(reader)
    }

    /// All clusters have each page with contents once.
    fn in_order<S: Storage>(&self, reader: &Reader<S>) -> Result<Result<(), String>, ImageError> {
        let mut buffer = ClusterBuffer::default();
        let mut seen = BTreeMap::new();
        for cluster in reader.clusters()? {
            let cluster = cluster?;
            let mut count = 0;
            for (page, contents) in reader.read_cluster(&cluster, &mut buffer)? {
                count += 1;
                if seen.insert((cluster.memory(), page), *contents).is_some() {
                    return Ok(Err(format!("page {page} is in two clusters")));
                }
            }
            if count != cluster.count() || count == 0 {
                return Ok(Err(format!("{count} pages in {cluster:?}")));
            }
        }
        for (number, pages) in &self.memories {
            for (page, contents) in (0..).zip(pages) {
                let found = seen.remove(&(*number, page));
                let right = match contents {
                    Content::Data(wanted) => found.as_ref() == Some(wanted),
                    _ => found.is_none(),
                };
                if !right {
                    return Ok(Err(format!("page {page} in order")));
                }
            }
        }
        Ok(if seen.is_empty() {
            Ok(())
        } else {
            Err("pages that are none".to_owned())
        })
    }
}

fn one_page<S: Storage>(
    reader: &Reader<S>,
    memory: u32,
    page: u64,
    wanted: &[Content],
) -> Result<Result<(), String>, ImageError> {
    let all = wanted;
    let wanted = &all[page as usize];
    let mut found = [0xaa; PAGE_SIZE];
    let kind = reader.page(memory, page, &mut found)?;
    if kind != wanted.kind() || kind != reader.kind(memory, page)? {
        return Ok(Err(format!("{kind:?}, not {:?}", wanted.kind())));
    }
    let zeroes = Box::new([0; PAGE_SIZE]);
    let contents = match wanted {
        Content::Data(contents) => contents,
        _ => &zeroes,
    };
    if found != **contents {
        return Ok(Err("contents".to_owned()));
    }
    let cluster = reader.cluster_of(memory, page)?;
    let Some(cluster) = cluster else {
        return Ok(if kind == PageKind::Data {
            Err("no cluster".to_owned())
        } else {
            Ok(())
        });
    };
    let mut buffer = ClusterBuffer::default();
    let pages: Vec<(u64, Page)> = reader
        .read_cluster(&cluster, &mut buffer)?
        .map(|(page, contents)| (page, *contents))
        .collect();
    let said: Vec<u64> = cluster.pages().collect();
    if said != pages.iter().map(|(page, _)| *page).collect::<Vec<_>>() {
        return Ok(Err(format!("{said:?} of the cluster")));
    }
    let right = |(page, contents): &(u64, Page)| match all.get(*page as usize) {
        Some(Content::Data(wanted)) => **wanted == *contents,
        _ => false,
    };
    Ok(if !said.contains(&page) || !pages.iter().all(right) {
        Err("what comes with it".to_owned())
    } else {
        Ok(())
    })
}
