//! Hosts, VMs and the dashboard through a real server over real sockets.

mod support;

use std::net::SocketAddr;

use slat_proto::{
    Reason,
    v1::{
        self, fleet_service_client::FleetServiceClient, host::State as HostState,
        host_service_client::HostServiceClient, memory_service_client::MemoryServiceClient,
        vm::State,
    },
};
use support::{Agent, Clients, Fake, answer, channel, server, until, vm};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

fn create(id: &str, mib: u64, host: &str) -> v1::CreateVmRequest {
    v1::CreateVmRequest {
        vm_id: id.into(),
        spec: Some(v1::VmSpec {
            memory_bytes: mib << 20,
            vcpus: 1,
            ..Default::default()
        }),
        host: host.into(),
        validate_only: false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_are_placed_routed_and_forgotten() {
    let state = slat_test_dir::TestDir::new();
    let server = server(state.path()).await;
    let mut clients = Clients::new(server.address());
    let none = answer(clients.vms.create_vm(create("web", 64, "")).await).unwrap_err();
    assert_eq!(none.reason, Reason::NoHost);

    let busy = Fake::new("hosts/a");
    busy.put_vm(vm("vms/old", 256));
    let a = Agent::start(busy, server.address()).await;
    let b = Agent::start(Fake::new("hosts/b"), server.address()).await;

    // The host with most free memory; the VM is there for whoever asks next.
    let made = answer(clients.vms.create_vm(create("web", 64, "")).await).unwrap();
    assert_eq!(
        (made.host.as_str(), made.state()),
        ("hosts/b", State::Created)
    );
    let started = v1::StartVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    let started = answer(clients.vms.start_vm(started).await).unwrap();
    assert_eq!(started.state(), State::Running);
    assert_eq!(b.fake.vm("vms/web").unwrap().state(), State::Running);

    // A name is taken wherever it is.
    for host in ["", "hosts/a", "hosts/b"] {
        let twice = answer(clients.vms.create_vm(create("old", 64, host)).await).unwrap_err();
        assert_eq!(twice.reason, Reason::VmExists);
        assert_eq!(twice.metadata["host"], "hosts/a");
    }
    let large = answer(clients.vms.create_vm(create("large", 1000, "")).await).unwrap_err();
    assert_eq!(large.reason, Reason::NoHost);
    let named = answer(clients.vms.create_vm(create("second", 64, "hosts/a")).await).unwrap();
    assert_eq!(named.host, "hosts/a");
    for (id, host, reason) in [
        ("x", "hosts/none", Reason::NoSuchHost),
        ("Bad", "", Reason::BadParameter),
        ("x", "hosts/Bad", Reason::BadParameter),
    ] {
        let error = answer(clients.vms.create_vm(create(id, 64, host)).await).unwrap_err();
        assert_eq!(error.reason, reason);
    }

    let list = v1::ListVmsRequest::default();
    let list = answer(clients.vms.list_vms(list).await).unwrap();
    let names: Vec<&str> = list.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["vms/old", "vms/second", "vms/web"]);
    assert!(list.unreachable.is_empty());

    let mut memory = MemoryServiceClient::new(channel(server.address()));
    let slots = v1::ListSlotsRequest {
        vm: "vms/web".into(),
        ..Default::default()
    };
    assert_eq!(
        answer(memory.list_slots(slots).await).unwrap().slots.len(),
        1
    );
    // An agent's refusal arrives as it left.
    let update = v1::UpdateSlotsRequest {
        vm: "vms/web".into(),
        changes: vec![v1::SlotChange {
            change: Some(v1::slot_change::Change::Delete(v1::slot_change::Delete {
                slot: 3,
            })),
        }],
        ..Default::default()
    };
    let refused = answer(memory.update_slots(update).await).unwrap_err();
    assert_eq!(refused.reason, Reason::BadSlotTable);
    assert_eq!(refused.metadata["slot"], "3");

    let delete = v1::DeleteVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    answer(clients.vms.delete_vm(delete).await).unwrap();
    assert_eq!(
        clients.vm("vms/web").await.unwrap_err().reason,
        Reason::NoSuchVm
    );
    assert_eq!(
        clients.vm("vms/none").await.unwrap_err().reason,
        Reason::NoSuchVm
    );
    server.stop().await;
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_creates_of_one_name_one_is_taken() {
    let state = slat_test_dir::TestDir::new();
    let server = server(state.path()).await;
    let a = Agent::start(Fake::new("hosts/a"), server.address()).await;
    let b = Agent::start(Fake::new("hosts/b"), server.address()).await;
    let attempts: Vec<_> = (0..8)
        .map(|_| {
            let mut clients = Clients::new(server.address());
            tokio::spawn(async move { answer(clients.vms.create_vm(create("web", 64, "")).await) })
        })
        .collect();
    let mut made = 0;
    for attempt in attempts {
        match attempt.await.unwrap() {
            Ok(_) => made += 1,
            Err(error) => assert_eq!(error.reason, Reason::VmExists),
        }
    }
    assert_eq!(made, 1);
    assert_eq!(a.fake.calls().len() + b.fake.calls().len(), 1);
    server.stop().await;
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_falls_silent_is_named() {
    let state = slat_test_dir::TestDir::new();
    let first = server(state.path()).await;
    let source = Fake::new("hosts/a");
    source.put_vm(vm("vms/web", 64));
    let a = Agent::start(source, first.address()).await;
    let mut clients = Clients::new(first.address());
    clients.vm("vms/web").await.unwrap();
    a.stop().await;
    until("the host is unreachable", async || {
        let mut hosts = HostServiceClient::new(channel(first.address()));
        let host = v1::GetHostRequest {
            name: "hosts/a".into(),
        };
        answer(hosts.get_host(host).await).unwrap().state() == HostState::Unreachable
    })
    .await;
    // What was last seen is shown, and said to be old; nothing can be done with it.
    let old = clients.vm("vms/web").await.unwrap();
    assert!(old.stale && old.last_seen_time.is_some());
    assert_eq!(old.state(), State::Running);
    let pause = v1::PauseVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    let error = answer(clients.vms.pause_vm(pause).await).unwrap_err();
    assert_eq!(error.reason, Reason::HostUnreachable);
    assert_eq!(error.metadata["host"], "hosts/a");
    let list = clients.list().await;
    assert!(list.vms[0].stale);
    assert_eq!(list.unreachable, ["hosts/a"]);
    assert!(list.unreported.is_empty());
    first.stop().await;

    // After a restart host and VM are known as they were last seen.
    let second = server(state.path()).await;
    let mut clients = Clients::new(second.address());
    let kept = clients.vm("vms/web").await.unwrap();
    assert_eq!(kept.uid, old.uid);
    assert_eq!((kept.epoch, kept.state()), (old.epoch, old.state()));
    assert!(kept.stale && kept.last_seen_time.is_some());
    let list = clients.list().await;
    assert_eq!(list.vms.len(), 1);
    assert_eq!(list.unreported, ["hosts/a"]);
    let report = v1::ReportHostRequest {
        host: "hosts/a".into(),
        incarnation: "1".into(),
        ..Default::default()
    };
    let mut fleet = FleetServiceClient::new(channel(second.address()));
    let stale = answer(fleet.report_host(report).await).unwrap_err();
    assert_eq!(stale.reason, Reason::StaleIncarnation);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_when_its_vm_is_gone() {
    let state = slat_test_dir::TestDir::new();
    let server = server(state.path()).await;
    let source = Fake::new("hosts/a");
    source.put_vm(vm("vms/web", 64));
    let a = Agent::start(source, server.address()).await;
    let mut clients = Clients::new(server.address());
    let watch = v1::WatchVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    let mut updates = answer(clients.vms.watch_vm(watch).await).unwrap();
    let first = updates.message().await.unwrap().unwrap();
    assert_eq!(first.host, "hosts/a");
    a.fake.remove_vm("vms/web");
    let end = async { while updates.message().await.unwrap().is_some() {} };
    tokio::time::timeout(support::PATIENCE, end).await.unwrap();
    server.stop().await;
    a.stop().await;
}

/// Head and body of a GET.
async fn get(server: SocketAddr, path: &str, header: &str) -> (String, String) {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_ascii_lowercase(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dashboard_is_self_contained_and_shows_what_agents_reported() {
    let state = slat_test_dir::TestDir::new();
    let server = server(state.path()).await;
    let source = Fake::new("hosts/a");
    source.put_vm(vm("vms/web", 64));
    let a = Agent::start(source, server.address()).await;
    let at = server.address();

    for path in ["/healthz", "/livez", "/readyz"] {
        assert_eq!(get(at, path, "").await.1, "ok\n");
    }
    let (head, body) = get(at, "/metrics", "").await;
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    assert_eq!(body, "slat_test 1\n");

    let (head, page) = get(at, "/", "").await;
    assert!(head.contains("content-security-policy: default-src 'none'; script-src 'self';"));
    for (path, kind) in [
        ("/assets/app.js", "text/javascript"),
        ("/assets/dom.js", "text/javascript"),
        ("/assets/charts.js", "text/javascript"),
        ("/assets/overview.js", "text/javascript"),
        ("/assets/lists.js", "text/javascript"),
        ("/assets/move.js", "text/javascript"),
        ("/assets/app.css", "text/css"),
        ("/assets/icon.svg", "image/svg+xml"),
    ] {
        let (head, body) = get(at, path, "").await;
        assert!(head.contains(kind), "{head}");
        // No address outside the server; the SVG namespace is a name, not an address.
        let rest = body.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !rest.contains("http://") && !rest.contains("https://"),
            "{path}"
        );
        // What came from outside is written as text, never as markup.
        for markup in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
        ] {
            assert!(!rest.contains(markup), "{path}: {markup}");
        }
    }
    assert!(!page.contains("http://") && !page.contains("https://"));

    let (head, library) = get(at, "/assets/plotly.min.js", "").await;
    assert!(head.contains("cache-control: public"));
    assert!(library.len() > 1 << 20);
    let tag = head
        .lines()
        .find_map(|line| line.strip_prefix("etag: "))
        .unwrap();
    let (head, body) = get(
        at,
        "/assets/plotly.min.js",
        &format!("If-None-Match: {tag}\r\n"),
    )
    .await;
    assert!(head.starts_with("http/1.1 304") && body.is_empty());

    let json = async |path: &str| -> serde_json::Value {
        let (_, body) = get(at, path, "").await;
        serde_json::from_str(&body).unwrap()
    };
    let now = json("/api/state").await;
    assert_eq!(now["totals"]["hosts"]["READY"], 1);
    assert_eq!(now["totals"]["vms"]["RUNNING"], 1);
    assert_eq!(now["problems"], serde_json::json!([]));
    let hosts = json("/api/hosts").await;
    assert_eq!(hosts["rows"][0]["name"], "hosts/a");
    assert_eq!(hosts["rows"][0]["state"], "READY");
    let vms = json("/api/vms?state=RUNNING").await;
    assert_eq!(vms["rows"][0]["name"], "vms/web");
    // Not offered is null, never 0.
    assert!(vms["rows"][0]["rates"]["flushes"].is_null());
    let backing = &vms["rows"][0]["backing"];
    assert_eq!(backing["asked"], "AUTO");
    assert!(backing["bytes_1g"].is_null(), "{backing}");
    let (_, lists) = get(at, "/assets/lists.js", "").await;
    for field in backing.as_object().unwrap().keys() {
        assert!(
            lists.contains(&format!("made.{field}")),
            "the page shows {field}"
        );
    }
    assert_eq!(json("/api/vms?q=other").await["matched"], 0);
    let rates = json("/api/rates?of=vms&rate=flushes").await;
    assert_eq!(
        (&rates["total"], &rates["unit"]),
        (&0.into(), &"flushes/s".into())
    );
    for path in ["/api/rates?of=vms&rate=x", "/api/rates?of=x&rate=faults"] {
        let (head, body) = get(at, path, "").await;
        assert!(head.starts_with("http/1.1 400"), "{head}");
        assert!(body.contains("is one of"), "{body}");
    }
    let (head, _) = get(at, "/api/migrations/none", "").await;
    assert!(head.starts_with("http/1.1 404"), "{head}");
    let (head, _) = get(at, "/api/migrations/A%20b", "").await;
    assert!(head.starts_with("http/1.1 400"), "{head}");
    server.stop().await;
    a.stop().await;
}

/// A host whose agent reports, and whose endpoint closes each connection when a call is in it.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_in_mid_call_is_its_host_unreachable() {
    let state = slat_test_dir::TestDir::new();
    let server = server(state.path()).await;
    let mut clients = Clients::new(server.address());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dying = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // The call has come; nobody answers it.
            drop(stream.read(&mut [0; 4096]).await);
        }
    });
    let mut fleet = FleetServiceClient::new(channel(server.address()));
    let host = v1::Host {
        name: "hosts/a".into(),
        address: address.to_string(),
        incarnation: "1".into(),
        memory_bytes: 1 << 30,
        ..Default::default()
    };
    let request = v1::RegisterHostRequest { host: Some(host) };
    fleet.register_host(request).await.unwrap();
    let report = v1::ReportHostRequest {
        host: "hosts/a".into(),
        incarnation: "1".into(),
        vms: vec![vm("vms/web", 64)],
        ..Default::default()
    };
    fleet.report_host(report).await.unwrap();
    let pause = v1::PauseVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    let error = answer(clients.vms.pause_vm(pause).await).unwrap_err();
    assert_eq!(error.reason, Reason::HostUnreachable, "{error}");
    assert_eq!(error.metadata["host"], "hosts/a");
    assert!(!error.metadata["advice"].is_empty());
    let mut memory = MemoryServiceClient::new(channel(server.address()));
    let slots = v1::ListSlotsRequest {
        vm: "vms/web".into(),
        ..Default::default()
    };
    let error = answer(memory.list_slots(slots).await).unwrap_err();
    assert_eq!(error.reason, Reason::HostUnreachable, "{error}");
    dying.abort();
    server.stop().await;
}

/// A host whose kernel cannot watch VMs is passed by, and named with its reason.
#[tokio::test(flavor = "multi_thread")]
async fn vms_that_are_to_be_watched_go_where_they_can_be() {
    let state = slat_test_dir::TestDir::new();
    let server = server(state.path()).await;
    let mut clients = Clients::new(server.address());
    let fake = |name: &str, can: bool| {
        let mut fake = Fake::new(name);
        fake.paging = Some(v1::HostPaging {
            can_watch: can,
            can_protect: can,
            message: if can { "" } else { "no userfaultfd" }.into(),
        });
        fake
    };
    let a = Agent::start(fake("hosts/a", false), server.address()).await;
    let create = |id: &str, host: &str, paging: v1::Paging| {
        let mut request = create(id, 64, host);
        let spec = request.spec.as_mut().unwrap();
        spec.paging = paging.into();
        request
    };
    let (agent, kernel) = (v1::Paging::Agent, v1::Paging::Kernel);
    for host in ["", "hosts/a"] {
        let call = clients.vms.create_vm(create("web", host, agent));
        let none = answer(call.await).unwrap_err();
        assert_eq!(none.reason, Reason::CapabilityMissing);
        assert!(none.message.contains("hosts/a: no userfaultfd"), "{none}");
        assert_eq!(none.metadata["capability"], "CAPABILITY_PAGING");
    }
    let busy = fake("hosts/b", true);
    let mut paged = vm("vms/paged", 512);
    let spec = paged.spec.as_mut().unwrap();
    spec.set_paging(agent);
    spec.set_backend(v1::Backend::Kvm);
    spec.set_format(v1::Format::Unspecified);
    busy.put_vm(paged);
    let b = Agent::start(busy, server.address()).await;
    let made = answer(clients.vms.create_vm(create("web", "", agent)).await).unwrap();
    assert_eq!(made.host, "hosts/b", "though less is free there");
    let other = answer(clients.vms.create_vm(create("other", "", kernel)).await).unwrap();
    assert_eq!(other.host, "hosts/a");
    let stays = clients.migrate("vms/paged", "hosts/a").await.unwrap_err();
    assert_eq!(stays.reason, Reason::CapabilityMissing);
    assert!(stays.message.contains("hosts/a: no userfaultfd"), "{stays}");
    assert_eq!(stays.metadata["vm_location"], "SOURCE");
    let shown = clients.host("hosts/a").await.paging.unwrap();
    assert_eq!(shown.message, "no userfaultfd");
    a.stop().await;
    b.stop().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_and_protection_of_a_host_are_shown_and_nonsense_is_refused() {
    let state = slat_test_dir::TestDir::new();
    let server = server(state.path()).await;
    let mut clients = Clients::new(server.address());
    let mut fleet = FleetServiceClient::new(channel(server.address()));
    let labels = |key: &str| std::collections::HashMap::from([(key.to_owned(), "r1".to_owned())]);
    let trust = |message: &str| v1::HostTrust {
        tls: true,
        identity: "spiffe://example.org/slat/agent/a".into(),
        message: message.into(),
        ..Default::default()
    };
    let host = |key: &str| v1::RegisterHostRequest {
        host: Some(v1::Host {
            name: "hosts/a".into(),
            address: "127.0.0.1:1".into(),
            incarnation: "1".into(),
            labels: labels(key),
            trust: Some(trust("")),
            ..Default::default()
        }),
    };
    let refused = answer(fleet.register_host(host("Rack")).await).unwrap_err();
    assert_eq!(refused.reason, Reason::BadParameter);
    let told = answer(fleet.register_host(host("rack")).await).unwrap();
    assert_eq!(told.grant_keys.len(), 1);
    let get = || v1::GetHostRequest {
        name: "hosts/a".into(),
    };
    let shown = answer(clients.hosts.get_host(get()).await).unwrap();
    assert_eq!(
        (shown.labels, shown.trust),
        (labels("rack"), Some(trust("")))
    );
    let report = |trust| v1::ReportHostRequest {
        host: "hosts/a".into(),
        incarnation: "1".into(),
        trust,
        ..Default::default()
    };
    let long = "x".repeat(10_000);
    let told = answer(fleet.report_host(report(Some(trust(&long)))).await).unwrap();
    assert_eq!(told.grant_keys.len(), 1);
    let shown = answer(clients.hosts.get_host(get()).await).unwrap();
    assert_eq!(shown.trust, Some(trust(&long[..500])));
    // An agent that says nothing of it has not lost it.
    answer(fleet.report_host(report(None)).await).unwrap();
    let shown = answer(clients.hosts.get_host(get()).await).unwrap();
    assert_eq!(shown.trust, Some(trust(&long[..500])));
    server.stop().await;
}
