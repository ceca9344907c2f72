//! `slat memory`: a VM's slots ([`slots`], many at once: [`batch`]), dirty pages ([`dirty`]),
//! their readers ([`cursors`]) and rate ([`rate`]), what of it is mapped ([`paged`]), mappings
//! dropped, pages given back, and digest.
//!
//! `dirty` reads as a named cursor; every cursor sees every dirty page. One call shows a batch and
//! leaves it unacknowledged unless `--ack` names it, so nothing is lost with a broken pipe;
//! `--watch` acknowledges each batch after printing it. A cursor keeps dirty logging on: a watch
//! that made its cursor takes it away again when it ends.

mod batch;
mod cursors;
mod dirty;
mod paged;
mod prefault;
mod rate;
mod slots;

use std::time::Duration;

use batch::BatchArgs;
use dirty::DirtyArgs;
use rate::RateArgs;
use slat_proto::{json::to_json, model::PAGE_SIZE, v1};
use slots::{Access, Order, SlotArgs, frames, to_slots};

use super::target::VmTarget;
use crate::{
    client::{ClientArgs, Session},
    failure::Failure,
    term::{
        out,
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
  slat memory cursors web                        who reads dirty pages
  slat memory dirty-rate web --duration 2s       how fast it dirties its memory
  slat memory invalidate web --base 0x200000 --size 2MiB
  slat memory discard web --base 0x200000 --size 2MiB   its contents are gone: it reads zero
  slat memory digest web                         the VM must be paused
  slat memory add-slot web --slot 3 --base 4GiB --size 64MiB
  slat memory move-slot web --slot 3 --base 8GiB
  slat memory set-slot web --slot 3 --access read-only
  slat memory delete-slot web --slot 3
  slat memory working-set web                    what the guest touched since this was last asked
  slat memory working-set web --cursor backup    the same for a reader of that name
  slat memory prefault web                       map all of it before the guest touches it
  slat memory prefault web --base 0x200000 --size 64MiB
  slat memory mappings web                       what of a guest paged by the agent is mapped
  slat memory change-slots web -f changes.txt    many at once, all or none";

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
    /// Its client options.
    pub(crate) fn client(&self) -> &ClientArgs {
        &self.client
    }
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Show the memory slots
    #[command(alias = "slot", after_help = EXAMPLES)]
    Slots {
        #[command(flatten)]
        vm: VmTarget,
    },
    /// Show pages written since this reader last looked
    #[command(after_help = EXAMPLES)]
    Dirty(DirtyArgs),
    /// Show the readers of dirty pages
    ///
    /// HARVESTED counts pages that were read from the log and wait for that reader. Pages that the
    /// guest wrote since the log was last read count nowhere: the next harvest, by whomever, finds
    /// them. So 0 does not mean that nothing was written.
    #[command(alias = "cursor", after_help = EXAMPLES)]
    Cursors {
        #[command(flatten)]
        vm: VmTarget,
    },
    /// Measure how fast the VM dirties its memory
    #[command(after_help = EXAMPLES)]
    DirtyRate(RateArgs),
    /// Drop second-stage mappings; contents stay, the guest faults them in again
    #[command(after_help = EXAMPLES)]
    Invalidate {
        #[command(flatten)]
        vm: VmTarget,
        /// First guest-physical address, as 0x200000 or 2MiB [default: everything]
        #[arg(long, value_name = "ADDRESS", requires = "size")]
        base: Option<GuestAddress>,
        /// Length with its unit, as 64MiB: whole pages of 4KiB
        #[arg(long, value_name = "SIZE", requires = "base")]
        size: Option<Size>,
    },
    /// Give the host's pages of a range back; they read zero, whatever the guest had there is gone
    #[command(after_help = EXAMPLES)]
    Discard {
        #[command(flatten)]
        vm: VmTarget,
        /// First guest-physical address, as 0x200000 or 2MiB
        #[arg(long, value_name = "ADDRESS")]
        base: GuestAddress,
        /// Length with its unit, as 64MiB: whole pages of 4KiB
        #[arg(long, value_name = "SIZE")]
        size: Size,
    },
    /// Show a digest of all memory, by slot; the VM must not run
    #[command(after_help = EXAMPLES)]
    Digest {
        #[command(flatten)]
        vm: VmTarget,
    },
    /// Add a slot of zeroes
    #[command(after_help = EXAMPLES)]
    AddSlot {
        #[command(flatten)]
        target: SlotArgs,
        /// First guest-physical address, as 0x100000000 or 4GiB
        #[arg(long, value_name = "ADDRESS")]
        base: GuestAddress,
        /// Length with its unit, as 64MiB: whole pages of 4KiB
        #[arg(long, value_name = "SIZE")]
        size: Size,
        /// Drop and count writes by the guest
        #[arg(long)]
        read_only: bool,
    },
    /// Take a slot away, its contents with it
    #[command(after_help = EXAMPLES)]
    DeleteSlot {
        #[command(flatten)]
        target: SlotArgs,
    },
    /// Change what the guest may do with a slot; its contents stay
    #[command(after_help = EXAMPLES)]
    SetSlot {
        #[command(flatten)]
        target: SlotArgs,
        /// What the guest may do: under read-only its writes are dropped and counted
        #[arg(long, value_name = "ACCESS")]
        access: Access,
    },
    /// Move a slot to another address, its contents with it
    #[command(after_help = EXAMPLES)]
    MoveSlot {
        #[command(flatten)]
        target: SlotArgs,
        /// New first guest-physical address, as 0x200000000 or 8GiB
        #[arg(long, value_name = "ADDRESS")]
        base: GuestAddress,
    },
    /// Show what the guest touched since this was last asked, and forget it
    ///
    /// Mappings are taken away to be noticed: the next touch of each page costs the guest a fault.
    /// For VMs that are paged by the agent.
    #[command(after_help = EXAMPLES)]
    WorkingSet {
        #[command(flatten)]
        vm: VmTarget,
        /// Ask as a reader of this name: it is told all that anybody found since its own last look
        #[arg(long, value_name = "NAME")]
        cursor: Option<String>,
        /// The reader ends with this answer
        #[arg(long, requires = "cursor")]
        end: bool,
    },
    /// Map memory before the guest touches it, with its contents, and wait until it is done
    ///
    /// The guest takes no faults there afterwards, until mappings are taken away again. For VMs
    /// that are paged by the agent.
    #[command(after_help = EXAMPLES)]
    Prefault {
        #[command(flatten)]
        vm: VmTarget,
        /// First guest-physical address, as 0x200000 or 2MiB [default: everything]
        #[arg(long, value_name = "ADDRESS", requires = "size")]
        base: Option<GuestAddress>,
        /// Length with its unit, as 64MiB: whole pages of 4KiB
        #[arg(long, value_name = "SIZE", requires = "base")]
        size: Option<Size>,
    },
    /// Show what is mapped of a guest that is paged by the agent
    #[command(after_help = EXAMPLES)]
    Mappings {
        #[command(flatten)]
        vm: VmTarget,
    },
    /// Make many changes of slots at once: all or none, in one pause at most
    #[command(after_help = batch::EXAMPLE)]
    ChangeSlots(BatchArgs),
}

/// Runs one of them.
pub(crate) async fn run(args: MemoryArgs) -> Result<(), Failure> {
    let session = Session::open(&args.client)?;
    match args.what {
        What::Slots { vm } => slots::list(&session, &vm).await,
        What::Dirty(args) if args.stop => dirty::stop(&session, &args).await,
        What::Dirty(args) if args.watch => dirty::watch(&session, &args).await,
        What::Dirty(args) => dirty::once(&session, &args).await,
        What::Cursors { vm } => cursors::list(&session, &vm).await,
        What::DirtyRate(args) => rate::measure(&session, &args).await,
        What::Invalidate { vm, base, size } => invalidate(&session, &vm, base, size).await,
        What::Discard { vm, base, size } => discard(&session, &vm, base, size).await,
        What::Digest { vm } => digest(&session, &vm).await,
        What::AddSlot {
            target,
            base,
            size,
            read_only,
        } => {
            let (base, size) = (base.0, size.0);
            let add = Order::Add {
                base,
                size,
                read_only,
            };
            slots::change(&session, &target, add).await
        }
        What::DeleteSlot { target } => slots::change(&session, &target, Order::Delete).await,
        What::SetSlot { target, access } => {
            slots::change(&session, &target, Order::Set(access)).await
        }
        What::MoveSlot { target, base } => {
            slots::change(&session, &target, Order::Move { base: base.0 }).await
        }
        What::WorkingSet { vm, cursor, end } => {
            paged::working_set(&session, &vm, cursor.as_deref(), end).await
        }
        What::Prefault { vm, base, size } => {
            prefault::prefault(&session, &vm, range(base, size)?).await
        }
        What::Mappings { vm } => paged::mappings(&session, &vm).await,
        What::ChangeSlots(args) => batch::change(&session, &args).await,
    }
}

/// A range of frames, or everything.
fn range(base: Option<GuestAddress>, size: Option<Size>) -> Result<Option<v1::GfnRange>, Failure> {
    let (Some(base), Some(size)) = (base, size) else {
        return Ok(None);
    };
    Ok(Some(v1::GfnRange {
        gfn: frames("--base", base.0)?,
        pages: frames("--size", size.0)?,
    }))
}

async fn invalidate(
    session: &Session,
    target: &VmTarget,
    base: Option<GuestAddress>,
    size: Option<Size>,
) -> Result<(), Failure> {
    let request = v1::InvalidateMemoryRequest {
        vm: target.name(),
        range: range(base, size)?,
        uid: target.uid(),
        host: target.host(),
    };
    let answer = session
        .client
        .memory()
        .invalidate_memory(request)
        .await
        .map_err(|status| {
            to_slots(
                Failure::call(format!("invalidate memory of {target}"), status),
                target,
            )
        })?
        .into_inner();
    session.answer(
        || to_json(&answer),
        &target.name(),
        || {
            format!(
                "{target}: mappings of {} dropped in {}",
                Size(answer.pages.saturating_mul(PAGE_SIZE)),
                Span(Duration::from_nanos(answer.duration_nanos))
            )
        },
    )
}

async fn discard(
    session: &Session,
    target: &VmTarget,
    base: GuestAddress,
    size: Size,
) -> Result<(), Failure> {
    let request = v1::DiscardMemoryRequest {
        vm: target.name(),
        ranges: vec![v1::GfnRange {
            gfn: frames("--base", base.0)?,
            pages: frames("--size", size.0)?,
        }],
        uid: target.uid(),
        host: target.host(),
    };
    let answer = session
        .client
        .memory()
        .discard_memory(request)
        .await
        .map_err(|status| {
            to_slots(
                Failure::call(format!("discard memory of {target}"), status),
                target,
            )
        })?
        .into_inner();
    session.answer(
        || to_json(&answer),
        &target.name(),
        || {
            format!(
                "{target}: {} discarded in {}, {} of the host's memory freed",
                Size(answer.pages.saturating_mul(PAGE_SIZE)),
                Span(Duration::from_nanos(answer.duration_nanos)),
                Size(answer.freed_bytes)
            )
        },
    )
}

async fn digest(session: &Session, target: &VmTarget) -> Result<(), Failure> {
    let request = v1::DigestMemoryRequest {
        vm: target.name(),
        uid: target.uid(),
        host: target.host(),
    };
    let answer = session
        .client
        .memory()
        .digest_memory(request)
        .await
        .map_err(|status| Failure::call(format!("digest memory of {target}"), status))?
        .into_inner();
    session.answer(
        || to_json(&answer),
        &target.name(),
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
    fn what_the_slots_explain_sends_to_the_slots() {
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            vm: VmTarget,
        }
        let line: Line = clap::Parser::parse_from(["x", "web", "--host", "a"]);
        let refused = slat_proto::ApiError::bad_parameter("range", "frame 0x100000 is in no slot");
        let failure = to_slots(Failure::api("discard memory", refused), &line.vm);
        let text = failure.render();
        assert!(
            text.starts_with("error: cannot discard memory: address 0x100000000 is in no slot\n"),
            "{text}"
        );
        let next = "\n  next:   slat memory slots web --host a";
        assert!(text.ends_with(next), "{text}");
        let error = |reason| slat_proto::ApiError::new(reason, "no");
        let slot = error(slat_proto::Reason::NoSuchSlot);
        let own = slot.clone().with("advice", "delete the VM instead");
        let failed = |error| to_slots(Failure::api("delete slot 3", error), &line.vm).render();
        assert!(failed(slot).ends_with(next));
        assert!(failed(own).ends_with("next:   delete the VM instead"));
        let other = error(slat_proto::Reason::NoSuchVm);
        assert!(!failed(other).contains("slots"));
    }

    #[test]
    fn addresses_are_whole_frames() {
        assert_eq!(frames("--base", 4 << 30).unwrap(), 1 << 20);
        assert_eq!(frames("--base", 4097).unwrap_err().exit_code(), 2);
    }
}
