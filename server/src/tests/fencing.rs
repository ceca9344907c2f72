//! A fence that is ordered while the server stops begins nothing.

use std::{path::PathBuf, time::Duration};

use slat_proto::{
    ApiError, Reason,
    transport::connect,
    v1::{self, fleet_service_client::FleetServiceClient},
};

use crate::{FenceHook, Server, ServerConfig};

async fn start(state: &std::path::Path) -> Server {
    Server::start(ServerConfig {
        credentials: None,
        access: slat_proto::transport::Access::default(),
        listen: "127.0.0.1:0".parse().unwrap(),
        state_dir: state.to_owned(),
        report_interval: Duration::from_secs(1),
        host_silence: None,
        render: None,
        version: "test".to_owned(),
        retention: crate::Retention::default(),
        fence: Some(FenceHook {
            program: PathBuf::from("/bin/true"),
            timeout: Duration::from_secs(60),
        }),
    })
    .await
    .unwrap()
}

async fn register(server: &Server, host: v1::Host) -> Result<(), ApiError> {
    let channel = connect(&server.address().to_string().parse().unwrap()).unwrap();
    let request = v1::RegisterHostRequest { host: Some(host) };
    let answer = FleetServiceClient::new(channel)
        .register_host(request)
        .await;
    answer.map(drop).map_err(ApiError::from)
}

fn host() -> v1::Host {
    v1::Host {
        name: "hosts/a".into(),
        address: "127.0.0.1:1".into(),
        incarnation: "one".into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_comes_while_the_server_stops_is_refused() {
    let directory = slat_test_dir::TestDir::new();
    let server = start(directory.path()).await;
    register(&server, host()).await.unwrap();
    server.fences.stop().await;
    let refused = server.fences.fence("hosts/a", true, "test").await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.reason, Reason::FenceFailed);
    assert!(refused.message.contains("the server stops"), "{refused}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_of_an_agent_is_named_so_that_it_can_be_fenced() {
    let directory = slat_test_dir::TestDir::new();
    let server = start(directory.path()).await;
    let long = "x".repeat(65);
    for incarnation in ["", "a\0b", "a b", "a\nb", "\u{e4}", &long] {
        let odd = v1::Host {
            incarnation: incarnation.into(),
            ..host()
        };
        let refused = register(&server, odd).await.unwrap_err();
        assert_eq!(refused.reason, Reason::BadParameter, "{incarnation:?}");
        assert_eq!(refused.metadata["field"], "host.incarnation");
    }
    for address in ["unix:/a\0b", "a\0b:1"] {
        let odd = v1::Host {
            address: address.into(),
            ..host()
        };
        let refused = register(&server, odd).await.unwrap_err();
        assert_eq!(refused.reason, Reason::BadParameter, "{address:?}");
    }
    register(&server, host()).await.unwrap();
    server.fences.fence("hosts/a", true, "test").await.unwrap();
    server.stop().await;
}
