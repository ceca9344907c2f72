//! What the server counts, read at /metrics through a real recorder. One test: a process has one
//! recorder.

mod support;

use std::{sync::Arc, time::Duration};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use slat_proto::v1::MigrationPhase as Phase;
use slat_server::{Retention, Server, ServerConfig, metrics::DOWNTIME_BUCKETS};
use support::{Agent, Clients, Fake, hand_over, until, vm};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

async fn scrape(server: std::net::SocketAddr) -> String {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_counted() {
    let downtime = Matcher::Full("slat_migration_downtime_seconds".into());
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(downtime, DOWNTIME_BUCKETS)
        .unwrap()
        .install_recorder()
        .unwrap();
    let state = slat_test_dir::TestDir::new();
    let server = Server::start(ServerConfig {
        credentials: None,
        access: slat_proto::transport::Access::default(),
        listen: "127.0.0.1:0".parse().unwrap(),
        state_dir: state.path().to_owned(),
        report_interval: Duration::from_millis(100),
        host_silence: None,
        retention: Retention::default(),
        fence: None,
        render: Some(Arc::new(move || recorder.render())),
        version: "9.9.9".into(),
    })
    .await
    .unwrap();
    // Before anything has happened.
    let text = scrape(server.address()).await;
    for line in [
        "slat_migrations_total{result=\"completed\",reason=\"\"} 0",
        "slat_migrations_total{result=\"cancelled\",reason=\"\"} 0",
        "slat_migrations_total{result=\"failed\",reason=\"CONNECTION_LOST\"} 0",
        "slat_migrations_total{result=\"failed\",reason=\"OTHER\"} 0",
        "slat_migrations_total{result=\"lost\",reason=\"VM_PROCESS_DIED\"} 0",
        "slat_migration_downtime_seconds_count 0",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    // OpenMetrics: a counter's family is its name without _total, and no other family has it.
    let families: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    for counter in families
        .iter()
        .filter_map(|name| name.strip_suffix("_total"))
    {
        assert!(!families.contains(&counter), "{counter} is two families");
    }

    let source = Fake::new("hosts/a");
    source.put_vm(vm("vms/web", 64));
    source.set_clock(7200);
    let a = Agent::start(source, server.address()).await;
    let b = Agent::start(Fake::new("hosts/b"), server.address()).await;
    let mut clients = Clients::new(server.address());

    let name = clients.migrate("vms/web", "hosts/b").await.unwrap().name;
    a.fake.wait_call("start").await;
    hand_over(&a.fake, &b.fake, &name, "vms/web");
    clients.wait_phase(&name, Phase::Completed).await;
    let cancelled = clients.migrate("vms/web", "hosts/a").await.unwrap().name;
    b.fake.wait_call(&format!("start {cancelled}")).await;
    clients.cancel(&cancelled).await.unwrap();
    clients.wait_phase(&cancelled, Phase::Cancelled).await;

    let wanted = [
        "slat_migrations_total{result=\"completed\",reason=\"\"} 1",
        "slat_migrations_total{result=\"cancelled\",reason=\"\"} 1",
        "slat_migration_downtime_seconds_bucket{le=\"0.01\"} 0",
        "slat_migration_downtime_seconds_bucket{le=\"0.025\"} 1",
        "slat_migration_in_doubt 0",
        "slat_migrations_active{phase=\"precopy_active\"} 0",
        "slat_hosts{state=\"ready\"} 2",
        "slat_vms{state=\"running\"} 1",
        "slat_host_last_report_timestamp_seconds{host=\"a\"}",
        "slat_vm_name_conflicts 0",
        // Two hours, to the accuracy of the measurement.
        "slat_host_clock_offset_seconds{host=\"a\"} 7",
        "slat_build_info{version=\"9.9.9\",role=\"server\"} 1",
    ];
    for line in wanted {
        until(line, async || scrape(server.address()).await.contains(line)).await;
    }
    // A second VM of the name, at the host where the first was.
    let mut twin = vm("vms/web", 64);
    twin.uid = "twin".into();
    a.fake.put_vm(twin);
    for line in ["slat_vm_name_conflicts 1", "slat_vms{state=\"running\"} 2"] {
        until(line, async || scrape(server.address()).await.contains(line)).await;
    }
    server.stop().await;
    a.stop().await;
    b.stop().await;
}
