//! What callers of the API do with the log: read in bounded shares, list readers, end them; and
//! what becomes of a cursor that its caller left.

use std::time::{Duration, Instant};

use bytes::Bytes;
use slat_proto::{ApiError, model::CursorName, v1};

use super::{API_CURSOR_IDLE, DirtyLog, Inner, MAX_CURSORS, reader::Reader};
use crate::memory::dirty::{
    batch::{ApiHarvest, DirtyBatch},
    cursor::Share,
};

impl DirtyLog {
    /// One call of an API reader: acknowledges `acknowledge` unless it is 0, makes the cursor when
    /// there is none, and delivers at most `share`, within slots; what is left comes with the next
    /// call.
    ///
    /// # Errors
    /// NO_SUCH_CURSOR when a batch of a cursor that is gone is acknowledged, even if there is a new
    /// one of its name; BAD_PARAMETER when it is not the last batch; LIMIT_REACHED, NO_SUCH_VM, the
    /// source's.
    pub(crate) fn read_api(
        &self,
        cursor: &CursorName,
        acknowledge: u64,
        share: Share,
    ) -> Result<ApiHarvest, ApiError> {
        let reader = Reader::Api(cursor.clone());
        let call = self.call();
        let mut inner = self.lock();
        if acknowledge != 0 {
            inner.acknowledge(&reader, acknowledge)?;
        }
        let created = self.attach_reader(&mut inner, reader.clone(), false)?;
        inner.dropped.forget(cursor);
        if !created {
            self.pull_for(&mut inner, call)?;
        }
        let order = inner.order();
        let mut retired = Vec::new();
        let found = inner.cursor(&reader)?;
        let batch = found.deliver_some(&order, share, &mut retired);
        inner.retire(retired);
        Ok(ApiHarvest {
            batch: batch.batch,
            ranges: match share {
                Share::Runs(_) => inner.frames(&batch),
                Share::Pieces { .. } => Vec::new(),
            },
            pieces: match share {
                Share::Runs(_) => Vec::new(),
                Share::Pieces { words, .. } => inner.pieces(&batch, words),
            },
            pages: batch.pages,
            created,
            more: batch.more,
        })
    }

    /// Ends an API reader.
    ///
    /// # Errors
    /// As [`DirtyLog::detach`].
    pub(crate) fn detach_api(&self, cursor: &CursorName) -> Result<(), ApiError> {
        let mut inner = self.lock();
        self.detach_reader(&mut inner, &Reader::Api(cursor.clone()))
    }

    /// Removes API cursors that were last used [`API_CURSOR_IDLE`] or longer before `now`; returns
    /// how many.
    pub(crate) fn expire_idle(&self, now: Instant) -> usize {
        let mut inner = self.lock();
        let idle: Vec<CursorName> = inner
            .cursors
            .iter()
            .filter_map(|(reader, cursor)| match reader {
                Reader::Api(name) => (now.saturating_duration_since(cursor.last_used)
                    >= API_CURSOR_IDLE)
                    .then(|| name.clone()),
                Reader::Process(_) | Reader::Measurement(_) => None,
            })
            .collect();
        let count = idle.len();
        for name in idle {
            tracing::warn!(
                cursor = name.id(),
                idle_seconds = API_CURSOR_IDLE.as_secs(),
                "removing a dirty cursor that nobody uses"
            );
            if let Err(error) = self.detach_reader(&mut inner, &Reader::Api(name.clone())) {
                tracing::error!(%error, "dirty logging stays on in a slot");
            }
            inner.dropped.note(name);
            self.note_dropped();
        }
        count
    }

    /// The readers there are. Waits for a harvest.
    pub(crate) fn list(&self, now: Instant) -> v1::ListDirtyCursorsResponse {
        let inner = self.lock();
        let pages: u64 = inner.slots.values().map(|slot| slot.pages).sum();
        let span = |duration: Duration| slat_proto::model::proto_duration(duration);
        let cursors = inner.cursors.iter().map(|(reader, cursor)| {
            let (waiting, unacknowledged) = cursor.owed();
            v1::DirtyCursor {
                name: reader.name(),
                owner: reader.owner().into(),
                batch: cursor.own_batch(),
                unacknowledged_pages: unacknowledged,
                waiting_pages: waiting,
                idle: Some(span(now.saturating_duration_since(cursor.last_used))),
                idle_limit: matches!(reader, Reader::Api(_)).then(|| span(API_CURSOR_IDLE)),
                // What is fresh and what was delivered.
                bitmap_bytes: 2 * pages.div_ceil(8),
            }
        });
        v1::ListDirtyCursorsResponse {
            cursors: cursors.collect(),
            limit: MAX_CURSORS as u32,
            dropped_idle: self.dropped(),
            uid: String::new(),
        }
    }
}

impl Inner {
    /// A batch as guest frames, ascending, adjacent ranges joined.
    fn frames(&self, batch: &DirtyBatch) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (base, bitmap) in self.by_frame(batch) {
            for (first, pages) in bitmap.runs() {
                let gfn = base + first;
                match ranges.last_mut() {
                    Some((last, len)) if *last + *len == gfn => *len += pages,
                    _ => ranges.push((gfn, pages)),
                }
            }
        }
        ranges
    }

    /// A batch as pieces of `words` words that are not all clean: the first frame of each, and its
    /// bits, the least first. All of them are parts of one buffer.
    fn pieces(&self, batch: &DirtyBatch, words: usize) -> Vec<(u64, Bytes)> {
        let order = self.by_frame(batch);
        let mut found = Vec::new();
        for (base, bitmap) in &order {
            let mut from = 0;
            while let Some((word, bits)) = bitmap.next_piece(from, words) {
                let first = word as u64 * 64;
                let bytes = (bitmap.pages() - first).div_ceil(8) as usize;
                found.push((base + first, bits, bytes.min(bits.len() * 8)));
                from = word + words;
            }
        }
        let length = found.iter().map(|(_, bits, _)| bits.len() * 8).sum();
        let mut buffer = vec![0; length];
        let mut rest = &mut *buffer;
        for (_, bits, _) in &found {
            let (piece, after) = rest.split_at_mut(bits.len() * 8);
            for (bytes, word) in piece.chunks_exact_mut(8).zip(*bits) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            rest = after;
        }
        let buffer = Bytes::from(buffer);
        let mut at = 0;
        let piece = |(gfn, bits, bytes): (u64, &[u64], usize)| {
            let piece = buffer.slice(at..at + bytes);
            at += bits.len() * 8;
            (gfn, piece)
        };
        found.into_iter().map(piece).collect()
    }
}
