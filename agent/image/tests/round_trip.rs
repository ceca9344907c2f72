//! What is written is read back: random memories, pages in random order and from several threads,
//! increments that build on increments.

use std::sync::Arc;

use slat_image::{
    Compression, ImageError, Mark, MemorySpec, PAGE_SIZE, Page, PageKind, Reader, Storage, Writer,
};

use self::support::{Content, Model, Ram, options, random, section};

mod support;

const THREADS: usize = 4;

/// What one call of a writer says, in the order in which calls are made.
enum Call {
    Write(u32, u64, Vec<Option<Box<Page>>>),
    Mark(u32, u64, Mark),
}

impl Call {
    fn make<W: Storage>(&self, writer: &Writer<W>) -> Result<(), ImageError> {
        match self {
            Self::Mark(memory, page, mark) => writer.mark(*memory, *page, 1, *mark),
            Self::Write(memory, first, pages) => {
                if pages.iter().all(Option::is_some) {
                    let pages = pages.iter().flatten().flat_map(|page| page.iter().copied());
                    return writer.write(*memory, *first, &pages.collect::<Vec<u8>>());
                }
                let pages: Vec<_> = pages.iter().map(Option::as_deref).collect();
                writer.write_some(*memory, *first, &pages)
            }
        }
    }
}

/// Calls that make `new` out of `old`, whose pages are in the base: runs and pieces, shuffled.
fn calls(
    memory: u32,
    old: Option<&Vec<Content>>,
    new: &[Content],
    random: &mut fastrand::Rng,
) -> Vec<Call> {
    let mut calls = Vec::new();
    let before = |page: usize| old.and_then(|old| old.get(page)).unwrap_or(&Content::Hole);
    let in_base = |page: usize| old.is_some_and(|old| page < old.len());
    let mut page = 0;
    while page < new.len() {
        let end = (page + random.usize(1..40)).min(new.len());
        let mut given = Vec::new();
        for (at, contents) in (page..end).zip(&new[page..end]) {
            let same = contents == before(at);
            given.push(match contents {
                Content::Data(contents) if !same || !in_base(at) => Some(contents.clone()),
                Content::Zero if !same && random.bool() => Some(Box::new([0; PAGE_SIZE])),
                Content::Zero if !same || !in_base(at) => {
                    calls.push(Call::Mark(memory, at as u64, Mark::Zero));
                    None
                }
                Content::Hole if !same => {
                    calls.push(Call::Mark(memory, at as u64, Mark::Hole));
                    None
                }
                _ if random.bool() && in_base(at) => {
                    calls.push(Call::Mark(memory, at as u64, Mark::Base));
                    None
                }
                _ => None,
            });
        }
        calls.push(Call::Write(memory, page as u64, given));
        page = end;
    }
    random.shuffle(&mut calls);
    calls
}

/// Writes `new` over `base`, which is `old`.
fn write(
    number: u8,
    base: Option<&(Model, Arc<Reader<Arc<Ram>>>)>,
    new: &Model,
    random: &mut fastrand::Rng,
) -> Arc<Ram> {
    let compression = match random.u8(..3) {
        0 => Compression::None,
        _ => Compression::Zstd(random.i32(1..4)),
    };
    let storage = Arc::new(Ram::default());
    let of_base = base.map(|(_, reader)| reader.as_base());
    let writer = Writer::new(Arc::clone(&storage), &options(number, compression, of_base)).unwrap();
    let mut all = Vec::new();
    for (memory, pages) in &new.memories {
        writer
            .add_memory(MemorySpec {
                number: *memory,
                pages: pages.len() as u64,
            })
            .unwrap();
        let old = base.and_then(|(old, _)| old.memories.get(memory));
        all.extend(calls(*memory, old, pages, random));
    }
    random.shuffle(&mut all);
    std::thread::scope(|scope| {
        for share in all.chunks(all.len().div_ceil(THREADS).max(1)) {
            let writer = &writer;
            scope.spawn(move || share.iter().for_each(|call| call.make(writer).unwrap()));
        }
    });
    for section in &new.sections {
        writer.add_section(section.clone()).unwrap();
    }
    let progress = writer.progress();
    let summary = writer.finish().unwrap();
    assert_eq!(progress.data_pages, summary.data_pages);
    assert_eq!(
        progress.logical_bytes,
        summary.data_pages * PAGE_SIZE as u64
    );
    assert!(progress.stored_bytes < summary.length);
    assert_eq!(slat_image::inspect(&storage).unwrap(), summary);
    storage
}

/// Another model: memories come, go, grow and shrink, pages change or do not.
fn next(old: &Model, random: &mut fastrand::Rng) -> Model {
    let mut new = Model::default();
    for number in 0..4 {
        let mut pages = old.memories.get(&number).cloned().unwrap_or_default();
        if random.u8(..4) == 0 || (old.memories.is_empty() && number == 1) {
            // Also more than a block.
            let length = random.usize(..1300);
            pages.resize(length, Content::Hole);
        }
        if pages.is_empty() && random.bool() {
            continue;
        }
        let often = [0, 3, 50][random.usize(..3)];
        for page in &mut pages {
            if random.u8(..100) < often {
                *page = match random.u8(..4) {
                    0 => Content::Hole,
                    1 => Content::Zero,
                    _ => Content::random(random),
                };
            }
        }
        new.memories.insert(number, pages);
    }
    for name in ["spec", "slots", "vcpu"] {
        if random.bool() {
            let contents: Vec<u8> = (0..random.usize(..5000)).map(|_| random.u8(..)).collect();
            new.sections.push(section(name, &contents));
        }
    }
    new
}

#[test]
fn random_images_are_read_back_two_bases_deep() {
    let mut random = random();
    for _ in 0..12 {
        let mut base: Option<(Model, Arc<Reader<Arc<Ram>>>)> = None;
        for number in 0..4 {
            let old = base.as_ref().map(|(old, _)| old.clone());
            let new = next(&old.unwrap_or_default(), &mut random);
            let storage = write(number, base.as_ref(), &new, &mut random);
            let below = base.as_ref().map(|(_, reader)| Arc::clone(reader));
            let reader = Reader::open(storage, below).unwrap();
            new.check(&reader);
            let verified = reader.verify(10).unwrap();
            assert!(verified.faults.is_empty(), "{:?}", verified.faults);
            let pages = new.memories.values().flatten();
            let data = pages.filter(|page| page.kind() == PageKind::Data).count();
            assert_eq!(verified.data, data as u64);
            base = Some((new, Arc::new(reader)));
        }
    }
}

#[test]
fn several_threads_read_one_reader() {
    let model = Model::small();
    let storage = Arc::new(Ram::default());
    let zstd = options(1, Compression::Zstd(1), None);
    model.write(Arc::clone(&storage), &zstd).unwrap();
    let reader = Reader::open(storage, None).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| (0..20).for_each(|_| model.check(&reader)));
        }
    });
}

#[test]
fn pages_that_do_not_compress_are_stored_as_they_are() {
    let mut random = random();
    let mut noise = vec![0; 16 * PAGE_SIZE];
    random.fill(&mut noise);
    let storage = Arc::new(Ram::default());
    let writer = Writer::new(&*storage, &options(1, Compression::Zstd(3), None)).unwrap();
    for number in [0, 1] {
        writer.add_memory(MemorySpec { number, pages: 16 }).unwrap();
    }
    writer.write(0, 0, &noise).unwrap();
    let before = writer.progress().stored_bytes;
    writer.write(1, 0, &[7; 16 * PAGE_SIZE]).unwrap();
    assert!(writer.progress().stored_bytes < before + 200);
    writer.finish().unwrap();
    let reader = Reader::open(storage, None).unwrap();
    let bytes = |memory| {
        reader
            .cluster_of(memory, 3)
            .unwrap()
            .unwrap()
            .stored_bytes()
    };
    assert_eq!(bytes(0), noise.len() as u64);
    assert!(bytes(1) < 200);
}

#[test]
fn what_a_writer_is_not_to_be_asked_is_refused_and_changes_nothing() {
    let storage = Arc::new(Ram::default());
    let writer = Writer::new(&*storage, &options(1, Compression::None, None)).unwrap();
    let memory = |number, pages| MemorySpec { number, pages };
    writer.add_memory(memory(3, 20)).unwrap();
    let twice = writer.add_memory(memory(3, 1));
    assert!(matches!(twice, Err(ImageError::Twice { .. })));
    let large = writer.add_memory(memory(4, (1 << 32) - 19));
    assert!(matches!(large, Err(ImageError::Limit { .. })));
    let page = [5; PAGE_SIZE];
    assert!(matches!(
        writer.write(2, 0, &page),
        Err(ImageError::NoSuchMemory { memory: 2 })
    ));
    for first in [20, 19, u64::MAX] {
        let two = writer.write(3, first, &[5; 2 * PAGE_SIZE]);
        assert!(matches!(two, Err(ImageError::NoSuchPage { .. })), "{first}");
    }
    assert!(matches!(
        writer.write(3, 0, &page[1..]),
        Err(ImageError::Limit { .. })
    ));
    assert!(matches!(
        writer.mark(3, 0, 1, Mark::Base),
        Err(ImageError::NoSuchPage { .. })
    ));
    writer.write(3, 7, &page).unwrap();
    for again in [
        writer.write(3, 7, &page),
        writer.write(3, 0, &[5; 20 * PAGE_SIZE]),
        writer.mark(3, 0, 20, Mark::Zero),
    ] {
        assert!(matches!(again, Err(ImageError::Twice { .. })), "{again:?}");
    }
    for name in ["", "Upper", "with space", &"x".repeat(33)] {
        let refused = writer.add_section(section(name, &[]));
        assert!(matches!(refused, Err(ImageError::BadName { .. })), "{name}");
    }
    writer.add_section(section("spec", &[1])).unwrap();
    let twice = writer.add_section(section("spec", &[2]));
    assert!(matches!(twice, Err(ImageError::Twice { .. })));
    let long = writer.add_section(section("long", &vec![0; (16 << 20) + 1]));
    assert!(matches!(long, Err(ImageError::Limit { .. })));
    writer.finish().unwrap();

    let mut model = Model::default();
    let mut pages = vec![Content::Hole; 20];
    pages[7] = Content::Data(Box::new(page));
    model.memories.insert(3, pages);
    model.sections.push(section("spec", &[1]));
    model.check(&Reader::open(Arc::clone(&storage), None).unwrap());
    let again = Writer::new(storage, &options(1, Compression::None, None));
    assert!(matches!(again, Err(ImageError::NotEmpty { .. })));
}

#[test]
fn a_reader_says_what_it_does_not_have() {
    let storage = Arc::new(Ram::default());
    let raw = options(1, Compression::None, None);
    Model::small().write(Arc::clone(&storage), &raw).unwrap();
    let reader = Reader::open(storage, None).unwrap();
    let mut page = [0; PAGE_SIZE];
    assert!(matches!(
        reader.page(2, 0, &mut page),
        Err(ImageError::NoSuchMemory { memory: 2 })
    ));
    for (memory, number) in [(7, 35), (7, u64::MAX), (9, 0), (1, 3)] {
        let error = reader.page(memory, number, &mut page).unwrap_err();
        assert!(matches!(error, ImageError::NoSuchPage { memory: of, page }
            if (of, page) == (memory, number)));
        assert!(reader.cluster_of(memory, number).is_err());
        assert!(reader.is_zero(memory, number).is_err());
    }
    assert!(reader.is_hole(1, 1).unwrap() && reader.is_zero(1, 1).unwrap());
    assert!(!reader.is_hole(1, 0).unwrap() && reader.is_zero(1, 0).unwrap());
    assert_eq!(reader.section("clock").unwrap(), None);
    let vcpu = reader.section("vcpu").unwrap().unwrap();
    assert_eq!(vcpu.contents, [9; 300]);
}

#[test]
fn another_base_is_refused_by_name() {
    let raw = |number, base| options(number, Compression::None, base);
    let model = Model::small();
    let open = |bytes: &[u8], base| Reader::open(Ram::of(bytes), base);
    let storage = Arc::new(Ram::default());
    model.write(Arc::clone(&storage), &raw(1, None)).unwrap();
    let base = Arc::new(open(&storage.bytes(), None).unwrap());

    // The same id, and other contents.
    let mut changed = model.clone();
    changed.memories.get_mut(&7).unwrap()[3] = Content::Zero;
    let storage = Arc::new(Ram::default());
    changed.write(Arc::clone(&storage), &raw(1, None)).unwrap();
    let other = Arc::new(open(&storage.bytes(), None).unwrap());

    let storage = Arc::new(Ram::default());
    let increment = Writer::new(&*storage, &raw(2, Some(base.as_base()))).unwrap();
    increment.finish().unwrap();
    let bytes = storage.bytes();
    open(&bytes, Some(Arc::clone(&base))).unwrap();
    for given in [None, Some(other)] {
        let name = given.as_ref().map(|given| given.name());
        let error = open(&bytes, given).unwrap_err();
        assert!(matches!(error, ImageError::WrongBase { wanted, given }
            if wanted == Some(base.name()) && given == name));
    }
    let alone = open(&Ram::of(&bytes).bytes(), Some(Arc::clone(&base))).unwrap();
    let storage = Arc::new(Ram::default());
    model.write(Arc::clone(&storage), &raw(3, None)).unwrap();
    let error = Reader::open(storage, Some(Arc::new(alone))).unwrap_err();
    assert!(matches!(error, ImageError::WrongBase { wanted: None, .. }));
}

#[test]
fn a_chain_has_an_end() {
    let mut below: Option<Arc<Reader<Arc<Ram>>>> = None;
    for number in 0..70 {
        let storage = Arc::new(Ram::default());
        let of_base = below.as_ref().map(|base| base.as_base());
        let writer = Writer::new(&*storage, &options(number, Compression::None, of_base)).unwrap();
        let spec = MemorySpec {
            number: 0,
            pages: 1,
        };
        writer.add_memory(spec).unwrap();
        if number == 0 {
            writer.write(0, 0, &[7; PAGE_SIZE]).unwrap();
        }
        writer.finish().unwrap();
        match Reader::open(storage, below.take()) {
            Ok(reader) => {
                let mut page = [0; PAGE_SIZE];
                reader.page(0, 0, &mut page).unwrap();
                assert_eq!(page, [7; PAGE_SIZE]);
                below = Some(Arc::new(reader));
            }
            Err(error) => {
                assert!(matches!(error, ImageError::Limit { .. }), "{error}");
                assert_eq!(number, 64);
                return;
            }
        }
    }
    panic!("as long as one likes");
}

#[test]
fn a_memory_that_shrank_has_nothing_of_its_base_beyond_its_end() {
    let mut random = random();
    let mut model = Model::default();
    let pages = (0..40).map(|_| Content::random(&mut random)).collect();
    model.memories.insert(0, pages);
    let storage = Arc::new(Ram::default());
    let how = options(1, Compression::None, None);
    model.write(Arc::clone(&storage), &how).unwrap();
    let base = Arc::new(Reader::open(storage, None).unwrap());
    for pages in [0, 1, 21, 32, 39, 41, 2000] {
        let storage = Arc::new(Ram::default());
        let how = options(2, Compression::None, Some(base.as_base()));
        let writer = Writer::new(&*storage, &how).unwrap();
        writer.add_memory(MemorySpec { number: 0, pages }).unwrap();
        writer.finish().unwrap();
        let mut model = model.clone();
        let of_model = model.memories.get_mut(&0).unwrap();
        of_model.resize(pages as usize, Content::Hole);
        let reader = Reader::open(storage, Some(Arc::clone(&base))).unwrap();
        model.check(&reader);
        let verified = reader.verify(9).unwrap();
        assert_eq!((verified.faults, verified.data), (vec![], pages.min(40)));
    }
}

#[test]
fn a_large_memory_costs_what_was_written_of_it() {
    let pages = (64 << 30) / PAGE_SIZE as u64;
    let storage = Arc::new(Ram::default());
    let how = options(1, Compression::Zstd(1), None);
    let writer = Writer::new(&*storage, &how).unwrap();
    writer.add_memory(MemorySpec { number: 0, pages }).unwrap();
    let written = [0, 1 << 20, pages - 1];
    for page in written {
        writer.write(0, page, &[page as u8 | 1; PAGE_SIZE]).unwrap();
    }
    writer.mark(0, 2 << 20, 1 << 20, Mark::Zero).unwrap();
    let summary = writer.finish().unwrap();
    // The table, and three pages.
    assert!(summary.length < (16 << 10) * 16 + 8000, "{summary:?}");
    let reader = Arc::new(Reader::open(storage, None).unwrap());
    let verified = reader.verify(9).unwrap();
    assert_eq!(verified.faults, []);
    let counts = (verified.data, verified.zero, verified.hole);
    assert_eq!(counts, (3, 1 << 20, pages - 3 - (1 << 20)));

    let storage = Arc::new(Ram::default());
    let how = options(2, Compression::Zstd(1), Some(reader.as_base()));
    let writer = Writer::new(&*storage, &how).unwrap();
    writer.add_memory(MemorySpec { number: 0, pages }).unwrap();
    writer.mark(0, 0, pages, Mark::Base).unwrap();
    writer.finish().unwrap();
    let reader = Reader::open(storage, Some(reader)).unwrap();
    let mut found = [0; PAGE_SIZE];
    for page in written {
        assert_eq!(reader.page(0, page, &mut found).unwrap(), PageKind::Data);
        assert_eq!(found, [page as u8 | 1; PAGE_SIZE]);
    }
    assert_eq!(reader.clusters().unwrap().count(), written.len());
    assert!(!reader.is_hole(0, 2 << 20).unwrap() && reader.is_hole(0, 1).unwrap());
}
