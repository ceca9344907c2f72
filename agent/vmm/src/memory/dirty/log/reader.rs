//! Who reads: the process itself, a caller of the API, a measurement. Each kind has names and a
//! limit of its own.

use std::{collections::VecDeque, time::Duration};

use slat_proto::{ApiError, Reason, model::CursorName, v1::dirty_cursor::Owner};

/// Most cursors of the process, and most cursors of API callers.
pub(super) const MAX_CURSORS: usize = 16;
/// An API cursor that was not used for this long is removed.
pub(super) const API_CURSOR_IDLE: Duration = Duration::from_secs(600);

/// Most measurements at once.
pub(super) const MAX_MEASUREMENTS: usize = 4;
/// Names of cursors that were removed for idleness, kept so that their readers are told.
const DROPPED: usize = 64;

/// Whose cursor.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reader {
    Process(CursorName),
    Api(CursorName),
    Measurement(u64),
}

impl Reader {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Process(name) | Self::Api(name) => name.id().to_owned(),
            Self::Measurement(number) => format!("measurement-{number}"),
        }
    }

    pub(super) fn owner(&self) -> Owner {
        match self {
            Self::Process(_) => Owner::Process,
            Self::Api(_) => Owner::Caller,
            Self::Measurement(_) => Owner::Measurement,
        }
    }

    /// Most readers of its kind.
    pub(super) fn limit(&self) -> usize {
        match self {
            Self::Process(_) | Self::Api(_) => MAX_CURSORS,
            Self::Measurement(_) => MAX_MEASUREMENTS,
        }
    }
}

/// The names of cursors that were removed for idleness, newest last.
#[derive(Debug, Default)]
pub(super) struct Dropped(VecDeque<CursorName>);

impl Dropped {
    pub(super) fn note(&mut self, name: CursorName) {
        self.forget(&name);
        if self.0.len() == DROPPED {
            self.0.pop_front();
        }
        self.0.push_back(name);
    }

    /// There is a new one of that name.
    pub(super) fn forget(&mut self, name: &CursorName) {
        self.0.retain(|other| other != name);
    }

    /// What the reader of a cursor that is not there, or not any more, is told.
    pub(super) fn no_such_cursor(&self, reader: &Reader) -> ApiError {
        let name = reader.name();
        let dropped = matches!(reader, Reader::Api(name) if self.0.contains(name));
        let error = ApiError::new(
            Reason::NoSuchCursor,
            if dropped {
                format!("the dirty cursor \"{name}\" was removed: nobody used it for 10 minutes")
            } else {
                format!("no dirty cursor \"{name}\"")
            },
        )
        .with("cursor", name)
        .with(
            "advice",
            "it was deleted, unused for 10 minutes, or left behind when the VM was migrated: harvest without acknowledging to begin anew, and copy everything",
        );
        if dropped {
            error
                .with("dropped", "IDLE")
                .with("idle_seconds", API_CURSOR_IDLE.as_secs())
        } else {
            error
        }
    }
}
