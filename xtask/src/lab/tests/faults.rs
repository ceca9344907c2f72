//! Deaths while pages flow between hosts: of a VM's process, of daemons, of the network, of a whole
//! host. Before the point of no return each costs the migration at most, never the VM.

use anyhow::ensure;

use super::scene::{ACCEPTED, Outcome, SLOW, Scene, fleet};
use crate::lab::fleet::Fleet;

/// Reasons that say that the other side is gone.
const PEER_GONE: [&str; 6] = [
    "CONNECTION_LOST",
    "VM_PROCESS_DIED",
    "PEER_UNREACHABLE",
    "PEER_RESTARTED",
    "VM_UNREACHABLE",
    "PROGRESS_STALLED",
];

/// Waits until a migration has failed because the other side is gone; the guest must run on at the
/// source. Gives the reason.
pub(super) fn failed_without_harm(
    fleet: &mut Fleet<'_>,
    name: &str,
    source: u8,
) -> anyhow::Result<String> {
    let end = fleet.ends(name, "FAILED")?;
    ensure!(end["vmLocation"] == "VM_LOCATION_SOURCE", "{end:#}");
    let reason = end["error"]["reason"].as_str().unwrap_or_default();
    ensure!(PEER_GONE.contains(&reason), "{end:#}");
    fleet.sound_on(source)?;
    Ok(reason.to_owned())
}

/// What failed works when it is asked for again.
fn works_now(fleet: &mut Fleet<'_>) -> anyhow::Result<()> {
    let name = fleet.migrate(2, ACCEPTED)?;
    fleet.ends(&name, "COMPLETED")?;
    fleet.sound_on(2)
}

/// The destination's VM process dies: the migration fails, the guest runs on.
pub(crate) fn destination_vm(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut fleet = fleet(scene, 4)?;
    let name = fleet.migrate_until_pages_flow(2, SLOW)?;
    fleet.kill_vm(2)?;
    let reason = failed_without_harm(&mut fleet, &name, 1)?;
    works_now(&mut fleet)?;
    fleet.finish()?;
    Ok(Outcome::Passed(format!(
        "failed with {reason}, then completed, guest errors 0"
    )))
}

/// The source's VM process dies, and the VM with it, which is said. Nothing of it stays at the
/// destination.
pub(crate) fn source_vm(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut fleet = fleet(scene, 4)?;
    let name = fleet.migrate_until_pages_flow(2, SLOW)?;
    fleet.kill_vm(1)?;
    let end = fleet.ends(&name, "FAILED")?;
    ensure!(end["vmLocation"] == "VM_LOCATION_LOST", "{end:#}");
    fleet.finish()?;
    Ok(Outcome::Passed("failed, the VM LOST".to_owned()))
}

/// Both agents die and come back: they are not in the path of pages, so the migration completes.
pub(crate) fn both_agents(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut fleet = fleet(scene, 2)?;
    let options = format!("--max-bandwidth 8MiB/s {ACCEPTED}");
    let name = fleet.migrate_until_pages_flow(2, &options)?;
    for host in [1, 2] {
        fleet.kill(host, "agent")?;
    }
    for host in [1, 2] {
        fleet.start_agent(host)?;
    }
    fleet.hosts_ready()?;
    fleet.ends(&name, "COMPLETED")?;
    fleet.sound_on(2)?;
    fleet.finish()?;
    Ok(Outcome::Passed(
        "completed through both deaths, guest errors 0".to_owned(),
    ))
}

/// The server dies and comes back: it learns what became of the migration.
pub(crate) fn server(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut fleet = fleet(scene, 2)?;
    let options = format!("--max-bandwidth 8MiB/s {ACCEPTED}");
    let name = fleet.migrate_until_pages_flow(2, &options)?;
    fleet.kill(1, "server")?;
    fleet.start_server()?;
    fleet.hosts_ready()?;
    fleet.ends(&name, "COMPLETED")?;
    fleet.sound_on(2)?;
    fleet.finish()?;
    Ok(Outcome::Passed(
        "completed through its death, guest errors 0".to_owned(),
    ))
}

/// The destination's network is cut, until the migration has failed: the guest runs on, and when
/// the network is back, so is the host.
pub(crate) fn network(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut fleet = fleet(scene, 4)?;
    let name = fleet.migrate_until_pages_flow(2, SLOW)?;
    fleet.hosts().run(2, "ip link set eth0 down")?;
    let reason = failed_without_harm(&mut fleet, &name, 1);
    fleet.hosts().run(2, "ip link set eth0 up")?;
    let reason = reason?;
    fleet.hosts_ready()?;
    works_now(&mut fleet)?;
    fleet.finish()?;
    Ok(Outcome::Passed(format!(
        "failed with {reason}, then completed, guest errors 0"
    )))
}

/// The destination's host loses its power: the migration fails, the guest runs on. The host comes
/// back with nothing, for the next test.
pub(crate) fn destination_host(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let mut running = fleet(scene, 4)?;
    let name = running.migrate_until_pages_flow(2, SLOW)?;
    running.hosts().power_off(2);
    let reason = failed_without_harm(&mut running, &name, 1);
    drop(running);
    scene.hosts.power_on(2)?;
    Ok(Outcome::Passed(format!(
        "failed with {}, guest errors 0",
        reason?
    )))
}
