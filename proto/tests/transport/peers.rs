//! Peers that go away, in every moment of a call.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    transport::{Address, connect},
    v1::{self, host_service_client::HostServiceClient, vm_service_client::VmServiceClient},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

use crate::rig::LONG;

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// `:status 200`, `content-type: application/grpc`, as HPACK literals.
fn headers() -> Vec<u8> {
    let mut block = vec![0x88, 0x0f, 0x10, 16];
    block.extend(b"application/grpc");
    frame(1, 4, 1, &block)
}

/// How a peer leaves, after a call has reached it.
#[derive(Clone, Copy, Debug)]
enum Leaving {
    /// Before a byte was said.
    AtOnce,
    /// The connection closed, the call unanswered.
    InCall,
    /// GOAWAY, then closed.
    GoAway,
    /// The stream reset.
    Reset,
    /// The answer's headers said, nothing more.
    InAnswer,
}

async fn leave(mut stream: TcpStream, how: Leaving) {
    if matches!(how, Leaving::AtOnce) {
        return;
    }
    let mut bytes = vec![0; 1 << 16];
    let mut all: Vec<u8> = Vec::new();
    stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    // Until the call's headers are there: its path is not compressed away.
    while !all.windows(4).any(|four| four == [1, 4, 0, 0]) {
        let read = timeout(LONG, stream.read(&mut bytes)).await.unwrap();
        match read {
            Ok(0) | Err(_) => return,
            Ok(read) => all.extend(&bytes[..read]),
        }
    }
    let said = match how {
        Leaving::AtOnce | Leaving::InCall => Vec::new(),
        Leaving::GoAway => frame(7, 0, 0, &[0; 8]),
        Leaving::Reset => frame(3, 0, 1, &[0, 0, 0, 2]),
        Leaving::InAnswer => headers(),
    };
    stream.write_all(&said).await.unwrap();
    if matches!(how, Leaving::Reset) {
        // The stream is reset, the connection stands until the other end is done.
        while matches!(stream.read(&mut bytes).await, Ok(1..)) {}
    }
}

/// A peer that leaves so, and how many calls it was asked.
async fn leaving(how: Leaving) -> (Address, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string().parse().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(leave(stream, how));
        }
    });
    (address, asked)
}

fn is_of_the_peer(error: &ApiError, address: &Address) {
    assert_eq!(error.reason, Reason::PeerUnreachable, "{error}");
    assert_eq!(error.metadata["address"], address.to_string());
    assert!(!error.metadata["advice"].is_empty());
    assert!(!error.message.contains("transport error"), "{error}");
    assert!(
        error
            .message
            .starts_with(&format!("{address} does not answer: ")),
        "{error}"
    );
}

#[tokio::test]
async fn a_peer_that_leaves_in_mid_call_is_unreachable_and_named() {
    for how in [
        Leaving::AtOnce,
        Leaving::InCall,
        Leaving::GoAway,
        Leaving::Reset,
        Leaving::InAnswer,
    ] {
        let (address, asked) = leaving(how).await;
        let mut vms = VmServiceClient::new(connect(&address).unwrap());
        let answer = timeout(LONG, vms.delete_vm(v1::DeleteVmRequest::default())).await;
        let error = ApiError::from(answer.unwrap().unwrap_err());
        is_of_the_peer(&error, &address);
        // What may have had its effect is not done twice.
        assert_eq!(asked.load(Ordering::SeqCst), 1, "{how:?}");
    }
}

#[tokio::test]
async fn a_read_is_asked_again_and_no_more_than_the_table_says() {
    let (address, asked) = leaving(Leaving::InCall).await;
    let mut vms = VmServiceClient::new(connect(&address).unwrap());
    let answer = timeout(LONG, vms.get_vm(v1::GetVmRequest::default())).await;
    is_of_the_peer(&answer.unwrap().unwrap_err().into(), &address);
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_stream_that_breaks_off_ends_with_the_peers_name() {
    let (address, _) = leaving(Leaving::InAnswer).await;
    let mut vms = VmServiceClient::new(connect(&address).unwrap());
    let request = v1::WatchVmRequest::default();
    let mut stream = vms.watch_vm(request).await.unwrap().into_inner();
    let ended = timeout(LONG, stream.message()).await.unwrap();
    is_of_the_peer(&ended.unwrap_err().into(), &address);
}

#[tokio::test]
async fn nobody_at_an_address_is_unreachable_and_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: Address = listener.local_addr().unwrap().to_string().parse().unwrap();
    drop(listener);
    let mut hosts = HostServiceClient::new(connect(&address).unwrap());
    let error = hosts.list_hosts(v1::ListHostsRequest::default()).await;
    is_of_the_peer(&error.unwrap_err().into(), &address);
    let socket: Address = "unix:/nowhere/at/all.sock".parse().unwrap();
    let mut hosts = HostServiceClient::new(connect(&socket).unwrap());
    let error = hosts.list_hosts(v1::ListHostsRequest::default()).await;
    is_of_the_peer(&error.unwrap_err().into(), &socket);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_answers_is_given_up_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: Address = listener.local_addr().unwrap().to_string().parse().unwrap();
    let mut vms = VmServiceClient::new(connect(&address).unwrap());
    let begun = Instant::now();
    let error = vms.start_vm(v1::StartVmRequest::default()).await;
    assert_eq!(
        ApiError::from(error.unwrap_err()).reason,
        Reason::PeerUnreachable
    );
    // Its deadline, or the ping that it does not answer, whichever comes first.
    assert!(
        begun.elapsed() <= Duration::from_secs(16),
        "{:?}",
        begun.elapsed()
    );
}
