//! Frames survive, and each bad field is named.

use proptest::prelude::*;

use slat_proto::{ApiError, Reason};

use super::*;

fn pages(count: u32, length: u32) -> Header {
    Header {
        kind: Kind::Pages,
        length,
        slot: 1,
        count,
        sequence: 0,
        epoch: 7,
    }
}

#[test]
fn headers_survive_and_each_bad_field_is_named() {
    let header = pages(2, 16 + 3 * 4096);
    let bytes = header.encode(2);
    assert_eq!(Header::decode(&bytes, 2).unwrap(), header);
    let field = |change: &dyn Fn(&mut [u8; HEADER]), resum: bool| {
        let mut bad = bytes;
        change(&mut bad);
        if resum {
            let sum = crc32fast::hash(&bad[..44]);
            bad[44..].copy_from_slice(&sum.to_le_bytes());
        }
        match Header::decode(&bad, 2) {
            Err(WireError::Corrupt { field, .. }) => field,
            Err(WireError::Version {
                found: 9,
                agreed: 2,
            }) => "version",
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(field(&|b| b[0] = b'X', true), "magic");
    assert_eq!(field(&|b| b[4] = 9, true), "version");
    assert_eq!(field(&|b| b[6] = 99, true), "kind");
    assert_eq!(field(&|b| b[11] = 0xff, true), "length");
    assert_eq!(field(&|b| b[16] = 0, true), "length");
    assert_eq!(field(&|b| b[8] = 17, true), "length");
    assert_eq!(field(&|b| b[30] ^= 1, false), "crc");
}

#[test]
fn runs_outside_the_slot_are_refused() {
    let check = |run: Run, carried: u32| {
        let mut bytes = Vec::new();
        encode_runs(&[run], &mut bytes);
        decode_runs(&pages(1, 8 + carried * 4096), &bytes, 100)
    };
    assert!(check(Run { page: 99, pages: 1 }, 1).is_ok());
    for bad in [(100, 1), (99, 2), (u32::MAX, 1), (0, u32::MAX), (5, 0)] {
        let result = check(
            Run {
                page: bad.0,
                pages: bad.1,
            },
            1,
        );
        assert!(
            matches!(result, Err(WireError::OutOfSlot { .. })),
            "{bad:?}"
        );
    }
    let result = check(Run { page: 0, pages: 2 }, 1);
    assert!(matches!(
        result,
        Err(WireError::Corrupt {
            field: "length",
            ..
        })
    ));
}

#[test]
fn order_and_epoch_are_kept() {
    let mut stream = Vec::new();
    let mut writer = FrameWriter::new(2, 7);
    writer.send(&mut stream, Kind::IterEnd, 3, &[]).unwrap();
    writer.send(&mut stream, Kind::Ready, 0, &[]).unwrap();
    let mut reader = FrameReader::new(2, 7);
    let mut from = stream.as_slice();
    assert_eq!(reader.frame(&mut from).unwrap().0.count, 3);
    assert_eq!(reader.frame(&mut from).unwrap().0.kind, Kind::Ready);
    let again = reader.frame(&mut stream.as_slice());
    assert!(matches!(
        again,
        Err(WireError::Corrupt {
            field: "sequence",
            ..
        })
    ));
    let other = FrameReader::new(2, 8).frame(&mut stream.as_slice());
    assert!(matches!(
        other,
        Err(WireError::Corrupt { field: "epoch", .. })
    ));
}

#[test]
fn aborts_carry_their_reason() {
    let error = ApiError::new(Reason::DigestMismatch, "slot 0 differs");
    let mut stream = Vec::new();
    FrameWriter::new(2, 1)
        .send(&mut stream, Kind::Abort, 0, &encode_abort(&error))
        .unwrap();
    match FrameReader::new(2, 1).frame(&mut stream.as_slice()) {
        Err(WireError::Aborted(got)) => {
            assert_eq!((got.reason, got.message), (error.reason, error.message))
        }
        other => panic!("{other:?}"),
    }
    let long = ApiError::new(Reason::Internal, "ü".repeat(5000));
    assert!(encode_abort(&long).len() <= MAX_ABORT as usize);
}

#[test]
fn hello_needs_the_whole_ticket() {
    let hello = Hello {
        shows: [5; TICKET],
        role: StreamRole::Data(3),
    };
    assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
    assert!(Hello::decode(&hello.encode()[..35]).is_err());
}

#[test]
fn damaged_streams_are_refused_or_understood() {
    let understood = crate::fuzz::bounded(&fuzzed::FRAMES);
    assert!(understood > 0, "damage that is none was never made");
}

#[test]
fn a_harvest_survives_its_encoding_and_its_damage_stays_in_the_slot() {
    crate::fuzz::bounded(&fuzzed::HARVEST);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), sum in any::<bool>()) {
        let mut bytes = bytes;
        if bytes.len() >= HEADER {
            bytes[0..4].copy_from_slice(&MAGIC);
            bytes[4..6].copy_from_slice(&2_u16.to_le_bytes());
            bytes[7] = 0;
            if sum {
                let sum = crc32fast::hash(&bytes[..44]);
                bytes[44..48].copy_from_slice(&sum.to_le_bytes());
            }
        }
        let mut reader = FrameReader::new(2, 0);
        let mut from = bytes.as_slice();
        if let Ok(header) = reader.header(&mut from)
            && let Ok(payload) = payload(&mut from, &header)
        {
            if matches!(header.kind, Kind::Pages | Kind::Zero) {
                let runs = header.count as usize * RUN;
                drop(decode_runs(&header, &payload[..runs.min(payload.len())], 100));
            }
            drop(Hello::decode(&payload));
        }
    }
}
