//! Memory slots: the table, and changes of it.

use std::time::Duration;

use slat_proto::{
    Reason,
    json::to_json,
    model::PAGE_SIZE,
    v1::{self, slot_change::Change},
};

use super::super::target::VmTarget;
use crate::{
    client::Session,
    failure::Failure,
    term::{
        out,
        table::{Cell, Table},
        units::{Size, Span},
    },
};

/// Options of every change.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SlotArgs {
    #[command(flatten)]
    vm: VmTarget,
    /// Number of the slot, as 3: from 0; slots shows how many there may be
    #[arg(long, value_name = "N")]
    slot: u32,
    /// Refuse when the table has changed since this generation, as 7 (slots shows it)
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
}

/// What the guest may do with a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Access {
    /// Writes are dropped and counted.
    ReadOnly,
    /// Anything.
    ReadWrite,
}

/// Bytes as whole frames.
pub(super) fn frames(option: &str, bytes: u64) -> Result<u64, Failure> {
    if bytes.is_multiple_of(PAGE_SIZE) {
        return Ok(bytes / PAGE_SIZE);
    }
    Err(Failure::Usage(format!(
        "{option} {bytes:#x} is not a whole number of pages of 4 KiB"
    )))
}

fn slot_table(slots: &[v1::Slot]) -> String {
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
    Table::new(&heads, out::stdout_colours()).render(&rows)
}

fn listed(answer: &v1::ListSlotsResponse) -> String {
    // An older process does not say the most.
    let most = match answer.max_slots {
        0 => String::new(),
        most => format!(", {} of at most {most} slots", answer.slots.len()),
    };
    let table = slot_table(&answer.slots);
    format!("{table}\ngeneration {}{most}", answer.generation)
}

fn changed(answer: &v1::UpdateSlotsResponse) -> String {
    let pause = match answer.paused_nanos {
        0 => "no vCPU was paused".to_owned(),
        nanos => format!("vCPUs paused for {}", Span(Duration::from_nanos(nanos))),
    };
    format!(
        "{}\ngeneration {}, changed in {}, {pause}",
        slot_table(&answer.slots),
        answer.generation,
        Span(Duration::from_nanos(answer.duration_nanos))
    )
}

/// A failure that the slots explain sends to their table, where the endpoint gave no advice.
pub(super) fn to_slots(mut failure: Failure, target: &VmTarget) -> Failure {
    if let Failure::Api { error, .. } = &mut failure {
        let of_range = error
            .metadata
            .get("field")
            .is_some_and(|field| field == "range");
        if of_range || matches!(error.reason, Reason::NoSuchSlot | Reason::BadSlotTable) {
            let advice = error.metadata.entry("advice".to_owned());
            advice.or_insert_with(|| format!("slat memory slots {}", target.typed()));
        }
    }
    failure
}

/// Shows the table.
pub(super) async fn list(session: &Session, target: &VmTarget) -> Result<(), Failure> {
    let request = v1::ListSlotsRequest {
        vm: target.name(),
        uid: target.uid(),
        host: target.host(),
    };
    let name = target.name();
    let answer = session
        .client
        .memory()
        .list_slots(request)
        .await
        .map_err(|status| Failure::call(format!("list the slots of {target}"), status))?
        .into_inner();
    session.answer(|| to_json(&answer), &name, || listed(&answer))
}

/// Makes changes, all or none, and shows the table as it is then.
pub(super) async fn update(
    session: &Session,
    target: &VmTarget,
    generation: Option<u64>,
    changes: Vec<Change>,
    doing: String,
) -> Result<(), Failure> {
    let request = v1::UpdateSlotsRequest {
        vm: target.name(),
        uid: target.uid(),
        host: target.host(),
        changes: changes
            .into_iter()
            .map(|change| v1::SlotChange {
                change: Some(change),
            })
            .collect(),
        expected_generation: generation.unwrap_or(0),
    };
    let answer = session
        .client
        .memory()
        .update_slots(request)
        .await
        .map_err(|status| to_slots(Failure::call(doing, status), target))?
        .into_inner();
    session.answer(|| to_json(&answer), &target.name(), || changed(&answer))
}

/// One change, and the verb for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Add {
        base: u64,
        size: u64,
        read_only: bool,
    },
    Delete,
    Set(Access),
    Move {
        base: u64,
    },
}

impl Order {
    fn verb(self) -> &'static str {
        match self {
            Self::Add { .. } => "add",
            Self::Delete => "delete",
            Self::Set(_) => "change",
            Self::Move { .. } => "move",
        }
    }

    /// As the API says it.
    ///
    /// # Errors
    /// When an address or a size is not whole frames.
    pub(super) fn of_slot(self, slot: u32) -> Result<Change, Failure> {
        use v1::slot_change::{Create, Delete, Move, SetFlags};
        Ok(match self {
            Self::Add {
                base,
                size,
                read_only,
            } => Change::Create(Create {
                slot: Some(v1::Slot {
                    slot,
                    base_gfn: frames("--base", base)?,
                    pages: frames("--size", size)?,
                    read_only,
                    dirty_logging: false,
                }),
            }),
            Self::Delete => Change::Delete(Delete { slot }),
            Self::Set(access) => Change::SetFlags(SetFlags {
                slot,
                read_only: access == Access::ReadOnly,
            }),
            Self::Move { base } => Change::Move(Move {
                slot,
                base_gfn: frames("--base", base)?,
            }),
        })
    }
}

/// Makes one change.
pub(super) async fn change(
    session: &Session,
    target: &SlotArgs,
    order: Order,
) -> Result<(), Failure> {
    let doing = format!("{} slot {} of {}", order.verb(), target.slot, target.vm);
    let changes = vec![order.of_slot(target.slot)?];
    update(session, &target.vm, target.generation, changes, doing).await
}
