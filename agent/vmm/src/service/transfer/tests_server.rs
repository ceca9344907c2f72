//! What a server does for both sides, for tests: it signs grants. And what page streams need that
//! are made by hand.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::{Arc, LazyLock},
    time::{Duration, Instant, SystemTime},
};

use slat_proto::{
    model::{MigrationName, key_message},
    v1,
};
use slat_trust::{
    channel::ChannelKey,
    grant::{Grant, GrantKey, Party, Purpose, Signer},
};

use super::{TransferEndpoint, tests::name};
use crate::{
    handover::leave::{Leave, Step},
    migration::{
        channel::{Channel, Kernel},
        stream::{Inlet, Outlet},
        wire::{FrameReader, FrameWriter, Hello, Kind, StreamRole, TICKET, WireError},
    },
};

const HOUR: Duration = Duration::from_secs(3600);

/// The server's key.
pub(super) static SIGNER: LazyLock<Signer> = LazyLock::new(|| Signer::generate().unwrap());
/// The key of every source in these tests, and of destinations that are made by hand.
pub(super) static SOURCE: LazyLock<Arc<ChannelKey>> = LazyLock::new(key);
pub(super) static DESTINATION: LazyLock<Arc<ChannelKey>> = LazyLock::new(key);

pub(super) fn key() -> Arc<ChannelKey> {
    Arc::new(ChannelKey::generate("u", "m1", HOUR).unwrap())
}

/// The public half, as agents give it on, in force from an hour ago for two.
pub(super) fn public(signer: &Signer) -> v1::GrantKey {
    let now = SystemTime::now();
    key_message(&GrantKey {
        public_key: signer.public_key(),
        not_before: now - HOUR,
        not_after: now + HOUR,
    })
}

pub(super) fn keys() -> Vec<v1::GrantKey> {
    vec![public(&SIGNER)]
}

pub(super) fn signed(grant: &Grant) -> v1::SignedGrant {
    (&SIGNER.sign(grant).unwrap()).into()
}

/// A grant for a migration from one host to another, which lasts.
pub(super) fn grant(
    purpose: Purpose,
    migration: &str,
    (uid, epoch): (&str, u64),
    (source, destination): (&str, &str),
) -> Grant {
    let party = |host: &str| Party {
        host: host.to_owned(),
        incarnation: "1".to_owned(),
    };
    let parties = (party(source), party(destination));
    let now = SystemTime::now();
    Grant::new(purpose, migration, (uid, epoch), parties, now, HOUR).unwrap()
}

/// Leave to receive a VM of [`super::tests::endpoint`]'s at another such host.
pub(super) fn receive(uid: &str, channel: v1::PageChannel) -> Grant {
    let mut grant = grant(Purpose::Receive, "m1", (uid, 1), ("a", "a"));
    if channel == v1::PageChannel::Tls {
        grant.source_key = SOURCE.fingerprint();
    }
    grant
}

/// Leave to send it there.
pub(super) fn send(uid: &str, prepared: &v1::PrepareIncomingResponse) -> Grant {
    let mut grant = grant(Purpose::Send, "m1", (uid, 1), ("a", "a"));
    if prepared.channel() == v1::PageChannel::Tls {
        grant.source_key = SOURCE.fingerprint();
        grant.destination_key = prepared.channel_key.as_slice().try_into().unwrap();
    }
    grant
}

/// What the endpoint's DescribeOutgoing has done: it has a key for the migration.
pub(super) fn describe(from: &TransferEndpoint, migration: &MigrationName) {
    from.sides().keys.keep(migration, Arc::clone(&SOURCE));
}

/// What both ends of the migration `m1` are bound to.
pub(super) fn binding(uid: &str, destination: [u8; 32]) -> [u8; 32] {
    let (migration, host) = (name(), slat_proto::model::HostName::parse("a").unwrap());
    let step = Step {
        purpose: Purpose::Receive,
        migration: &migration,
        vm_uid: uid,
        epoch: 1,
        host: &host,
    };
    let grant = signed(&receive(uid, v1::PageChannel::Tls));
    let leave = Leave::check(Some(&grant), &keys(), &step, SystemTime::now()).unwrap();
    leave.binding(SOURCE.fingerprint(), destination).unwrap()
}

/// Both halves of a connection.
#[derive(Debug)]
pub(super) struct Both(pub(super) Inlet, pub(super) Outlet);

impl Read for Both {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Both {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The source's end of what was prepared, with `key`.
pub(super) fn source_channel(prepared: &v1::PrepareIncomingResponse, key: &ChannelKey) -> Channel {
    let ticket: [u8; TICKET] = prepared.ticket.as_slice().try_into().unwrap();
    if prepared.channel() != v1::PageChannel::Tls {
        return Channel::plain(ticket);
    }
    let peer = prepared.channel_key.as_slice().try_into().unwrap();
    let uid = &prepared.transfer.as_ref().unwrap().vm_uid;
    Channel::source(ticket, key, peer, binding(uid, peer)).unwrap()
}

/// A connection that is open, with what it would show.
pub(super) fn open(
    prepared: &v1::PrepareIncomingResponse,
    channel: &Channel,
    role: StreamRole,
) -> Result<(Both, [u8; TICKET]), WireError> {
    let patience = super::tests::PATIENCE;
    let socket = TcpStream::connect(&prepared.data_address)?;
    let mut kernel = Kernel::Not(String::new());
    let opened = channel.open(socket, role, &mut kernel, Instant::now() + patience)?;
    opened.inlet.socket().set_read_timeout(Some(patience))?;
    Ok((Both(opened.inlet, opened.outlet), opened.shows))
}

/// Says Hello and waits for the answer.
pub(super) fn hello(
    both: &mut Both,
    shows: [u8; TICKET],
    role: StreamRole,
) -> Result<(FrameWriter, FrameReader), WireError> {
    let (mut writer, mut reader) = (FrameWriter::new(3, 1), FrameReader::new(3, 1));
    writer.send(both, Kind::Hello, 0, &Hello { shows, role }.encode())?;
    let (header, _) = reader.frame(both)?;
    assert_eq!(header.kind, Kind::HelloAck);
    Ok((writer, reader))
}
