//! Memory slots: the table, and one change of it at a time.

use slat_proto::{
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
        units::Size,
    },
};

/// Options of every change.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SlotArgs {
    #[command(flatten)]
    vm: VmTarget,
    /// Number of the slot, as 3: 0 to 509
    #[arg(long, value_name = "N")]
    slot: u32,
    /// Refuse when the table has changed since this generation, as 7 (slots shows it)
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
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
    session.answer(
        || to_json(&answer),
        &name,
        || slot_table(&answer.slots, answer.generation),
    )
}

/// Makes one change and shows the table as it is then.
async fn change(
    session: &Session,
    target: &SlotArgs,
    change: v1::slot_change::Change,
    verb: &str,
) -> Result<(), Failure> {
    let request = v1::UpdateSlotsRequest {
        vm: target.vm.name(),
        uid: target.vm.uid(),
        host: target.vm.host(),
        changes: vec![v1::SlotChange {
            change: Some(change),
        }],
        expected_generation: target.generation.unwrap_or(0),
    };
    let doing = format!("{verb} slot {} of {}", target.slot, target.vm);
    let name = target.vm.name();
    let answer = session
        .client
        .memory()
        .update_slots(request)
        .await
        .map_err(|status| Failure::call(doing, status))?
        .into_inner();
    session.answer(
        || to_json(&answer),
        &name,
        || slot_table(&answer.slots, answer.generation),
    )
}

/// Adds a slot of zeroes.
pub(super) async fn add(
    session: &Session,
    target: &SlotArgs,
    base: u64,
    size: u64,
    read_only: bool,
) -> Result<(), Failure> {
    let slot = v1::Slot {
        slot: target.slot,
        base_gfn: frames("--base", base)?,
        pages: frames("--size", size)?,
        read_only,
        dirty_logging: false,
    };
    let create = v1::slot_change::Create { slot: Some(slot) };
    change(session, target, Change::Create(create), "add").await
}

/// Takes a slot away.
pub(super) async fn delete(session: &Session, target: &SlotArgs) -> Result<(), Failure> {
    let delete = v1::slot_change::Delete { slot: target.slot };
    change(session, target, Change::Delete(delete), "delete").await
}

/// Moves a slot to another address.
pub(super) async fn relocate(
    session: &Session,
    target: &SlotArgs,
    base: u64,
) -> Result<(), Failure> {
    let to = v1::slot_change::Move {
        slot: target.slot,
        base_gfn: frames("--base", base)?,
    };
    change(session, target, Change::Move(to), "move").await
}
