//! Damaged bytes of the data port: whole streams of frames, and the runs of a harvest.

use slat_proto::{ApiError, Reason};

use super::{
    FrameReader, FrameWriter, HEADER, Header, Hello, Kind, RUN, Run, StreamRole, TICKET, WireError,
    decode_runs, encode_abort, encode_runs, payload,
};
use crate::{fuzz::Target, memory::DirtyBitmap};

/// Pages of the slot that runs are of.
const PAGES: u64 = 500;

/// Whole streams, as valid as can be but for their damage.
pub(crate) const FRAMES: Target = Target {
    name: "frames",
    rounds: 1000,
    corpus: streams,
    check: read,
};

/// A harvest as it goes over the wire: runs of the bitmap, and from them the same bitmap.
pub(crate) const HARVEST: Target = Target {
    name: "harvest",
    rounds: 1000,
    corpus: || {
        vec![
            encoded(&[(0, 1)]),
            encoded(&[(0, PAGES)]),
            encoded(&[(63, 2), (127, 1), (129, 64), (499, 1)]),
            encoded(&[(1, 1), (3, 1), (5, 1), (7, 200)]),
        ]
    },
    check: harvest,
};

fn stream(frames: &[(Kind, u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = FrameWriter::new(2, 7);
    for (kind, count, payload) in frames {
        writer
            .send(&mut bytes, *kind, *count, payload)
            .expect("memory takes every frame");
    }
    bytes
}

fn streams() -> Vec<Vec<u8>> {
    let hello = Hello {
        shows: [5; TICKET],
        role: StreamRole::Data(3),
    };
    let mut zero = Vec::new();
    encode_runs(
        &[Run { page: 3, pages: 5 }, Run { page: 90, pages: 1 }],
        &mut zero,
    );
    let abort = encode_abort(&ApiError::new(Reason::DigestMismatch, "slot 0 differs"));
    vec![
        stream(&[
            (Kind::Hello, 0, hello.encode()),
            (Kind::Echo, 0, Vec::new()),
        ]),
        stream(&[(Kind::Zero, 2, zero), (Kind::IterEnd, 3, Vec::new())]),
        stream(&[(Kind::Ready, 0, Vec::new()), (Kind::Commit, 0, Vec::new())]),
        stream(&[(Kind::Abort, 0, abort)]),
    ]
}

#[allow(clippy::ptr_arg, reason = "the form of every target: others cut")]
fn read(bytes: &mut Vec<u8>) -> bool {
    // Its checksum is right again, or nothing behind it would be reached.
    if let Some(header) = bytes.first_chunk_mut::<HEADER>() {
        let sum = crc32fast::hash(&header[..44]);
        header[44..].copy_from_slice(&sum.to_le_bytes());
    }
    let mut reader = FrameReader::new(2, 7);
    let mut from = bytes.as_slice();
    let mut frames = 0;
    while !from.is_empty() {
        let header = match reader.header(&mut from) {
            Ok(header) => header,
            Err(WireError::Aborted(_)) => return true,
            Err(_) => return false,
        };
        let Ok(payload) = payload(&mut from, &header) else {
            return false;
        };
        assert!(payload.len() == header.length as usize, "{header:?}");
        if matches!(header.kind, Kind::Pages | Kind::Zero) {
            let runs = header.count as usize * RUN;
            let Ok(runs) = decode_runs(&header, &payload[..runs.min(payload.len())], 100) else {
                return false;
            };
            assert!(
                runs.iter()
                    .all(|run| u64::from(run.page) + u64::from(run.pages) <= 100)
            );
        }
        if header.kind == Kind::Hello && Hello::decode(&payload).is_err() {
            return false;
        }
        frames += 1;
    }
    frames > 0
}

fn encoded(dirty: &[(u64, u64)]) -> Vec<u8> {
    let mut bitmap = DirtyBitmap::new(PAGES);
    for (first, pages) in dirty {
        bitmap.set(*first, *pages);
    }
    let runs = bitmap.runs().map(|(first, pages)| Run {
        page: first as u32,
        pages: pages as u32,
    });
    let mut bytes = Vec::new();
    encode_runs(&runs.collect::<Vec<_>>(), &mut bytes);
    bytes
}

fn harvest(bytes: &mut Vec<u8>) -> bool {
    bytes.truncate(bytes.len() / RUN * RUN);
    let header = Header {
        kind: Kind::Zero,
        length: bytes.len() as u32,
        slot: 1,
        count: (bytes.len() / RUN) as u32,
        sequence: 0,
        epoch: 7,
    };
    let Ok(runs) = decode_runs(&header, bytes, PAGES) else {
        return false;
    };
    let mut again = Vec::new();
    encode_runs(&runs, &mut again);
    assert_eq!(&again, bytes);
    let mut bitmap = DirtyBitmap::new(PAGES);
    for run in &runs {
        bitmap.set(run.page.into(), run.pages.into());
    }
    assert!(bitmap.count() <= PAGES);
    let most: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
    assert!(bitmap.count() <= most);
    true
}
