//! Peers without a ticket at the data port: whatever they say, they learn nothing and the migration
//! completes.

use std::{io::Write as _, net::TcpStream};

use anyhow::{Context as _, ensure};
use slat_proto::v1::{Verification, migration_params::Verify};
use slat_tests::{
    Fleet,
    data_port::{header, insults, listening_ports, say},
    guest::{strolling, usual, verified},
};

slat_tests::on_each_backend!(peers_without_a_ticket_do_not_disturb_a_migration);

async fn peers_without_a_ticket_do_not_disturb_a_migration(
    fleet: &mut Fleet,
) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let params = verified(strolling(), Verify::AfterCommit);
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", params)
        .await?;
    let target = fleet.vm_process("host-b", &vm.name)?;
    let ports = listening_ports(target.pid())?;
    ensure!(ports.len() == 1, "one data port, not {ports:?}");
    let port = ports[0];
    ensure!(port.ip().is_loopback(), "{port}");

    let abuse = tokio::task::spawn_blocking(move || {
        // The beginning of a header and silence, held until the end.
        let whole = header(*b"SLAT", 1, 1, 36, 1);
        let mut silent = TcpStream::connect(port)?;
        silent.write_all(&whole[..20])?;
        for (what, bytes) in insults() {
            let answer = say(port, &bytes).with_context(|| what.to_owned())?;
            // Closed without a word, or with the one that TLS has for it.
            let alert = answer.len() == 7 && answer[..5] == [21, 3, 3, 0, 2];
            ensure!(
                answer.is_empty() || alert,
                "{what} was answered with {answer:?}"
            );
        }
        // Many at once, who all say nothing.
        let crowd: Result<Vec<_>, _> = (0..50).map(|_| TcpStream::connect(port)).collect();
        anyhow::Ok((silent, crowd?))
    })
    .await?;
    let (silent, crowd) = abuse?;

    let done = fleet
        .migration_until(&migration.name, "COMPLETED", |migration| {
            migration.phase() == slat_proto::v1::MigrationPhase::Completed
        })
        .await?;
    let progress = done.progress.context("no progress")?;
    ensure!(
        progress.verification() == Verification::Match,
        "{progress:#?}"
    );
    fleet.runs_soundly_on(&vm.name, "host-b").await?;
    drop((silent, crowd));
    // The port is closed once the VM is here.
    slat_tests::wait::eventually("the data port is closed", || async {
        let open = listening_ports(target.pid())?;
        ensure!(open.is_empty(), "{open:?}");
        Ok(())
    })
    .await
}
