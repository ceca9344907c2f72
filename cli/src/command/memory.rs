//! `slat memory`: a VM's slots, dirty pages, mappings and digest.
//!
//! `dirty` reads as a named cursor; every cursor sees every dirty page. One call shows a batch and
//! leaves it unacknowledged unless `--ack` names it, so nothing is lost with a broken pipe;
//! `--watch` acknowledges each batch after printing it. A cursor keeps dirty logging on: a watch
//! that made its cursor takes it away again when it ends.

use std::time::Duration;

use slat_proto::{
    json::to_json,
    model::{CursorName, PAGE_SIZE, VmName},
    transport::Address,
    v1,
};

use crate::{
    client::{ClientArgs, Session},
    daemon::stop::Stop,
    failure::Failure,
    term::{
        out::{self, Format},
        table::{Cell, Table},
        units::{GuestAddress, Size, Span},
    },
};

const EXAMPLES: &str = "\
Examples:
  slat memory slots web
  slat memory dirty web --watch                  pages as they are written
  slat memory dirty web --cursor backup          one batch for a reader of that name
  slat memory dirty web --cursor backup --stop   end it; dirty logging goes off with the last reader
  slat memory invalidate web --base 0x200000 --size 2MiB
  slat memory digest web                         the VM must be paused
  slat memory add-slot web --slot 3 --base 4GiB --size 64MiB
  slat memory move-slot web --slot 3 --base 8GiB
  slat memory delete-slot web --slot 3";

/// Options of `slat memory`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct MemoryArgs {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    client: ClientArgs,
}

impl MemoryArgs {
    /// The endpoint to ask.
    pub(crate) fn endpoint(&self) -> Option<Address> {
        Some(self.client.server.clone())
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Show the memory slots
    #[command(alias = "slot", after_help = EXAMPLES)]
    Slots {
        /// The VM
        vm: VmName,
    },
    /// Show pages written since this reader last looked
    #[command(after_help = EXAMPLES)]
    Dirty(DirtyArgs),
    /// Drop second-stage mappings; contents stay, the guest faults them in again
    #[command(after_help = EXAMPLES)]
    Invalidate {
        /// The VM
        vm: VmName,
        /// First guest-physical address [default: everything]
        #[arg(long, value_name = "ADDRESS", requires = "size")]
        base: Option<GuestAddress>,
        /// Length
        #[arg(long, value_name = "SIZE", requires = "base")]
        size: Option<Size>,
    },
    /// Show a digest of all memory, by slot; the VM must not run
    #[command(after_help = EXAMPLES)]
    Digest {
        /// The VM
        vm: VmName,
    },
    /// Add a slot of zeroes
    #[command(after_help = EXAMPLES)]
    AddSlot {
        #[command(flatten)]
        target: SlotArgs,
        /// First guest-physical address
        #[arg(long, value_name = "ADDRESS")]
        base: GuestAddress,
        /// Length
        #[arg(long, value_name = "SIZE")]
        size: Size,
        /// Refuse writes by the guest
        #[arg(long)]
        read_only: bool,
    },
    /// Take a slot away, its contents with it
    #[command(after_help = EXAMPLES)]
    DeleteSlot {
        #[command(flatten)]
        target: SlotArgs,
    },
    /// Move a slot to another address, its contents with it
    #[command(after_help = EXAMPLES)]
    MoveSlot {
        #[command(flatten)]
        target: SlotArgs,
        /// New first guest-physical address
        #[arg(long, value_name = "ADDRESS")]
        base: GuestAddress,
    },
}

#[derive(Clone, Debug, clap::Args)]
struct SlotArgs {
    /// The VM
    vm: VmName,
    /// Number of the slot, 0 to 509
    #[arg(long, value_name = "N")]
    slot: u32,
    /// Refuse when the table has changed since this generation (shown by slots)
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
}

#[derive(Clone, Debug, clap::Args)]
struct DirtyArgs {
    /// The VM
    vm: VmName,
    /// Name of the reader
    #[arg(long, default_value = "default", value_name = "NAME")]
    cursor: CursorName,
    /// Acknowledge this batch; what is not acknowledged is delivered again
    #[arg(long, value_name = "BATCH", conflicts_with_all = ["watch", "stop"])]
    ack: Option<u64>,
    /// Go on, and acknowledge each batch after it is printed
    #[arg(short, long, conflicts_with = "stop")]
    watch: bool,
    /// With --watch: how often to look
    #[arg(long, default_value = "1s", value_name = "DURATION")]
    interval: Span,
    /// End the reader; dirty logging goes off with the last one
    #[arg(long)]
    stop: bool,
}

/// Runs one of them.
pub(crate) async fn run(args: MemoryArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    match args.what {
        What::Slots { vm } => slots(&session, &vm).await,
        What::Dirty(args) if args.stop => delete_cursor(&session, &args).await,
        What::Dirty(args) if args.watch => watch_dirty(&session, &args).await,
        What::Dirty(args) => dirty(&session, &args).await,
        What::Invalidate { vm, base, size } => invalidate(&session, &vm, base, size).await,
        What::Digest { vm } => digest(&session, &vm).await,
        What::AddSlot {
            target,
            base,
            size,
            read_only,
        } => {
            let slot = v1::Slot {
                slot: target.slot,
                base_gfn: frames("--base", base.0)?,
                pages: frames("--size", size.0)?,
                read_only,
                dirty_logging: false,
            };
            let change = v1::slot_change::Create { slot: Some(slot) };
            change_slots(
                &session,
                &target,
                v1::slot_change::Change::Create(change),
                "add",
            )
            .await
        }
        What::DeleteSlot { target } => {
            let change = v1::slot_change::Delete { slot: target.slot };
            change_slots(
                &session,
                &target,
                v1::slot_change::Change::Delete(change),
                "delete",
            )
            .await
        }
        What::MoveSlot { target, base } => {
            let change = v1::slot_change::Move {
                slot: target.slot,
                base_gfn: frames("--base", base.0)?,
            };
            change_slots(
                &session,
                &target,
                v1::slot_change::Change::Move(change),
                "move",
            )
            .await
        }
    }
}

/// Bytes as whole frames.
fn frames(option: &str, bytes: u64) -> Result<u64, Failure> {
    if bytes.is_multiple_of(PAGE_SIZE) {
        return Ok(bytes / PAGE_SIZE);
    }
    Err(Failure::Usage(format!(
        "{option} {bytes:#x} is not a whole number of pages of 4 KiB"
    )))
}

fn slot_table(slots: &[v1::Slot], generation: u64) -> String {
    let heads = ["SLOT", "BASE", "END", "SIZE", "ACCESS", "DIRTY LOG"];
    let rows: Vec<Vec<Cell>> = slots
        .iter()
        .map(|slot| {
            let base = u128::from(slot.base_gfn) * u128::from(PAGE_SIZE);
            let size = u128::from(slot.pages) * u128::from(PAGE_SIZE);
            vec![
                slot.slot.to_string().into(),
                format!("{base:#x}").into(),
                format!("{:#x}", base + size).into(),
                Size(slot.pages.saturating_mul(PAGE_SIZE))
                    .to_string()
                    .into(),
                if slot.read_only {
                    "read-only"
                } else {
                    "read-write"
                }
                .into(),
                if slot.dirty_logging { "on" } else { "off" }.into(),
            ]
        })
        .collect();
    let table = Table::new(&heads, out::stdout_colours()).render(&rows);
    format!("{table}\ngeneration {generation}")
}

async fn slots(session: &Session, vm: &VmName) -> Result<(), Failure> {
    let request = v1::ListSlotsRequest {
        vm: vm.to_string(),
        ..Default::default()
    };
    let answer = session
        .client
        .memory()
        .list_slots(request)
        .await
        .map_err(|status| Failure::call(format!("list the slots of {vm}"), status))?
        .into_inner();
    session.answer(
        || to_json("slat.v1.ListSlotsResponse", &answer),
        || slot_table(&answer.slots, answer.generation),
    )
}

async fn change_slots(
    session: &Session,
    target: &SlotArgs,
    change: v1::slot_change::Change,
    verb: &str,
) -> Result<(), Failure> {
    let request = v1::UpdateSlotsRequest {
        vm: target.vm.to_string(),
        changes: vec![v1::SlotChange {
            change: Some(change),
        }],
        expected_generation: target.generation.unwrap_or(0),
        ..Default::default()
    };
    let doing = format!("{verb} slot {} of {}", target.slot, target.vm);
    let answer = session
        .client
        .memory()
        .update_slots(request)
        .await
        .map_err(|status| Failure::call(doing, status))?
        .into_inner();
    session.answer(
        || to_json("slat.v1.UpdateSlotsResponse", &answer),
        || slot_table(&answer.slots, answer.generation),
    )
}

async fn harvest(
    session: &Session,
    args: &DirtyArgs,
    acknowledge_batch: u64,
) -> Result<v1::HarvestDirtyPagesResponse, Failure> {
    let request = v1::HarvestDirtyPagesRequest {
        vm: args.vm.to_string(),
        cursor: args.cursor.id().to_owned(),
        acknowledge_batch,
        ..Default::default()
    };
    let answer = session.client.memory().harvest_dirty_pages(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| Failure::call(format!("harvest dirty pages of {}", args.vm), status))
}

async fn delete_cursor(session: &Session, args: &DirtyArgs) -> Result<(), Failure> {
    let request = v1::DeleteDirtyCursorRequest {
        vm: args.vm.to_string(),
        cursor: args.cursor.id().to_owned(),
        ..Default::default()
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
    let mut text = format!(
        "batch {}: {} dirty pages ({}) in {} ranges",
        batch.batch,
        batch.dirty_pages,
        Size(batch.dirty_pages.saturating_mul(PAGE_SIZE)),
        batch.ranges.len()
    );
    for range in &batch.ranges {
        let base = u128::from(range.gfn) * u128::from(PAGE_SIZE);
        text.push_str(&format!("\n  {base:#014x}  {} pages", range.pages));
    }
    text
}

async fn dirty(session: &Session, args: &DirtyArgs) -> Result<(), Failure> {
    let batch = harvest(session, args, args.ack.unwrap_or(0)).await?;
    session.answer(
        || to_json("slat.v1.HarvestDirtyPagesResponse", &batch),
        || batch_text(&batch),
    )?;
    if batch.created {
        out::say(format!(
            "the reader {cursor} is new: it sees what is written from now on, and dirty logging stays on until\n  \
             slat memory dirty {vm} --cursor {cursor} --stop",
            cursor = args.cursor.id(),
            vm = args.vm.id(),
        ));
    }
    Ok(())
}

async fn watch_dirty(session: &Session, args: &DirtyArgs) -> Result<(), Failure> {
    let mut stop = Stop::listen()?;
    let mut created = false;
    let watched = tokio::select! {
        watched = watch_loop(session, args, &mut created) => watched,
        _ = stop.wait() => Ok(()),
    };
    if created {
        let ended = delete_cursor(session, args).await;
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
        if session.output == Format::Json {
            out::json_line(&to_json("slat.v1.HarvestDirtyPagesResponse", &batch))?;
        } else if !batch.created {
            out::line(batch_text(&batch))?;
        }
        acknowledged = batch.batch;
        tokio::time::sleep(pause).await;
    }
}

async fn invalidate(
    session: &Session,
    vm: &VmName,
    base: Option<GuestAddress>,
    size: Option<Size>,
) -> Result<(), Failure> {
    let range = match (base, size) {
        (Some(base), Some(size)) => Some(v1::GfnRange {
            gfn: frames("--base", base.0)?,
            pages: frames("--size", size.0)?,
        }),
        _ => None,
    };
    let request = v1::InvalidateMemoryRequest {
        vm: vm.to_string(),
        range,
        ..Default::default()
    };
    let answer = session
        .client
        .memory()
        .invalidate_memory(request)
        .await
        .map_err(|status| Failure::call(format!("invalidate memory of {vm}"), status))?
        .into_inner();
    session.answer(
        || to_json("slat.v1.InvalidateMemoryResponse", &answer),
        || {
            format!(
                "{vm}: mappings of {} dropped in {}",
                Size(answer.pages.saturating_mul(PAGE_SIZE)),
                Span(Duration::from_nanos(answer.duration_nanos))
            )
        },
    )
}

async fn digest(session: &Session, vm: &VmName) -> Result<(), Failure> {
    let request = v1::DigestMemoryRequest {
        vm: vm.to_string(),
        ..Default::default()
    };
    let answer = session
        .client
        .memory()
        .digest_memory(request)
        .await
        .map_err(|status| Failure::call(format!("digest memory of {vm}"), status))?
        .into_inner();
    session.answer(
        || to_json("slat.v1.DigestMemoryResponse", &answer),
        || {
            let heads = ["SLOT", "DIGEST", "SIZE"];
            let mut rows: Vec<Vec<Cell>> = answer
                .slots
                .iter()
                .map(|slot| {
                    vec![
                        slot.slot.to_string().into(),
                        slot.digest.as_str().into(),
                        Size(slot.pages.saturating_mul(PAGE_SIZE))
                            .to_string()
                            .into(),
                    ]
                })
                .collect();
            rows.push(vec!["all".into(), answer.digest.as_str().into()]);
            Table::new(&heads, out::stdout_colours()).render(&rows)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_whole_frames() {
        assert_eq!(frames("--base", 4 << 30).unwrap(), 1 << 20);
        assert_eq!(frames("--base", 4097).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_batch_names_its_ranges() {
        let batch = v1::HarvestDirtyPagesResponse {
            batch: 7,
            dirty_pages: 3,
            ranges: vec![v1::GfnRange {
                gfn: 0x200,
                pages: 3,
            }],
            created: false,
            ..Default::default()
        };
        assert_eq!(
            batch_text(&batch),
            "batch 7: 3 dirty pages (12 KiB) in 1 ranges\n  0x000000200000  3 pages"
        );
    }
}
