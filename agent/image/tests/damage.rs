//! Damaged files: every cut is refused, and every flipped bit is refused or changes nothing.

use std::{io, sync::Arc};

use slat_image::{Compression, ImageError, Mark, MemorySpec, PAGE_SIZE, Reader, Storage, Writer};

use self::support::{Content, Model, Ram, options, random, section};

mod support;

/// Bytes that are only read.
#[derive(Debug)]
struct View<'a>(&'a [u8]);

impl Storage for View<'_> {
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let from = self.0.get(offset as usize..).unwrap_or_default();
        let count = from.len().min(buffer.len());
        buffer[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
}

/// A few pages that compress well, one that does not, and sections.
fn small() -> Model {
    let mut random = fastrand::Rng::with_seed(2);
    let mut noise = Box::new([0; PAGE_SIZE]);
    random.fill(&mut noise[..]);
    let mut model = Model::default();
    let pages = (0..20_u8).map(|page| match page {
        0..4 => Content::Data(Box::new([page + 1; PAGE_SIZE])),
        4 => Content::Zero,
        17 => Content::Data(noise.clone()),
        18 => Content::Data(Box::new([9; PAGE_SIZE])),
        _ => Content::Hole,
    });
    model.memories.insert(3, pages.collect());
    model.memories.insert(4, vec![Content::Zero; 2]);
    model.sections.push(section("spec", b"a VM"));
    model.sections.push(section("slots", b""));
    model
}

fn write(model: &Model, compression: Compression) -> Vec<u8> {
    let storage = Arc::new(Ram::default());
    model
        .write(Arc::clone(&storage), &options(1, compression, None))
        .unwrap();
    storage.bytes()
}

/// What the model becomes by a few pages, and the increment's file.
fn increment(base: &Reader<View<'_>>, model: &Model) -> (Model, Vec<u8>) {
    let storage = Arc::new(Ram::default());
    let how = options(2, Compression::Zstd(1), Some(base.as_base()));
    let writer = Writer::new(&*storage, &how).unwrap();
    let mut model = model.clone();
    for (number, pages) in &model.memories {
        let pages = pages.len() as u64;
        writer
            .add_memory(MemorySpec {
                number: *number,
                pages,
            })
            .unwrap();
    }
    let page = [77; PAGE_SIZE];
    writer.write(3, 2, &page).unwrap();
    writer.mark(3, 3, 1, Mark::Zero).unwrap();
    writer.mark(3, 17, 1, Mark::Hole).unwrap();
    writer.finish().unwrap();
    model.sections.clear();
    let pages = model.memories.get_mut(&3).unwrap();
    pages[2] = Content::Data(Box::new(page));
    pages[3] = Content::Zero;
    pages[17] = Content::Hole;
    (model, storage.bytes())
}

/// Whether an error may come of a damaged file.
fn is_refusal(error: &ImageError) -> bool {
    error.is_of_the_file() || matches!(error, ImageError::WrongBase { .. })
}

fn cuts(bytes: &[u8], base: Option<&Arc<Reader<View<'_>>>>) {
    for length in 0..bytes.len() {
        let base = base.map(Arc::clone);
        let Err(error) = Reader::open(View(&bytes[..length]), base) else {
            panic!("cut at {length} of {}", bytes.len());
        };
        match error {
            ImageError::NotAnImage => assert!(length < 8, "{length}"),
            ImageError::Truncated { found, .. } => assert_eq!(found, length as u64),
            error => panic!("cut at {length}: {error}"),
        }
    }
    // And what is longer.
    let mut longer = bytes.to_vec();
    longer.push(0);
    let base = base.map(Arc::clone);
    let error = Reader::open(View(&longer), base).unwrap_err();
    assert!(matches!(error, ImageError::Truncated { .. }), "{error}");
}

fn open(bytes: &[u8]) -> Arc<Reader<View<'_>>> {
    Arc::new(Reader::open(View(bytes), None).unwrap())
}

/// Says in how many places nothing came of it.
fn flips(
    bytes: &[u8],
    model: &Model,
    base: Option<&[u8]>,
    masks: impl Fn(usize) -> Vec<u8>,
) -> usize {
    let mut harmless = 0;
    let mut damaged = bytes.to_vec();
    for at in 0..bytes.len() {
        for mask in masks(at) {
            damaged[at] ^= mask;
            let base = base.map(open);
            let found = Reader::open(View(&damaged), base).and_then(|reader| model.same(&reader));
            match found {
                Ok(Ok(())) => harmless += 1,
                Ok(Err(how)) => panic!("byte {at} ^ {mask:#x} is not noticed: {how}"),
                Err(error) => assert!(is_refusal(&error), "byte {at} ^ {mask:#x}: {error}"),
            }
            damaged[at] ^= mask;
        }
    }
    harmless
}

#[test]
fn every_cut_is_refused() {
    let model = small();
    for compression in [Compression::None, Compression::Zstd(1)] {
        let bytes = write(&model, compression);
        cuts(&bytes, None);
        let base = open(&bytes);
        let (_, bytes) = increment(&base, &model);
        cuts(&bytes, Some(&base));
    }
}

#[test]
fn a_guests_memory_that_has_an_image_ends_no_image() {
    let inner = write(&small(), Compression::Zstd(1));
    let mut pages = inner.clone();
    pages.resize(inner.len().next_multiple_of(PAGE_SIZE), 0);
    let storage = Arc::new(Ram::default());
    // Even with the same id.
    let writer = Writer::new(&*storage, &options(1, Compression::None, None)).unwrap();
    let count = (pages.len() / PAGE_SIZE) as u64;
    writer
        .add_memory(MemorySpec {
            number: 0,
            pages: count,
        })
        .unwrap();
    writer.write(0, 0, &pages).unwrap();
    writer.finish().unwrap();
    cuts(&storage.bytes(), None);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let mut model = small();
    model.memories.get_mut(&3).unwrap()[17] = Content::Zero;
    let all = |_| (0..8).map(|bit| 1 << bit).collect();
    let bytes = write(&model, Compression::Zstd(1));
    println!(
        "harmless: {} of {}",
        flips(&bytes, &model, None, all),
        bytes.len() * 8
    );
    let base = open(&bytes);
    let (model, increment) = increment(&base, &model);
    let harmless = flips(&increment, &model, Some(&bytes), all);
    println!("harmless: {harmless} of {}", increment.len() * 8);
}

#[test]
fn every_changed_byte_is_noticed() {
    let random = std::cell::RefCell::new(random());
    let model = small();
    let bytes = write(&model, Compression::None);
    flips(&bytes, &model, None, |_| {
        vec![random.borrow_mut().u8(1..), 0xff]
    });
}

#[test]
fn what_is_wrong_is_told_apart_and_the_rest_is_read() {
    let model = small();
    let bytes = write(&model, Compression::None);
    let reader = open(&bytes);
    assert_eq!(reader.verify(9).unwrap().faults, []);
    // The first cluster is behind the header: pages 0 to 3.
    let mut damaged = bytes.clone();
    damaged[4096 + 5000] ^= 1;
    let reader = open(&damaged);
    let mut page = [0; PAGE_SIZE];
    let error = reader.page(3, 0, &mut page).unwrap_err();
    assert!(
        matches!(error, ImageError::Corrupt { offset: 4096, .. }),
        "{error}"
    );
    reader.page(3, 17, &mut page).unwrap();
    let verified = reader.verify(9).unwrap();
    let faults: Vec<_> = verified
        .faults
        .iter()
        .map(|fault| (fault.offset, fault.pages))
        .collect();
    assert_eq!(faults, [(4096, Some((3, 0, 16)))]);
    assert_eq!((verified.clusters, verified.data_pages), (1, 2));
    let verified = reader.verify(0).unwrap();
    assert_eq!((verified.faults.len(), verified.more_faults), (0, 1));
}

#[test]
fn a_cluster_in_anothers_place_is_not_taken_for_it() {
    // Two memories with two pages each, written apart: equal lengths, other contents.
    let storage = Arc::new(Ram::default());
    let writer = Writer::new(&*storage, &options(1, Compression::None, None)).unwrap();
    for number in [0, 1] {
        writer.add_memory(MemorySpec { number, pages: 2 }).unwrap();
    }
    for (number, page) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let contents = [number as u8 * 2 + page as u8 + 1; PAGE_SIZE];
        writer.write(number, page, &contents).unwrap();
    }
    writer.finish().unwrap();
    let bytes = storage.bytes();
    let cluster = |at: usize| 4096 + at * PAGE_SIZE..4096 + (at + 1) * PAGE_SIZE;
    for (to, from) in [(0, 1), (0, 2), (2, 0), (3, 2)] {
        let mut swapped = bytes.clone();
        swapped.copy_within(cluster(from), cluster(to).start);
        let reader = open(&swapped);
        let (memory, page) = ((to / 2) as u32, (to % 2) as u64);
        assert!(reader.page(memory, page, &mut [0; PAGE_SIZE]).is_err());
    }
}
