//! A saved VM's file beside plain writes and reads of the same bytes, in turns, in one run: written
//! with a sync at the end, read in the order of the file, and one page at random.
//!
//! One thread. What is read was just written, so it comes from the page cache on both sides: what
//! differs is the format's own work, not the disk's. The pages are none of them zeroes: half are
//! words, a quarter counters and addresses, a quarter noise, in runs of sixteen.

use std::{
    fs::File,
    hint::black_box,
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use slat_image::{
    ClusterBuffer, Compression, ImageId, MemorySpec, Options, PAGE_SIZE, Reader, Writer,
};

use super::rows::Row;

/// Bytes of a plain write or read: those of a cluster.
const CHUNK: usize = 64 << 10;
/// Random reads of one sample.
const READS: usize = 20_000;
/// Bytes that a writer is given at once.
const GIVEN: usize = 1 << 20;

const WORDS: [&str; 16] = [
    "page ", "table ", "the ", "of ", "guest", " = ", "{\n", "}\n", "return ", "static ", "0x",
    "if (", "error", "memory ", "int ", "; ",
];

/// Bytes as a guest might have them; a multiple of [`GIVEN`].
fn contents(bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut all = Vec::with_capacity(bytes + CHUNK);
    while all.len() < bytes {
        let end = all.len() + CHUNK;
        match random.u8(..4) {
            0 => all.extend(std::iter::repeat_with(|| random.u8(..)).take(CHUNK)),
            1 => {
                let from = 0xffff_8880_0000_0000 + random.u64(..1 << 30);
                while all.len() < end {
                    let number = if random.bool() {
                        from + random.u64(..4096)
                    } else {
                        random.u64(..9)
                    };
                    all.extend(number.to_le_bytes());
                }
            }
            _ => {
                while all.len() < end {
                    all.extend(WORDS[random.usize(..WORDS.len())].bytes());
                }
            }
        }
        all.truncate(end);
    }
    all.truncate(bytes);
    all
}

fn nanos(time: Duration) -> f64 {
    time.as_nanos() as f64
}

fn write_image(path: &Path, contents: &[u8], compression: Compression) -> anyhow::Result<f64> {
    let file = File::create_new(path)?;
    let begun = Instant::now();
    let options = Options {
        id: ImageId([1; 16]),
        compression,
        base: None,
    };
    let writer = Writer::new(file, &options)?;
    let pages = (contents.len() / PAGE_SIZE) as u64;
    writer.add_memory(MemorySpec { number: 0, pages })?;
    let mut page = 0;
    for given in contents.chunks(GIVEN) {
        writer.write(0, page, given)?;
        page += (given.len() / PAGE_SIZE) as u64;
    }
    let summary = writer.finish()?;
    let time = nanos(begun.elapsed());
    ensure!(summary.data_pages == pages, "{summary:?}");
    Ok(time)
}

fn write_plain(path: &Path, contents: &[u8]) -> anyhow::Result<f64> {
    let file = File::create_new(path)?;
    let begun = Instant::now();
    let mut at = 0;
    for chunk in contents.chunks(CHUNK) {
        file.write_all_at(chunk, at)?;
        at += chunk.len() as u64;
    }
    file.sync_all()?;
    Ok(nanos(begun.elapsed()))
}

fn read_image(path: &Path, into: &mut [u8]) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let reader = Reader::open(File::open(path)?, None)?;
    let mut buffer = ClusterBuffer::default();
    for cluster in reader.clusters()? {
        for (page, contents) in reader.read_cluster(&cluster?, &mut buffer)? {
            let at = page as usize * PAGE_SIZE;
            into[at..at + PAGE_SIZE].copy_from_slice(contents);
        }
    }
    Ok(nanos(begun.elapsed()))
}

fn read_plain(path: &Path, into: &mut [u8]) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let file = File::open(path)?;
    let mut at = 0;
    for chunk in into.chunks_mut(CHUNK) {
        file.read_exact_at(chunk, at)?;
        at += chunk.len() as u64;
    }
    Ok(nanos(begun.elapsed()))
}

/// The median of reads of one page.
fn median(mut read: impl FnMut(u64) -> anyhow::Result<()>, pages: u64) -> anyhow::Result<f64> {
    let mut random = fastrand::Rng::with_seed(8);
    let mut times = Vec::with_capacity(READS);
    for _ in 0..READS {
        let page = random.u64(..pages);
        let begun = Instant::now();
        read(page)?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    Ok(nanos(times[READS / 2]))
}

/// Measures all of it in `dir`, on `mib` MiB of memory, `runs` times.
///
/// # Errors
/// What the disk answers, and when what is read is not what was written.
pub fn measure(dir: &Path, mib: usize, runs: u32) -> anyhow::Result<Vec<Row>> {
    let contents = contents(mib << 20);
    let pages = (contents.len() / PAGE_SIZE) as u64;
    let mut into = vec![1; contents.len()];
    let plain = dir.join("plain");
    let image = dir.join("image");
    let mut rows = Vec::new();
    for compression in [
        Compression::None,
        Compression::Zstd(1),
        Compression::Zstd(3),
    ] {
        let row = |what: &str, peer: &str| Row::new(format!("{what}, {compression}"), peer, None);
        let mut write = row(
            &format!("write {mib} MiB and sync"),
            "pwrite of 64 KiB, fsync",
        );
        let mut read = row(&format!("read {mib} MiB in order"), "pread of 64 KiB");
        let mut random = row("read a page at random, median", "pread of 4 KiB");
        for _ in 0..runs {
            for path in [&image, &plain] {
                if path.exists() {
                    std::fs::remove_file(path)?;
                }
            }
            let of_image = write_image(&image, &contents, compression)?;
            write.add(of_image, write_plain(&plain, &contents)?);
            into.fill(1);
            let of_image = read_image(&image, &mut into)?;
            ensure!(into == contents, "what is read is not what was written");
            read.add(of_image, read_plain(&plain, &mut into)?);
            let reader = Reader::open(File::open(&image)?, None)?;
            let mut page = [0; PAGE_SIZE];
            let of_image = median(
                |number| Ok(reader.page(0, number, &mut page).map(drop)?),
                pages,
            )?;
            let file = File::open(&plain)?;
            let read_one = |number| {
                let at = number * PAGE_SIZE as u64;
                file.read_exact_at(&mut page, at).context("a plain read")
            };
            random.add(of_image, median(read_one, pages)?);
            black_box(&page);
        }
        let length = std::fs::metadata(&image)?.len();
        let part = length as f64 / contents.len() as f64;
        eprintln!(
            "{compression}: the file has {:.1} % of the memory's bytes",
            part * 100.0
        );
        rows.extend([write, read, random]);
    }
    Ok(rows)
}
