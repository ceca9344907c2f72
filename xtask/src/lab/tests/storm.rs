//! A writing guest that is migrated again and again between two hosts, while migrations are
//! cancelled and every kind of process dies: the agent of either side, the VM's process of either
//! side, the server. What happens to which migration, and after how many MiB, goes by the seed.
//!
//! What must come of each is known beforehand. Daemons are not in the path of pages: through their
//! deaths a migration completes. The destination's process takes the migration with it, and the
//! guest runs on; the source's takes the VM, which is said, and the next one is made where it was.

use std::collections::BTreeMap;

use anyhow::ensure;

use super::{
    faults::failed_without_harm,
    moves::is_whole,
    scene::{ACCEPTED, Outcome, SLOW, Scene},
};
use crate::lab::fleet::{Fleet, VM};

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Nothing,
    Cancel,
    DestinationVm,
    SourceVm,
    SourceAgent,
    DestinationAgent,
    Server,
}

/// How often each happens in the brief form, and in the whole: seven and twenty migrations.
const EVENTS: [(Event, [usize; 2]); 7] = [
    (Event::Nothing, [1, 6]),
    (Event::Cancel, [1, 3]),
    (Event::DestinationVm, [1, 2]),
    (Event::SourceVm, [1, 2]),
    (Event::SourceAgent, [1, 2]),
    (Event::DestinationAgent, [1, 3]),
    (Event::Server, [1, 2]),
];
/// The guest's MiB, and those it writes a second: fewer than hosts of a busy machine can send.
const GUEST: [u32; 2] = [64, 1];
/// An event comes when so many MiB at most have been sent: [`SLOW`] has more than half of the
/// memory to go then.
const LATEST: u64 = 24;
/// So slow that a daemon is back before the end, and so fast that the migration converges.
const STEADY: &str = "--max-bandwidth 8MiB/s";

/// A generator of numbers that are the same for the same seed (splitmix64).
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    /// Below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % end
    }
}

/// The events of a run and when they come, in MiB sent.
fn deck(seed: u64, whole: bool) -> Vec<(Event, u64)> {
    let mut chance = Chance(seed);
    let mut events: Vec<Event> = EVENTS
        .iter()
        .flat_map(|(event, times)| vec![*event; times[usize::from(whole)]])
        .collect();
    for last in (1..events.len()).rev() {
        let other = chance.below(last as u64 + 1) as usize;
        events.swap(last, other);
    }
    let moment = |event| (event, 1 + chance.below(LATEST));
    events.into_iter().map(moment).collect()
}

/// All of it.
pub(crate) fn storm(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let (backend, seed) = (scene.backend, scene.seed);
    let deck = deck(seed, !scene.brief);
    let mut fleet = Fleet::start(scene.hosts)?;
    fleet.create(VM, 1, backend, GUEST)?;
    fleet.sound_on(1)?;
    let mut home = 1;
    let mut came: BTreeMap<&str, u32> = BTreeMap::new();
    let mut ways = [0, 0];
    for (number, (event, mib)) in deck.iter().enumerate() {
        let (from, to) = (home, 3 - home);
        let made = one(&mut fleet, *event, *mib, [from, to]);
        let what = made.map_err(|error| {
            let number = number + 1;
            error.context(format!(
                "migration {number} of seed {seed}: {event:?} at {mib} MiB"
            ))
        })?;
        *came.entry(what).or_default() += 1;
        match *event {
            Event::Cancel | Event::DestinationVm => {}
            Event::SourceVm => {
                fleet.delete(VM)?;
                fleet.create(VM, from, backend, GUEST)?;
            }
            _ => {
                ways[usize::from(from) - 1] += 1;
                home = to;
            }
        }
        fleet.sound_on(home)?;
    }
    ensure!(
        ways.iter().all(|count| *count > 0),
        "not both ways: {ways:?}"
    );
    fleet.finish()?;
    let came: Vec<String> = came
        .iter()
        .map(|(what, times)| format!("{times} {what}"))
        .collect();
    Ok(Outcome::Passed(format!(
        "{} migrations of seed {seed}: {}, guest errors 0",
        deck.len(),
        came.join(", ")
    )))
}

/// One migration, with what happens to it. Gives what came of it.
fn one(
    fleet: &mut Fleet<'_>,
    event: Event,
    mib: u64,
    [from, to]: [u8; 2],
) -> anyhow::Result<&'static str> {
    let verified = format!("--verify after-commit {ACCEPTED}");
    match event {
        Event::Nothing => {
            let name = fleet.migrate(to, &verified)?;
            is_whole(&fleet.ends(&name, "COMPLETED")?)?;
            Ok("completed, digests equal")
        }
        Event::Cancel => {
            let name = fleet.migrate_until_sent(to, SLOW, mib)?;
            fleet.slat(&format!("cancel {name}"))?.good("slat cancel")?;
            let end = fleet.ends(&name, "CANCELLED")?;
            ensure!(end["vmLocation"] == "VM_LOCATION_SOURCE", "{end:#}");
            Ok("cancelled")
        }
        Event::DestinationVm => {
            let name = fleet.migrate_until_sent(to, SLOW, mib)?;
            fleet.kill_vm(to)?;
            failed_without_harm(fleet, &name, from)?;
            Ok("failed with the destination's process")
        }
        Event::SourceVm => {
            let name = fleet.migrate_until_sent(to, SLOW, mib)?;
            fleet.kill_vm(from)?;
            let end = fleet.ends(&name, "FAILED")?;
            ensure!(end["vmLocation"] == "VM_LOCATION_LOST", "{end:#}");
            Ok("lost with the source's process")
        }
        Event::SourceAgent | Event::DestinationAgent | Event::Server => {
            let options = format!("{STEADY} {verified}");
            let name = fleet.migrate_until_sent(to, &options, mib)?;
            match event {
                Event::Server => {
                    fleet.kill(1, "server")?;
                    fleet.start_server()?;
                }
                _ => {
                    let host = if event == Event::SourceAgent {
                        from
                    } else {
                        to
                    };
                    fleet.kill(host, "agent")?;
                    fleet.start_agent(host)?;
                }
            }
            fleet.hosts_ready()?;
            is_whole(&fleet.ends(&name, "COMPLETED")?)?;
            Ok("completed through a daemon's death, digests equal")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_one_deck_with_everything_in_it() {
        for (whole, count) in [(false, 7), (true, 20)] {
            let all = deck(1, whole);
            assert_eq!(all.len(), count);
            assert_eq!(all, deck(1, whole));
            assert_ne!(all, deck(2, whole));
            for (event, times) in EVENTS {
                let found = all.iter().filter(|(other, _)| *other == event).count();
                assert_eq!(found, times[usize::from(whole)]);
            }
            assert!(all.iter().all(|(_, mib)| (1..=LATEST).contains(mib)));
        }
    }
}
