//! The readers of a VM's dirty pages. What nobody has read from the log yet is in no cursor, so no
//! column may be called as if it counted all that waits.

use std::time::Duration;

use slat_proto::{json::to_json, model::std_duration, v1};

use super::super::target::VmTarget;
use crate::{
    client::Session,
    failure::Failure,
    term::{
        out,
        table::{Cell, Table},
        units::{Size, Span},
    },
    view,
};

/// Shows them.
pub(super) async fn list(session: &Session, target: &VmTarget) -> Result<(), Failure> {
    let request = v1::ListDirtyCursorsRequest {
        vm: target.name(),
        uid: target.uid(),
        host: target.host(),
    };
    let answer = session
        .client
        .memory()
        .list_dirty_cursors(request)
        .await
        .map_err(|status| Failure::call(format!("list dirty cursors of {target}"), status))?
        .into_inner();
    session.answer(
        || to_json(&answer),
        &target.name(),
        || text(&answer, out::stdout_colours()),
    )
}

fn text(answer: &v1::ListDirtyCursorsResponse, colours: bool) -> String {
    let heads = [
        "NAME",
        "OWNER",
        "BATCH",
        "UNACKNOWLEDGED",
        "HARVESTED",
        "IDLE",
        "LIMIT",
        "BITMAPS",
    ];
    let span = |duration: &prost_types::Duration| {
        Cell::from(Span(whole_seconds(std_duration(Some(duration)))).to_string())
    };
    let rows: Vec<Vec<Cell>> = answer
        .cursors
        .iter()
        .map(|cursor| {
            vec![
                cursor.name.as_str().into(),
                view::short(cursor.owner().as_str_name(), "OWNER_")
                    .to_lowercase()
                    .into(),
                cursor.batch.to_string().into(),
                cursor.unacknowledged_pages.to_string().into(),
                cursor.waiting_pages.to_string().into(),
                cursor.idle.as_ref().map_or_else(Cell::none, span),
                cursor.idle_limit.as_ref().map_or_else(Cell::none, span),
                Size(cursor.bitmap_bytes).to_string().into(),
            ]
        })
        .collect();
    let table = if rows.is_empty() {
        "nobody reads dirty pages".to_owned()
    } else {
        Table::new(&heads, colours).render(&rows)
    };
    let dropped = match answer.dropped_idle {
        0 => String::new(),
        count => format!("\n{count} removed because nobody used them"),
    };
    format!("{table}{dropped}")
}

fn whole_seconds(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reader_has_a_row_and_the_dropped_are_counted() {
        let mut answer = v1::ListDirtyCursorsResponse {
            dropped_idle: 2,
            ..Default::default()
        };
        assert_eq!(
            text(&answer, false),
            "nobody reads dirty pages\n2 removed because nobody used them"
        );
        answer.cursors.push(v1::DirtyCursor {
            name: "backup".into(),
            owner: v1::dirty_cursor::Owner::Caller.into(),
            batch: 7,
            waiting_pages: 12,
            ..Default::default()
        });
        let shown = text(&answer, false);
        for word in ["HARVESTED", "backup", "caller", "7", "12"] {
            assert!(shown.contains(word), "{shown}");
        }
    }
}
