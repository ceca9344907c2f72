//! `slat memory working-set` and `mappings`: what the Common MMU knows of a guest that it pages.

use std::time::Duration;

use slat_proto::{json::to_json, model::PAGE_SIZE, v1};

use super::{super::target::VmTarget, slots::to_slots};
use crate::{
    client::Session,
    failure::Failure,
    term::{
        out,
        table::{Cell, Table},
        units::{Size, Span},
    },
};

/// Runs of mappings that are shown, at most; the rest is said to be there.
const MOST: usize = 100_000;

fn address(gfn: u64) -> Cell {
    let address = u128::from(gfn) * u128::from(PAGE_SIZE);
    Cell::number(address, format!("{address:#x}"))
}

fn size(pages: u64) -> Cell {
    Cell::number(pages, Size(pages.saturating_mul(PAGE_SIZE)).to_string())
}

/// Frames that the guest touched since this was last asked.
pub(super) async fn working_set(
    session: &Session,
    target: &VmTarget,
    cursor: Option<&str>,
    end: bool,
) -> Result<(), Failure> {
    let request = v1::HarvestWorkingSetRequest {
        name: target.name(),
        uid: target.uid(),
        host: target.host(),
        range: None,
        cursor: cursor.unwrap_or_default().to_owned(),
        end,
    };
    let answer = session.client.pagings().harvest_working_set(request).await;
    let answer = answer
        .map_err(|status| {
            let doing = format!("harvest the working set of {target}");
            to_slots(Failure::call(doing, status), target)
        })?
        .into_inner();
    session.answer(
        || to_json(&answer),
        &target.name(),
        || {
            let rows: Vec<Vec<Cell>> = answer
                .ranges
                .iter()
                .map(|range| vec![address(range.gfn), size(range.pages)])
                .collect();
            let table = Table::new(&["BASE", "SIZE"], out::stdout_colours()).render(&rows);
            let all = Size(answer.pages.saturating_mul(PAGE_SIZE));
            let took = Span(Duration::from_nanos(answer.duration_nanos));
            let since = match (cursor, answer.created) {
                (None, _) => "this was last asked".to_owned(),
                (Some(name), false) => format!("{name} last looked"),
                (Some(name), true) => format!("the last harvest; {name} is a new reader"),
            };
            format!("{table}\n{all} touched since {since}; harvested in {took}")
        },
    )
}

/// What is mapped.
pub(super) async fn mappings(session: &Session, target: &VmTarget) -> Result<(), Failure> {
    let mut all = v1::ListMappingsResponse::default();
    loop {
        let request = v1::ListMappingsRequest {
            name: target.name(),
            uid: target.uid(),
            host: target.host(),
            from_gfn: all.next_gfn,
        };
        let part = session.client.pagings().list_mappings(request).await;
        let part = part
            .map_err(|status| {
                let doing = format!("list the mappings of {target}");
                to_slots(Failure::call(doing, status), target)
            })?
            .into_inner();
        let goes_on = part.next_gfn > all.next_gfn;
        all.runs.extend(part.runs);
        all.next_gfn = part.next_gfn;
        if !goes_on || all.runs.len() >= MOST {
            break;
        }
    }
    if all.next_gfn != 0 {
        out::say(format!(
            "only the first {} runs are shown; there are more from frame {:#x} on",
            all.runs.len(),
            all.next_gfn
        ));
    }
    session.answer(
        || to_json(&all),
        &target.name(),
        || {
            let rows: Vec<Vec<Cell>> = all
                .runs
                .iter()
                .map(|run| {
                    let access = if run.writable { "read-write" } else { "read" };
                    vec![address(run.gfn), size(run.pages), access.into()]
                })
                .collect();
            Table::new(&["BASE", "SIZE", "MAPPED"], out::stdout_colours()).render(&rows)
        },
    )
}
