//! Dirty pages, as a named reader sees them: one batch, or batch after batch.

use std::time::Duration;

use slat_proto::{
    json::to_json,
    model::{CursorName, PAGE_SIZE},
    v1,
};

use super::super::target::VmTarget;
use crate::{
    client::Session,
    daemon::stop::Stop,
    failure::Failure,
    output,
    term::{
        out,
        units::{Size, Span},
    },
};

/// How pages are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum FormatChoice {
    /// First frame and number
    #[default]
    Ranges,
    /// One bit a page, in pieces
    Bitmap,
}

impl FormatChoice {
    fn to_message(self) -> v1::DirtyFormat {
        match self {
            Self::Ranges => v1::DirtyFormat::Ranges,
            Self::Bitmap => v1::DirtyFormat::Bitmap,
        }
    }
}

/// Options of `slat memory dirty`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct DirtyArgs {
    #[command(flatten)]
    vm: VmTarget,
    /// Name of the reader, as backup
    #[arg(long, default_value = "default", value_name = "NAME")]
    cursor: CursorName,
    /// Acknowledge this batch, as 7; what is not acknowledged is delivered again
    #[arg(long, value_name = "BATCH", conflicts_with_all = ["watch", "stop"])]
    ack: Option<u64>,
    /// Go on, and acknowledge each batch after it is printed
    #[arg(short, long, conflicts_with = "stop")]
    pub(super) watch: bool,
    /// With --watch: how often to look, as 250ms
    #[arg(long, default_value = "1s", value_name = "DURATION")]
    interval: Span,
    /// Answer with a bitmap in place of ranges: shorter where writes are scattered
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: FormatChoice,
    /// End the reader; dirty logging goes off with the last one
    #[arg(long)]
    pub(super) stop: bool,
}

async fn harvest(
    session: &Session,
    args: &DirtyArgs,
    acknowledge_batch: u64,
) -> Result<v1::HarvestDirtyPagesResponse, Failure> {
    let request = v1::HarvestDirtyPagesRequest {
        vm: args.vm.name(),
        cursor: args.cursor.id().to_owned(),
        acknowledge_batch,
        format: args.format.to_message().into(),
        max_items: 0,
        uid: args.vm.uid(),
        host: args.vm.host(),
    };
    let answer = session.client.memory().harvest_dirty_pages(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| Failure::call(format!("harvest dirty pages of {}", args.vm), status))
}

/// Ends the reader.
pub(super) async fn stop(session: &Session, args: &DirtyArgs) -> Result<(), Failure> {
    let request = v1::DeleteDirtyCursorRequest {
        vm: args.vm.name(),
        cursor: args.cursor.id().to_owned(),
        uid: args.vm.uid(),
        host: args.vm.host(),
    };
    let doing = || format!("end the reader {} of {}", args.cursor.id(), args.vm);
    session
        .client
        .memory()
        .delete_dirty_cursor(request)
        .await
        .map_err(|status| Failure::call(doing(), status))?;
    out::say(format!(
        "the reader {} of {} has ended",
        args.cursor.id(),
        args.vm
    ));
    Ok(())
}

fn batch_text(batch: &v1::HarvestDirtyPagesResponse) -> String {
    let (what, number) = if batch.bitmaps.is_empty() {
        ("ranges", batch.ranges.len())
    } else {
        ("pieces of bitmap", batch.bitmaps.len())
    };
    let mut text = format!(
        "batch {}: {} dirty pages ({}) in {number} {what}",
        batch.batch,
        batch.dirty_pages,
        Size(batch.dirty_pages.saturating_mul(PAGE_SIZE)),
    );
    if batch.more {
        text.push_str("; more with the next batch");
    }
    for range in &batch.ranges {
        let base = u128::from(range.gfn) * u128::from(PAGE_SIZE);
        text.push_str(&format!("\n  {base:#014x}  {} pages", range.pages));
    }
    for piece in &batch.bitmaps {
        let base = u128::from(piece.gfn) * u128::from(PAGE_SIZE);
        let dirty: u32 = piece.bits.iter().map(|byte| byte.count_ones()).sum();
        let of = piece.bits.len() * 8;
        text.push_str(&format!("\n  {base:#014x}  {dirty} of {of} pages"));
    }
    text
}

/// Shows one batch.
pub(super) async fn once(session: &Session, args: &DirtyArgs) -> Result<(), Failure> {
    let batch = harvest(session, args, args.ack.unwrap_or(0)).await?;
    session.answer(|| to_json(&batch), &args.vm.name(), || batch_text(&batch))?;
    if batch.created {
        out::say(format!(
            "the reader {cursor} is new: it sees what is written from now on, and dirty logging stays on until\n  \
             slat memory dirty {vm} --cursor {cursor} --stop",
            cursor = args.cursor.id(),
            vm = args.vm.typed(),
        ));
    }
    Ok(())
}

/// Shows batch after batch.
pub(super) async fn watch(session: &Session, args: &DirtyArgs) -> Result<(), Failure> {
    let mut signals = Stop::listen()?;
    let mut created = false;
    let watched = tokio::select! {
        watched = watch_loop(session, args, &mut created) => watched,
        _ = signals.wait() => Ok(()),
    };
    if created {
        let ended = stop(session, args).await;
        watched.and(ended)
    } else {
        watched
    }
}

async fn watch_loop(
    session: &Session,
    args: &DirtyArgs,
    created: &mut bool,
) -> Result<(), Failure> {
    let mut acknowledged = 0;
    let pause = args.interval.0.max(Duration::from_millis(1));
    loop {
        let batch = harvest(session, args, acknowledged).await?;
        *created |= batch.created;
        if session.output.is_for_programs() {
            output::element(session.output, &to_json(&batch))?;
        } else if !batch.created {
            out::line(batch_text(&batch))?;
        }
        acknowledged = batch.batch;
        if !batch.more {
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_names_its_ranges() {
        let batch = v1::HarvestDirtyPagesResponse {
            batch: 7,
            dirty_pages: 3,
            ranges: vec![v1::GfnRange {
                gfn: 0x200,
                pages: 3,
            }],
            ..Default::default()
        };
        assert_eq!(
            batch_text(&batch),
            "batch 7: 3 dirty pages (12 KiB) in 1 ranges\n  0x000000200000  3 pages"
        );
    }
}
