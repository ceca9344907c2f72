//! The source's connections while they live.

use std::{
    net::Shutdown,
    sync::{Arc, mpsc},
    time::Duration,
};

use slat_proto::ApiError;

use super::super::{
    sender::{Report, Sender, Shared},
    socket::broken_off,
    stream::{Inlet, Outlet},
    wire::{FrameReader, FrameWriter, Kind, WireError},
};

/// After a stream broke, this long for the destination's own word on why.
const LAST_WORD: Duration = Duration::from_millis(500);

/// A connection that was let in.
pub(super) struct LetIn {
    pub(super) inlet: Inlet,
    pub(super) outlet: Outlet,
    pub(super) writer: FrameWriter,
    pub(super) reader: FrameReader,
}

/// The connections of one attempt. Dropping ends the senders.
pub(super) struct Link {
    inlet: Inlet,
    outlet: Outlet,
    writer: FrameWriter,
    reader: FrameReader,
    /// A frame was cut off on the control connection: none can follow.
    cut: bool,
    /// How long the introduction of the control connection took, for a peer without Echo.
    pub(super) introduced: Option<Duration>,
    pub(super) senders: Vec<Sender>,
    pub(super) reports: mpsc::Receiver<Report>,
    pub(super) shared: Arc<Shared>,
}

impl Link {
    /// A control connection that was let in, and no data stream yet.
    pub(super) fn new(
        LetIn {
            inlet,
            outlet,
            writer,
            reader,
        }: LetIn,
        shared: Arc<Shared>,
        reports: mpsc::Receiver<Report>,
    ) -> Self {
        Self {
            inlet,
            outlet,
            writer,
            reader,
            cut: false,
            introduced: None,
            senders: Vec::new(),
            reports,
            shared,
        }
    }

    /// Sends a control frame, unless it is broken off.
    pub(super) fn send(&mut self, kind: Kind, count: u32, payload: &[u8]) -> Result<(), ApiError> {
        let breaker = &self.shared.breaker;
        if self.cut || breaker.is_broken() {
            return Err(WireError::Io(broken_off()).into());
        }
        let mut patient = self.outlet.patient(breaker);
        let sent = self.writer.send(&mut patient, kind, count, payload);
        self.cut = sent.is_err();
        Ok(sent?)
    }

    /// Says Abort, if that is still possible. Never waits long: the frame fits into the kernel's
    /// buffer or is lost, and the destination also learns it from the server.
    pub(super) fn say_abort(&mut self, payload: &[u8]) {
        if !self.cut {
            drop(self.writer.send(&mut self.outlet, Kind::Abort, 0, payload));
        }
    }

    /// Waits until there is something to read on the control connection; false when `time` has
    /// passed.
    pub(super) fn hears(&mut self, time: Duration) -> Result<bool, ApiError> {
        Ok(self.inlet.readable(time).map_err(WireError::from)?)
    }

    /// The next control frame, which must be `kind`: its count and payload.
    pub(super) fn receive(&mut self, kind: Kind) -> Result<(u32, Vec<u8>), ApiError> {
        let (header, payload) = self.reader.frame(&mut self.inlet)?;
        if header.kind != kind {
            return Err(WireError::corrupt(
                "kind",
                format!("{:?}, expected {kind:?}", header.kind),
            )
            .into());
        }
        Ok((header.count, payload))
    }

    /// When a data stream breaks, the destination may have said why on the control connection.
    pub(super) fn last_word(&mut self, error: WireError) -> ApiError {
        // If the timeout cannot be set the read ends with the connection, which is breaking.
        drop(self.inlet.socket().set_read_timeout(Some(LAST_WORD)));
        match self.reader.frame(&mut self.inlet) {
            Err(WireError::Aborted(theirs)) => theirs,
            _ => error.into(),
        }
    }

    /// Lets go of every connection; waits for the senders, which nothing holds up any more.
    pub(super) fn close(self) {
        self.shared.breaker.break_off();
        drop(self.outlet.shutdown(Shutdown::Write));
        for sender in self.senders {
            sender.join();
        }
    }
}
