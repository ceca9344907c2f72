//! Migrations between hosts that work, and those that somebody cancels.

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::scene::{ACCEPTED, Outcome, SLOW, Scene, fleet};
use crate::lab::answer::{milliseconds, number};

/// Migrations both ways: of the brief form, and of the whole.
const ROUNDS: [u8; 2] = [4, 20];

/// A writing guest moves to the next host, of two back and forth, again and again; both sides'
/// memory is compared each time, the guest finds no error, and nothing stays where it was.
pub(crate) fn there_and_back(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let rounds = ROUNDS[usize::from(!scene.brief)];
    // Fewer than hosts of a busy machine can send.
    let mut fleet = fleet(scene, 1)?;
    let mut downtimes = Vec::new();
    let mut sent = 0;
    let count = *fleet.hosts().numbers().end();
    for round in 1..=rounds {
        let to = round % count + 1;
        let options = format!("--verify after-commit {ACCEPTED}");
        let name = fleet.migrate(to, &options)?;
        let done = fleet.ends(&name, "COMPLETED")?;
        is_whole(&done)?;
        let progress = &done["progress"];
        downtimes.push(milliseconds(&progress["downtime"]).context("no downtime")?);
        sent += number(&progress["bytesTransferred"]).context("no bytes")?;
        fleet.sound_on(to)?;
    }
    fleet.finish()?;
    let longest = downtimes.iter().copied().fold(0.0, f64::max);
    downtimes.sort_by(f64::total_cmp);
    let middle = downtimes.get(downtimes.len() / 2).copied().unwrap_or(0.0);
    Ok(Outcome::Passed(format!(
        "{rounds} migrations, guest errors 0, digests equal, {} MiB, downtime {middle:.0} ms in the \
         middle and {longest:.0} ms at most",
        sent >> 20
    )))
}

/// COMPLETED with the VM at the destination, and digests equal.
pub(super) fn is_whole(done: &Value) -> anyhow::Result<()> {
    let place = &done["vmLocation"];
    ensure!(place == "VM_LOCATION_DESTINATION", "{done:#}");
    let verification = &done["progress"]["verification"];
    ensure!(verification == "VERIFICATION_MATCH", "{done:#}");
    Ok(())
}

/// A cancel while pages flow leaves the guest where it is, and sound; the next migration works.
pub(crate) fn cancel(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut fleet = fleet(scene, 4)?;
    for _ in 0..2 {
        let name = fleet.migrate_until_pages_flow(2, SLOW)?;
        fleet.slat(&format!("cancel {name}"))?.good("slat cancel")?;
        let end = fleet.ends(&name, "CANCELLED")?;
        ensure!(end["vmLocation"] == "VM_LOCATION_SOURCE", "{end:#}");
        fleet.sound_on(1)?;
    }
    let name = fleet.migrate(2, &format!("--verify after-commit {ACCEPTED}"))?;
    is_whole(&fleet.ends(&name, "COMPLETED")?)?;
    fleet.sound_on(2)?;
    fleet.finish()?;
    Ok(Outcome::Passed(
        "2 cancelled, then 1 completed, guest errors 0".to_owned(),
    ))
}
