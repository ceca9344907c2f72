//! A disk that fails: at every operation in turn, in every way. An error is told by its type, and
//! no image is there afterwards.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use slat_image::{
    Compression, Draft, ImageError, Mark, MemorySpec, PAGE_SIZE, Reader, Storage, Writer,
};
use slat_test_dir::TestDir;

use self::support::{Model, Ram, options};

mod support;

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Full,
    Broken,
    /// It does less than it was asked for.
    Short,
    /// It writes half of it, and is full then.
    HalfThenFull,
    /// It writes nothing and does not say why.
    Nothing,
    Interrupted,
}

/// A disk whose operation number `at` fails, or all from it on.
#[derive(Debug)]
struct Faulty<S> {
    inner: S,
    fault: Fault,
    at: u64,
    forever: bool,
    done: AtomicU64,
}

impl<S> Faulty<S> {
    fn new(inner: S, fault: Fault, at: u64) -> Self {
        Self {
            inner,
            fault,
            at,
            forever: matches!(fault, Fault::Full | Fault::HalfThenFull | Fault::Nothing),
            done: AtomicU64::new(0),
        }
    }

    /// The fault, if it is this operation's turn, and which since the first that failed it is.
    fn turn(&self) -> Option<(Fault, u64)> {
        let number = self.done.fetch_add(1, Ordering::Relaxed);
        let since = number.checked_sub(self.at)?;
        (since == 0 || self.forever).then_some((self.fault, since))
    }

    fn was_hit(&self) -> bool {
        self.done.load(Ordering::Relaxed) > self.at
    }
}

impl<S: Storage> Storage for Faulty<S> {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        match self.turn() {
            None => self.inner.write_at(offset, bytes),
            Some((Fault::Short, _)) => self.inner.write_at(offset, &bytes[..1]),
            Some((Fault::HalfThenFull, 0)) if bytes.len() > 1 => {
                self.inner.write_at(offset, &bytes[..bytes.len() / 2])
            }
            Some((Fault::Full | Fault::HalfThenFull, _)) => Err(io::ErrorKind::StorageFull.into()),
            Some((Fault::Broken, _)) => Err(io::Error::from_raw_os_error(5)),
            Some((Fault::Nothing, _)) => Ok(0),
            Some((Fault::Interrupted, _)) => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match self.turn() {
            Some((Fault::Short, _)) => self.inner.read_at(offset, &mut buffer[..1]),
            Some((Fault::Interrupted, _)) => Err(io::ErrorKind::Interrupted.into()),
            Some(_) => Err(io::Error::from_raw_os_error(5)),
            None => self.inner.read_at(offset, buffer),
        }
    }

    fn sync(&self) -> io::Result<()> {
        match self.turn() {
            Some((Fault::Full | Fault::HalfThenFull, _)) => Err(io::ErrorKind::StorageFull.into()),
            Some((Fault::Broken, _)) => Err(io::Error::from_raw_os_error(5)),
            _ => self.inner.sync(),
        }
    }

    fn len(&self) -> io::Result<u64> {
        match self.turn() {
            Some((Fault::Broken, _)) => Err(io::Error::from_raw_os_error(5)),
            _ => self.inner.len(),
        }
    }
}

/// How the error of such a fault is told.
fn is_told(fault: Fault, error: &ImageError) -> bool {
    match fault {
        Fault::Full | Fault::HalfThenFull => matches!(error, ImageError::NoSpace { .. }),
        Fault::Broken => matches!(error, ImageError::Io { source, .. }
            if source.raw_os_error() == Some(5)),
        Fault::Nothing => matches!(error, ImageError::Io { source, .. }
            if source.kind() == io::ErrorKind::WriteZero),
        Fault::Short | Fault::Interrupted => false,
    }
}

#[test]
fn a_write_or_sync_that_fails_ends_the_image() {
    let model = Model::small();
    for fault in [
        Fault::Full,
        Fault::Broken,
        Fault::HalfThenFull,
        Fault::Nothing,
    ] {
        let mut met = 0;
        for at in 0.. {
            let ram = Arc::new(Ram::default());
            let disk = Arc::new(Faulty::new(Arc::clone(&ram), fault, at));
            let done = model.write(Arc::clone(&disk), &options(1, Compression::Zstd(1), None));
            if !disk.was_hit() {
                done.unwrap();
                break;
            }
            let Err(error) = done else {
                // Asking for the length does not write, nor does a sync of nothing.
                assert!(fault != Fault::Broken, "operation {at}");
                continue;
            };
            met += 1;
            assert!(is_told(fault, &error), "{fault:?} at {at}: {error:?}");
            if let ImageError::NoSpace { written, .. } = error {
                assert!(written <= ram.bytes().len() as u64);
            }
            // Not after the last sync: the footer may be there then, and is not promised to be.
            let error = match slat_image::inspect(&ram) {
                Err(error) => error,
                Ok(_) => {
                    assert_eq!(disk.done.load(Ordering::Relaxed), at + 1);
                    continue;
                }
            };
            let right = matches!(
                error,
                ImageError::Truncated { .. } | ImageError::NotAnImage | ImageError::Corrupt { .. }
            );
            assert!(right, "{fault:?} at {at}: {error}");
        }
        assert!(met > 8, "{fault:?}: {met}");
    }
}

#[test]
fn operations_that_do_less_than_asked_change_nothing() {
    let model = Model::small();
    let how = options(1, Compression::Zstd(1), None);
    let ram = Arc::new(Ram::default());
    model.write(Arc::clone(&ram), &how).unwrap();
    let wanted = ram.bytes();
    for fault in [Fault::Short, Fault::Interrupted] {
        for at in 0.. {
            let ram = Arc::new(Ram::default());
            let disk = Arc::new(Faulty::new(Arc::clone(&ram), fault, at));
            model.write(Arc::clone(&disk), &how).unwrap();
            assert_eq!(ram.bytes(), wanted, "{fault:?} at {at}");
            if !disk.was_hit() {
                break;
            }
        }
        for at in 0..200 {
            let disk = Faulty::new(Ram::of(&wanted), fault, at);
            model.check(&Reader::open(disk, None).unwrap());
        }
    }
}

#[test]
fn a_read_that_fails_is_told_and_another_may_not() {
    let model = Model::small();
    let ram = Arc::new(Ram::default());
    let how = options(1, Compression::Zstd(1), None);
    model.write(Arc::clone(&ram), &how).unwrap();
    for at in 0.. {
        let disk = Arc::new(Faulty::new(Arc::clone(&ram), Fault::Broken, at));
        let opened = Reader::open(Arc::clone(&disk), None);
        let result = opened.and_then(|reader| {
            let first = model.same(&reader);
            if disk.was_hit() {
                // It failed once, and goes on.
                model.check(&reader);
            }
            first
        });
        if !disk.was_hit() {
            break;
        }
        match result {
            Err(error) => assert!(is_told(Fault::Broken, &error), "{at}: {error:?}"),
            Ok(same) => same.unwrap(),
        }
    }
}

#[test]
fn no_file_has_the_name_of_an_image_that_failed() {
    let dir = TestDir::new();
    let model = Model::small();
    for fault in [Fault::Full, Fault::Broken] {
        for at in 0.. {
            let draft = Draft::create(dir.path(), "vm").unwrap();
            let disk = Arc::new(Faulty::new(draft.file(), fault, at));
            let done = model.write(Arc::clone(&disk), &options(1, Compression::None, None));
            let path = dir.path().join("vm");
            assert!(!path.exists());
            let was_hit = disk.was_hit();
            if done.is_ok() {
                draft.publish().unwrap();
                model.check(&Reader::open(std::fs::File::open(&path).unwrap(), None).unwrap());
                std::fs::remove_file(&path).unwrap();
                if !was_hit {
                    break;
                }
                continue;
            }
            // Not published: who was told of a failure does not.
            drop(draft);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }
    let draft = Draft::create(dir.path(), "vm").unwrap();
    let disk = Faulty::new(draft.file(), Fault::Full, 6);
    model
        .write(disk, &options(1, Compression::None, None))
        .unwrap_err();
    let error = draft.publish().unwrap_err();
    assert!(matches!(error, ImageError::Truncated { .. }), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn after_a_failed_write_nothing_makes_an_image_of_it() {
    let ram = Arc::new(Ram::default());
    // The length, the header, and one page that is too much.
    let disk = Faulty::new(Arc::clone(&ram), Fault::Broken, 2);
    let writer = Writer::new(&disk, &options(1, Compression::None, None)).unwrap();
    let memory = MemorySpec {
        number: 0,
        pages: 9,
    };
    writer.add_memory(memory).unwrap();
    let page = [1; PAGE_SIZE];
    let error = writer.write(0, 0, &page).unwrap_err();
    assert!(is_told(Fault::Broken, &error), "{error}");
    for again in [writer.write(0, 1, &page), writer.mark(0, 2, 1, Mark::Zero)] {
        assert!(matches!(again, Err(ImageError::Failed)), "{again:?}");
    }
    assert!(matches!(writer.finish(), Err(ImageError::Failed)));
    assert!(slat_image::inspect(&ram).is_err());
}

/// Writes down what is done to it.
#[derive(Debug, Default)]
struct Watched {
    ram: Ram,
    /// Where a write ended; `None`: a sync.
    calls: std::sync::Mutex<Vec<Option<u64>>>,
}

impl Storage for Watched {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let end = offset + bytes.len() as u64;
        self.calls.lock().unwrap().push(Some(end));
        self.ram.write_at(offset, bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.ram.read_at(offset, buffer)
    }

    fn sync(&self) -> io::Result<()> {
        self.calls.lock().unwrap().push(None);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.ram.len()
    }
}

#[test]
fn the_footer_is_written_when_all_else_is_durable_and_is_durable_in_the_end() {
    let disk = Watched::default();
    Model::small()
        .write(&disk, &options(1, Compression::None, None))
        .unwrap();
    let calls = disk.calls.lock().unwrap();
    let end = disk.len().unwrap();
    let footer = [None, Some(end), None];
    assert!(calls.ends_with(&footer), "{calls:?}");
    // One write of the footer alone, behind the sync.
    let before = &calls[..calls.len() - footer.len()];
    assert!(before.iter().flatten().all(|write| *write < end));
}
