//! Both halves over real sockets: what was sent is what arrives, waits end, and what was read ahead
//! is not forgotten.

use std::{net::TcpListener, thread};

use slat_proto::model::SlotSpec;
use slat_trust::channel::ChannelKey;

use super::{
    super::{
        channel::{Channel, Kernel},
        wire::{PAGE, StreamRole},
    },
    *,
};
use crate::memory::SlotMemory;

const PATIENCE: Duration = Duration::from_secs(30);
/// Far below any timeout of a connection.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The source's end and the destination's, of a data stream.
fn ends(tls: bool) -> ((Inlet, Outlet), (Inlet, Outlet)) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let key = || ChannelKey::generate("u", "m", Duration::from_secs(3600)).unwrap();
    let (here, there) = (key(), key());
    let (source, destination) = if tls {
        (
            Channel::source([1; 32], &here, there.fingerprint(), [2; 32]).unwrap(),
            Channel::destination([1; 32], &there, here.fingerprint(), [2; 32]).unwrap(),
        )
    } else {
        (Channel::plain([1; 32]), Channel::plain([1; 32]))
    };
    let until = Instant::now() + PATIENCE;
    let accepting = thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        destination.accept(socket, until).unwrap()
    });
    let socket = TcpStream::connect(address).unwrap();
    let mut kernel = Kernel::Not(String::new());
    let opened = source
        .open(socket, StreamRole::Data(0), &mut kernel, until)
        .unwrap();
    let accepted = accepting.join().unwrap();
    for socket in [opened.inlet.socket(), accepted.0.socket()] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    ((opened.inlet, opened.outlet), accepted)
}

fn slot(pages: u64) -> SlotMemory {
    SlotMemory::new(SlotSpec::new(0, 0, pages, false).unwrap()).unwrap()
}

#[test]
fn pages_arrive_as_they_were_between_frames_of_every_length() {
    const PAGES: u32 = 700;
    for tls in [false, true] {
        let ((_inlet, mut outlet), (mut inlet, _outlet)) = ends(tls);
        let (from, to) = (slot(PAGES.into()), slot(PAGES.into()));
        for page in 0..PAGES as usize {
            let bytes: Vec<u8> = (0..PAGE).map(|at| (page * 7 + at * 13) as u8).collect();
            from.host().write(page * PAGE, &bytes);
        }
        // One page, less than a record, more than a batch of records, and runs far apart.
        let frames: [&[(u32, u32)]; 4] = [
            &[(0, 1)],
            &[(5, 3)],
            &[(10, 600)],
            &[(620, 1), (640, 20), (699, 1)],
        ];
        let runs = |frame: &[(u32, u32)]| -> Vec<Run> {
            let run = |&(page, pages): &(u32, u32)| Run { page, pages };
            frame.iter().map(run).collect()
        };
        let head = |index: usize| vec![index as u8; [0, 1, 48, 40_000][index]];
        thread::scope(|scope| {
            scope.spawn(|| {
                for (index, frame) in frames.iter().enumerate() {
                    let runs = runs(frame);
                    outlet.send(&head(index), from.host(), &runs).unwrap();
                }
                outlet.write_all(b"the end").unwrap();
            });
            for (index, frame) in frames.iter().enumerate() {
                let mut heard = vec![0; head(index).len()];
                inlet.read_exact(&mut heard).unwrap();
                assert_eq!(heard, head(index));
                inlet.receive(to.host(), &runs(frame)).unwrap();
            }
            let mut end = [0; 7];
            inlet.read_exact(&mut end).unwrap();
            assert_eq!(&end, b"the end");
        });
        let (mut sent, mut received) = ([0; PAGE], [0; PAGE]);
        for (page, pages) in frames.iter().flat_map(|frame| frame.iter()) {
            for page in *page..page + pages {
                from.read_page(page.into(), &mut sent);
                to.read_page(page.into(), &mut received);
                assert!(sent == received, "page {page}, tls {tls}");
            }
        }
        to.read_page(2, &mut received);
        assert_eq!(received, [0; PAGE], "nobody sent it");
    }
}

#[test]
fn what_was_read_ahead_is_readable_although_the_socket_is_not() {
    for tls in [false, true] {
        let ((_inlet, mut outlet), (mut inlet, _outlet)) = ends(tls);
        assert!(!inlet.readable(Duration::from_millis(20)).unwrap());
        outlet.write_all(b"ab").unwrap();
        assert!(inlet.readable(PATIENCE).unwrap());
        let mut byte = [0];
        inlet.read_exact(&mut byte).unwrap();
        // By TLS both came off the socket together.
        assert!(inlet.readable(Duration::ZERO).unwrap());
        inlet.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"b");
        assert!(!inlet.readable(Duration::from_millis(20)).unwrap());
        // The peer's end is something to read.
        outlet.shutdown(Shutdown::Both).unwrap();
        assert!(inlet.readable(PATIENCE).unwrap());
        assert_eq!(inlet.read(&mut byte).unwrap(), 0);
    }
}

#[test]
fn half_a_record_is_nothing_to_read_yet() {
    let ((_inlet, outlet), (mut inlet, _outlet)) = ends(true);
    // The head of a record whose rest does not come.
    (&**outlet.socket())
        .write_all(&[23, 3, 3, 0, 40, 1, 2])
        .unwrap();
    let begun = Instant::now();
    assert!(!inlet.readable(Duration::from_millis(100)).unwrap());
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    let late = inlet
        .within(Instant::now() + Duration::from_millis(100))
        .read(&mut [0])
        .unwrap_err();
    assert!(
        matches!(
            late.kind(),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
        ),
        "{late}"
    );
}

#[test]
fn a_changed_byte_on_the_wire_ends_the_stream_and_reaches_no_memory() {
    let ((_inlet, mut outlet), (mut inlet, _outlet)) = ends(true);
    outlet.write_all(b"right").unwrap();
    let mut heard = [0; 5];
    inlet.read_exact(&mut heard).unwrap();
    // A record that nobody sealed.
    let mut forged = vec![23, 3, 3, 0, 64];
    forged.extend_from_slice(&[9; 64]);
    (&**outlet.socket()).write_all(&forged).unwrap();
    let to = slot(1);
    let error = inlet
        .receive(to.host(), &[Run { page: 0, pages: 1 }])
        .unwrap_err();
    assert!(matches!(WireError::from(error), WireError::Tls(_)));
    let mut page = [7; PAGE];
    to.read_page(0, &mut page);
    assert_eq!(page, [0; PAGE]);
}

#[test]
fn what_blocks_ends_when_it_is_broken_off() {
    for tls in [false, true] {
        let breaker = Arc::new(Breaker::default());
        let ((mut inlet, mut outlet), _silent) = ends(tls);
        breaker.watch(inlet.socket(), Shutdown::Both).unwrap();
        let memory = slot(512);
        let reading = thread::spawn(move || inlet.read(&mut [0]).unwrap_or(0));
        let writing = thread::spawn(move || {
            let runs = [Run {
                page: 0,
                pages: 512,
            }];
            // Until the peer's kernel takes no more.
            while outlet.send(&[], memory.host(), &runs).is_ok() {}
            // Nothing follows half a record.
            assert!(!tls || outlet.write_all(b"more").is_err());
        });
        thread::sleep(Duration::from_millis(300));
        assert!(
            !reading.is_finished() && !writing.is_finished(),
            "they do not block"
        );
        let begun = Instant::now();
        breaker.break_off();
        assert_eq!(reading.join().unwrap(), 0);
        writing.join().unwrap();
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    }
}

#[test]
fn a_long_frame_that_is_broken_off_does_not_wait_for_its_peer() {
    for tls in [false, true] {
        let breaker = Arc::new(Breaker::default());
        let ((_inlet, mut outlet), _silent) = ends(tls);
        let theirs = Arc::clone(&breaker);
        let writing = thread::spawn(move || {
            let written = outlet.patient(&theirs).write_all(&vec![0; 64 << 20]);
            written.unwrap_err().kind()
        });
        thread::sleep(Duration::from_millis(100));
        assert!(!writing.is_finished(), "it does not block");
        let begun = Instant::now();
        breaker.break_off();
        assert_eq!(writing.join().unwrap(), io::ErrorKind::ConnectionAborted);
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    }
}

#[test]
fn the_cipher_has_a_name_without_its_hash() {
    for (suite, name) in [
        (CipherSuite::TLS13_AES_128_GCM_SHA256, "AES_128_GCM"),
        (CipherSuite::TLS13_AES_256_GCM_SHA384, "AES_256_GCM"),
        (
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
            "CHACHA20_POLY1305",
        ),
    ] {
        assert_eq!(cipher(suite), name);
    }
}
