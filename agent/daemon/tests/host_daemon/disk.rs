//! A state directory that cannot be written: said by health, metric and host, and over by itself.

use slat_proto::v1;

use crate::rig::{MIB, Rig, answer, until};

async fn message(rig: &Rig) -> String {
    let request = v1::ListHostsRequest::default();
    let list = answer(rig.hosts().list_hosts(request).await).unwrap();
    list.hosts[0].state_message.clone()
}

#[tokio::test]
async fn while_the_state_directory_cannot_be_written_the_agent_says_so() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    assert_eq!(message(&rig).await, "");
    let metrics = rig.scrape("/metrics").await;
    assert!(metrics.contains("slat_agent_disk_up 1\n"), "{metrics}");
    assert!(rig.scrape("/healthz").await.ends_with("ok\n"));
    // Root may write anywhere; nobody writes to a directory.
    let probe = rig.state().join("probe");
    // Until it holds, because a probe may come in between.
    until(async || {
        drop(std::fs::remove_file(&probe));
        std::fs::create_dir_all(probe.join("in the way")).ok()
    })
    .await;
    let said = until(async || Some(message(&rig).await).filter(|said| !said.is_empty())).await;
    assert!(said.contains("cannot be written"), "{said}");
    let metrics = rig.scrape("/metrics").await;
    assert!(metrics.contains("slat_agent_disk_up 0\n"), "{metrics}");
    let health = rig.scrape("/healthz").await;
    assert!(health.contains("cannot be written"), "{health}");
    // Its VMs go on.
    assert_eq!(rig.names().await, ["vms/web"]);
    std::fs::remove_dir_all(&probe).unwrap();
    until(async || Some(message(&rig).await).filter(String::is_empty)).await;
    until(async || Some(rig.scrape("/healthz").await).filter(|said| said.ends_with("ok\n"))).await;
}
