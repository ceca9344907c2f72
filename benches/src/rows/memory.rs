//! What the page tables cost in memory, counted exactly: all that the MMU has on the heap, tables,
//! headers and everything else, less the frames of its arena that no table uses.

use anyhow::ensure;

use super::plan::{GIB, Kind, Plan, bytes};
use crate::{heap, report::Counted, slat::Slat, table::Table as _};

const TIB: u64 = 1024 * GIB;

fn row(
    name: String,
    goal: &str,
    count: impl FnOnce() -> anyhow::Result<Counted> + 'static,
) -> Plan {
    let mut plan = Plan::pages(name, 1, Vec::new()).goal(goal, &[]);
    plan.per = "guest";
    plan.kind = Kind::Counted(Box::new(count));
    plan
}

/// Bytes that `make`'s MMU occupies.
fn occupied(make: impl FnOnce() -> Slat) -> (usize, Slat) {
    let before = heap::live();
    let slat = make();
    (heap::live() - before - slat.unused_table_bytes(), slat)
}

pub(super) fn rows(pages: u64) -> Vec<Plan> {
    let small = move || {
        let (occupied, slat) = occupied(|| {
            let mut slat = Slat::new(pages);
            slat.populate(0, pages);
            slat
        });
        let (mapped, _, tables) = slat.counts();
        ensure!(
            mapped == pages as i64,
            "{mapped} of {pages} pages are mapped"
        );
        ensure!(occupied as u64 >= tables * 4096, "tables were not counted");
        let value = 100.0 * occupied as f64 / (pages << 12) as f64;
        Ok(Counted {
            value,
            unit: "% of memory",
            met: value <= 0.25,
        })
    };
    let huge = || {
        let (occupied, slat) = occupied(|| {
            let slat = Slat::huge(TIB);
            slat.populate_huge();
            slat
        });
        let (small, huge, tables) = slat.counts();
        ensure!(
            (small, huge) == (0, 1024),
            "{huge} of 1024 leaves of 1 GiB, {small} of 4 KiB"
        );
        ensure!(occupied as u64 >= tables * 4096, "tables were not counted");
        Ok(Counted {
            value: occupied as f64,
            unit: "bytes",
            met: occupied < 64 << 10,
        })
    };
    vec![
        row(
            format!("page tables and headers, {} in 4 KiB pages", bytes(pages)),
            "at most 0.25 % of mapped memory",
            small,
        ),
        row(
            "page tables and headers, 1 TiB in 1 GiB pages".to_owned(),
            "under 64 KiB",
            huge,
        ),
    ]
}
