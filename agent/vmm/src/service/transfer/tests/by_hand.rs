//! A source played frame by frame: what the destination makes of each, and of silence.

use super::*;

struct ByHand {
    control: (Both, FrameWriter, FrameReader),
    data: (Both, FrameWriter),
}

fn introduce(
    prepared: &v1::PrepareIncomingResponse,
    role: StreamRole,
) -> (Both, FrameWriter, FrameReader) {
    try_introduce(prepared, role).unwrap()
}

fn try_introduce(
    prepared: &v1::PrepareIncomingResponse,
    role: StreamRole,
) -> Result<(Both, FrameWriter, FrameReader), WireError> {
    let channel = server::source_channel(prepared, &server::SOURCE);
    let (mut both, shows) = server::open(prepared, &channel, role)?;
    let (writer, reader) = server::hello(&mut both, shows, role)?;
    Ok((both, writer, reader))
}

impl ByHand {
    fn connect(prepared: &v1::PrepareIncomingResponse) -> Self {
        let control = introduce(prepared, StreamRole::Control);
        let (stream, writer, _) = introduce(prepared, StreamRole::Data(0));
        Self {
            control,
            data: (stream, writer),
        }
    }

    fn control(&mut self, kind: Kind, payload: &[u8]) {
        self.control
            .1
            .send(&mut self.control.0, kind, 0, payload)
            .unwrap();
    }

    fn zero(&mut self, slot: u32, run: Run) {
        let mut payload = Vec::new();
        encode_runs(&[run], &mut payload);
        let mut frame = self
            .data
            .1
            .header(Kind::Zero, slot, 1, payload.len() as u32)
            .to_vec();
        frame.extend_from_slice(&payload);
        std::io::Write::write_all(&mut self.data.0, &frame).unwrap();
    }

    /// Everything up to READY.
    fn until_ready(&mut self, vm: &FakeVm) {
        let table = vm.machine.memory().table();
        self.control(Kind::SlotTable, &encode_slots(&table));
        // As a real source: a state that comes before the memory is there is refused.
        while self.frame() != (Kind::Populated, 100) {}
        self.zero(
            0,
            Run {
                page: 0,
                pages: table.pages() as u32,
            },
        );
        self.data
            .1
            .send(&mut self.data.0, Kind::IterEnd, 0, &[])
            .unwrap();
        assert_eq!(self.answer(), Kind::IterAck);
        let state = VmState {
            left: Switchover {
                run: true,
                never_ran: false,
            },
            digest: None,
            generation: 1,
            vcpus: b"fake vCPUs".to_vec(),
        };
        self.control(Kind::State, &state.encode());
        assert_eq!(self.answer(), Kind::Ready);
    }

    /// The next frame that is not about populating.
    fn answer(&mut self) -> Kind {
        loop {
            let (kind, _) = self.frame();
            if kind != Kind::Populated {
                return kind;
            }
        }
    }

    /// The next frame's kind and count.
    fn frame(&mut self) -> (Kind, u32) {
        let (header, _) = self.control.2.frame(&mut self.control.0).unwrap();
        (header.kind, header.count)
    }
}

async fn resolve(to: &TransferEndpoint, decision: v1::resolve_transfer_request::Decision) {
    use slat_trust::grant::Purpose;
    let purpose = match decision {
        v1::resolve_transfer_request::Decision::Commit => Purpose::Commit,
        _ => Purpose::Abort,
    };
    let leave = server::grant(purpose, "m1", (&to.uid(), 1), ("a", "a"));
    let request = v1::ResolveTransferRequest {
        migration: "m1".into(),
        decision: decision.into(),
        grant: Some(server::signed(&leave)),
        grant_keys: server::keys(),
        ..Default::default()
    };
    api(to)
        .resolve_transfer(Request::new(request))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_after_ready_is_doubt_until_somebody_knows() {
    use v1::resolve_transfer_request::Decision;
    for decision in [Decision::Commit, Decision::Abort] {
        let (source, destination) = (running(), fake::empty());
        let to = endpoint(&destination);
        let prepared = prepare(&source, &to, &one_stream()).await;
        let mut by_hand = ByHand::connect(&prepared);
        by_hand.until_ready(&source);
        wait(&to, TransferRole::Destination, |transfer| {
            transfer.phase() == TransferPhase::Ready
        })
        .await;
        let cancel = v1::CancelTransferRequest {
            migration: "m1".into(),
            role: TransferRole::Destination.into(),
            error: None,
        };
        let refused = api(&to)
            .cancel_transfer(Request::new(cancel))
            .await
            .unwrap_err();
        assert_eq!(
            slat_proto::ApiError::from(refused).reason,
            Reason::PastPointOfNoReturn
        );
        drop(by_hand);
        // Longer than the destination asks around: it must not decide by itself.
        let waited = tokio::time::timeout(
            Duration::from_millis(1500),
            ended(&to, TransferRole::Destination),
        );
        assert!(waited.await.is_err(), "a timer decided");
        assert_eq!(
            ownership(&destination),
            Ownership::Prepared {
                migration: "m1".into(),
                epoch: 2
            }
        );
        assert!(destination.machine.resume().is_err());
        resolve(&to, decision).await;
        let there = ended(&to, TransferRole::Destination).await;
        if decision == Decision::Commit {
            assert_eq!(there.phase(), TransferPhase::Completed);
            assert_eq!(ownership(&destination), Ownership::Owner { epoch: 2 });
            assert_eq!(state(&destination), v1::vm::State::Running);
        } else {
            assert_eq!(there.phase(), TransferPhase::Failed);
            assert!(matches!(ownership(&destination), Ownership::Aborted { .. }));
            assert!(destination.machine.resume().is_err());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_commit_after_ready_is_as_good_as_silence() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let prepared = prepare(&source, &to, &one_stream()).await;
    let mut by_hand = ByHand::connect(&prepared);
    by_hand.until_ready(&source);
    by_hand.control(Kind::State, &[7; 4096]);
    // Not read any more: as if it had not been said.
    by_hand.control(Kind::Commit, &[]);
    let waited = tokio::time::timeout(
        Duration::from_millis(500),
        ended(&to, TransferRole::Destination),
    );
    assert!(waited.await.is_err());
    resolve(&to, v1::resolve_transfer_request::Decision::Abort).await;
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Failed);
    assert_eq!(destination.backend.state().runs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_state_nobody_writes_the_memory() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let prepared = prepare(&source, &to, &one_stream()).await;
    let mut by_hand = ByHand::connect(&prepared);
    by_hand.until_ready(&source);
    // READY was said for the memory as it was checked.
    let table = destination.machine.memory().table();
    assert!(table.write(0, b"checked"));
    let mut payload = Vec::new();
    encode_runs(&[Run { page: 0, pages: 1 }], &mut payload);
    let (stream, writer) = &mut by_hand.data;
    let mut late = writer
        .header(Kind::Zero, 0, 1, payload.len() as u32)
        .to_vec();
    late.extend_from_slice(&payload);
    late.extend_from_slice(&writer.header(Kind::IterEnd, 0, 1, 0));
    // Refused at once, or lost in the kernel: there is nobody left to read it.
    drop(std::io::Write::write_all(stream, &late));
    let mut byte = [0];
    assert!(
        matches!(stream.read(&mut byte), Ok(0) | Err(_)),
        "the stream is still open"
    );
    by_hand.control(Kind::Commit, &[]);
    ended(&to, TransferRole::Destination).await;
    let mut memory = [0; 7];
    assert!(table.read(0, &mut memory));
    assert_eq!(&memory, b"checked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_at_the_port_does_not_stop_the_clock() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let prepared = prepare(&source, &to, &one_stream()).await;
    let mut by_hand = ByHand::connect(&prepared);
    by_hand.until_ready(&source);
    // OWNED cannot be written yet: it is tried again from time to time.
    destination.disk.set_broken(true);
    by_hand.control(Kind::Commit, &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let crowd = {
        let (stop, prepared) = (Arc::clone(&stop), prepared.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                // Turned away, and once the side has ended nobody listens.
                drop(try_introduce(&prepared, StreamRole::Data(0)));
                std::thread::sleep(Duration::from_millis(20));
            }
        })
    };
    while destination.disk.failures() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    destination.disk.set_broken(false);
    let there = tokio::time::timeout(
        Duration::from_secs(5),
        ended(&to, TransferRole::Destination),
    )
    .await;
    stop.store(true, Ordering::SeqCst);
    crowd.join().unwrap();
    assert_eq!(there.expect("in time").phase(), TransferPhase::Completed);
    assert_eq!(ownership(&destination), Ownership::Owner { epoch: 2 });
}

#[tokio::test(flavor = "multi_thread")]
async fn state_during_an_iteration_is_refused() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let params = MigrationParams {
        streams: 2,
        ..MigrationParams::default()
    };
    let prepared = prepare(&source, &to, &params).await;
    let mut by_hand = ByHand::connect(&prepared);
    let (_second, ..) = introduce(&prepared, StreamRole::Data(1));
    let table = source.machine.memory().table();
    by_hand.control(Kind::SlotTable, &encode_slots(&table));
    wait(&to, TransferRole::Destination, |transfer| {
        transfer.phase() == TransferPhase::Precopy
    })
    .await;
    let (stream, writer) = &mut by_hand.data;
    let pages = table.pages() as u32;
    let mut payload = Vec::new();
    encode_runs(&[Run { page: 0, pages }], &mut payload);
    let mut frames = writer
        .header(Kind::Zero, 0, 1, payload.len() as u32)
        .to_vec();
    frames.extend_from_slice(&payload);
    frames.extend_from_slice(&writer.header(Kind::IterEnd, 0, 0, 0));
    std::io::Write::write_all(stream, &frames).unwrap();
    wait(&to, TransferRole::Destination, |transfer| {
        transfer.progress.as_ref().unwrap().pages_zero >= u64::from(pages)
    })
    .await;
    by_hand.control(Kind::State, &[0; 8]);
    let there = ended(&to, TransferRole::Destination).await;
    let error = there.error.unwrap();
    assert_eq!(error.reason, "STREAM_CORRUPT");
    assert!(error.message.contains("during"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_before_ready_and_decisions_before_ready_do_nothing_good() {
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let prepared = prepare(&source, &to, &one_stream()).await;
    let mut by_hand = ByHand::connect(&prepared);
    by_hand.control(
        Kind::SlotTable,
        &encode_slots(&source.machine.memory().table()),
    );
    resolve(&to, v1::resolve_transfer_request::Decision::Commit).await;
    by_hand.control(Kind::Commit, &[]);
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Failed);
    assert_eq!(there.error.unwrap().reason, "STREAM_CORRUPT");
    assert!(matches!(ownership(&destination), Ownership::Aborted { .. }));
    assert_eq!(destination.backend.state().runs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_frame_ends_the_side_with_its_reason() {
    type Bad = fn(&mut ByHand, u64);
    let cases: [(&str, Bad); 7] = [
        ("PAGE_OUT_OF_SLOT", |by_hand, pages| {
            by_hand.zero(
                0,
                Run {
                    page: pages as u32,
                    pages: 1,
                },
            )
        }),
        ("PAGE_OUT_OF_SLOT", |by_hand, _| {
            by_hand.zero(9, Run { page: 0, pages: 1 })
        }),
        ("PAGE_OUT_OF_SLOT", |by_hand, _| {
            by_hand.zero(
                0,
                Run {
                    page: u32::MAX,
                    pages: u32::MAX,
                },
            )
        }),
        ("STREAM_CORRUPT", |by_hand, _| {
            by_hand
                .data
                .1
                .send(&mut by_hand.data.0, Kind::IterEnd, 7, &[])
                .unwrap();
        }),
        ("STREAM_CORRUPT", |by_hand, _| {
            by_hand
                .data
                .1
                .send(&mut by_hand.data.0, Kind::State, 0, &[0; 8])
                .unwrap();
        }),
        ("STREAM_CORRUPT", |by_hand, _| {
            std::io::Write::write_all(&mut by_hand.data.0, &[b'X'; HEADER]).unwrap();
        }),
        ("CONNECTION_LOST", |by_hand, _| {
            by_hand.data.0.1.shutdown(std::net::Shutdown::Both).unwrap();
        }),
    ];
    for (reason, bad) in cases {
        let (source, destination) = (running(), fake::empty());
        let to = endpoint(&destination);
        let prepared = prepare(&source, &to, &one_stream()).await;
        let mut by_hand = ByHand::connect(&prepared);
        let table = source.machine.memory().table();
        by_hand.control(Kind::SlotTable, &encode_slots(&table));
        bad(&mut by_hand, table.pages());
        let there = ended(&to, TransferRole::Destination).await;
        assert_eq!(there.phase(), TransferPhase::Failed);
        assert_eq!(there.error.unwrap().reason, reason);
        assert!(matches!(ownership(&destination), Ownership::Aborted { .. }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_without_the_ticket_cannot_disturb() {
    for clear in [false, true] {
        knock_and_migrate(clear).await;
    }
}

async fn knock_and_migrate(clear: bool) {
    let (source, destination) = (running(), fake::empty());
    let from = endpoint(&source).in_the_clear(clear);
    let to = endpoint(&destination).in_the_clear(clear);
    let params = MigrationParams {
        max_bandwidth: Some(16 << 20),
        ..MigrationParams::default()
    };
    let prepared = prepare(&source, &to, &params).await;
    let mut silent = Vec::new();
    let mut knock = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(&prepared.data_address).unwrap();
        std::io::Write::write_all(&mut stream, bytes).unwrap();
        silent.push(stream);
    };
    let wrong = Hello {
        shows: [0; TICKET],
        role: StreamRole::Control,
    }
    .encode();
    let mut hello = Vec::new();
    FrameWriter::new(3, 1)
        .send(&mut hello, Kind::Hello, 0, &wrong)
        .unwrap();
    knock(b"GET / HTTP/1.1\r\n\r\n");
    knock(&hello);
    knock(&[0xff; 4096]);
    start(&from, &prepared, &params).await;
    for _ in 0..40 {
        knock(&hello[..10]);
        knock(b"");
    }
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(here.phase(), TransferPhase::Completed, "{here:?}");
    // Closed: without a word in the clear, with one that TLS has for it otherwise.
    silent[1].set_read_timeout(Some(PATIENCE)).unwrap();
    let mut word = Vec::new();
    if silent[1].read_to_end(&mut word).is_ok() {
        assert!(word.len() < if clear { 1 } else { 16 }, "{word:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_whose_commit_is_unanswered_stays_stopped_until_released() {
    let (source, destination) = (running(), fake::empty());
    let (from, to) = (endpoint(&source), endpoint(&destination));
    let params = one_stream();
    let prepared = prepare(&source, &to, &params).await;
    // The destination journals OWNED and then its VM's vCPUs do not start: owned all the same.
    destination.backend.state().fail.push("run");
    start(&from, &prepared, &params).await;
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Completed);
    assert_eq!(ownership(&destination), Ownership::Owner { epoch: 2 });
    assert_eq!(state(&destination), v1::vm::State::Paused);
    assert_eq!(there.error.unwrap().reason, "KVM_IOCTL");
    let here = ended(&from, TransferRole::Source).await;
    assert_eq!(here.phase(), TransferPhase::Completed);
    assert!(
        here.progress.unwrap().downtime.is_none(),
        "it is still down"
    );
    assert!(source.machine.resume().is_err());
    let release = v1::ReleaseTransferRequest {
        migration: "m1".into(),
        role: TransferRole::Source.into(),
    };
    api(&from)
        .release_transfer(Request::new(release))
        .await
        .unwrap();
    assert_eq!(ownership(&source), Ownership::Ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_ready_the_end_of_the_grant_means_nothing() {
    use super::super::tests_expiry::{LASTS, short};
    let (source, destination) = (running(), fake::empty());
    let to = endpoint(&destination);
    let preamble = preamble::describe(BackendKind::Software, Vec::new());
    let leave = server::receive(&source.machine.uid().unwrap(), v1::PageChannel::Tls);
    let request = v1::PrepareIncomingRequest {
        grant: Some(short(leave)),
        ..prepare_request(&source, &to, &one_stream(), preamble)
    };
    let answer = api(&to).prepare_incoming(Request::new(request)).await;
    let mut by_hand = ByHand::connect(&answer.unwrap().into_inner());
    by_hand.until_ready(&source);
    let waited = tokio::time::timeout(
        LASTS + Duration::from_secs(1),
        ended(&to, TransferRole::Destination),
    );
    assert!(waited.await.is_err(), "a clock decided");
    by_hand.control(Kind::Commit, &[]);
    let there = ended(&to, TransferRole::Destination).await;
    assert_eq!(there.phase(), TransferPhase::Completed);
}
