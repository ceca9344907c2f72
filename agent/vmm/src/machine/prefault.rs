//! How far memory is that is populated before a VM starts.

use slat_proto::v1;

use crate::memory::Populate;

/// How far it is.
#[derive(Debug, Default)]
pub(super) enum Prefault {
    /// Nobody asked for it.
    #[default]
    Unasked,
    /// Threads are at it.
    Running { populate: Populate, total: u64 },
    /// All is there.
    Done { total: u64 },
    /// Memory was short.
    Failed {
        error: String,
        populated: u64,
        total: u64,
    },
}

impl Prefault {
    /// Takes note of what the threads have come to.
    pub(super) fn settle(&mut self) {
        let Self::Running { populate, total } = self else {
            return;
        };
        let total = *total;
        *self = match populate.percent() {
            Ok(..100) => return,
            Ok(_) => Self::Done { total },
            Err(error) => Self::Failed {
                error: error.to_string(),
                populated: populate.bytes(),
                total,
            },
        };
    }

    pub(super) fn shown(&self) -> Option<v1::Prefault> {
        let (populated_bytes, total_bytes, done, error) = match self {
            Self::Unasked => return None,
            Self::Running { populate, total } => (populate.bytes(), *total, false, String::new()),
            Self::Done { total } => (*total, *total, true, String::new()),
            Self::Failed {
                error,
                populated,
                total,
            } => (*populated, *total, false, error.clone()),
        };
        Some(v1::Prefault {
            populated_bytes,
            total_bytes,
            done,
            error,
        })
    }
}
