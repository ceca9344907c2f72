//! An agent whose disk is full says so before anybody needs it, and is well again by itself.

use anyhow::ensure;
use slat_proto::v1;
use slat_tests::{Fleet, Layout, disk::SmallDisk, guest::usual, scene, wait::eventually};

async fn says(fleet: &Fleet, words: &str) -> anyhow::Result<()> {
    let request = v1::GetHostRequest {
        name: "hosts/small".into(),
    };
    let host = fleet.hosts(&fleet.server()).get_host(request).await?;
    let host = host.into_inner();
    ensure!(host.state() == v1::host::State::Ready, "{host:#?}");
    let fits = if words.is_empty() {
        host.state_message.is_empty()
    } else {
        host.state_message.contains(words)
    };
    ensure!(fits, "{host:#?}");
    Ok(())
}

#[test]
fn an_agent_with_a_full_disk_says_so_and_gets_no_vm() {
    scene::run(Layout::two(scene::best_backend()), full_disk);
}

async fn full_disk(fleet: &mut Fleet) -> anyhow::Result<()> {
    let disk = match SmallDisk::mount(&fleet.root().join("small")) {
        Ok(disk) => disk,
        Err(error) => {
            println!("SKIPPED: {error:#}");
            return Ok(());
        }
    };
    // More memory than the others have: it would be chosen.
    fleet
        .add_host("small", 4096, &["--data-ports", "0"])
        .await?;
    says(fleet, "").await?;
    disk.fill()?;
    eventually("the full disk is told", || {
        says(fleet, "cannot be written: No space left on device")
    })
    .await?;
    let vm = fleet.run_vm("web", "", usual(fleet.backend())).await?;
    ensure!(vm.host != "hosts/small", "{vm:#?}");
    disk.free()?;
    eventually("it is well again", || says(fleet, "")).await?;
    let vm = fleet.run_vm("next", "", usual(fleet.backend())).await?;
    ensure!(vm.host == "hosts/small", "{vm:#?}");
    for name in ["vms/web", "vms/next"] {
        let delete = v1::DeleteVmRequest {
            name: name.into(),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).delete_vm(delete).await?;
    }
    fleet.vm_dir_gone("small", "next").await?;
    Ok(())
}
