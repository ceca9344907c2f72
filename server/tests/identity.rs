//! A VM is its uid, and a host its agent: twins, second agents, hosts that cannot be called back,
//! and what is left on them, through a real server over real sockets.

mod support;

use slat_proto::{
    ApiError, Reason,
    v1::{
        self, fleet_service_client::FleetServiceClient, host::State as HostState,
        leftover::Kind as Left, memory_service_client::MemoryServiceClient, vm::State,
    },
};
use slat_server::Server;
use slat_test_dir::TestDir;
use support::{Agent, Clients, Fake, answer, channel, server, until, vm};

const WEB: &str = "vms/web";

/// A server and agents a and b.
struct Fleet {
    state: TestDir,
    server: Server,
    a: Agent,
    b: Agent,
    clients: Clients,
}

impl Fleet {
    async fn start(on_a: Vec<v1::Vm>, on_b: Vec<v1::Vm>) -> Self {
        let state = slat_test_dir::TestDir::new();
        let server = server(state.path()).await;
        let (a, b) = (Fake::new("hosts/a"), Fake::new("hosts/b"));
        on_a.into_iter().for_each(|vm| a.put_vm(vm));
        on_b.into_iter().for_each(|vm| b.put_vm(vm));
        let a = Agent::start(a, server.address()).await;
        let b = Agent::start(b, server.address()).await;
        let clients = Clients::new(server.address());
        Self {
            state,
            server,
            a,
            b,
            clients,
        }
    }

    /// Ends agent a; in its place stands one that nobody knows.
    async fn stop_a(&mut self) -> (Fake, std::net::SocketAddr) {
        let nobody = Agent::serve(Fake::new("hosts/nobody")).await;
        std::mem::replace(&mut self.a, nobody).stop().await
    }

    async fn stop(self) {
        self.server.stop().await;
        self.a.stop().await;
        self.b.stop().await;
    }

    async fn create(&mut self, id: &str, host: &str) -> Result<v1::Vm, ApiError> {
        let request = v1::CreateVmRequest {
            vm_id: id.into(),
            spec: Some(v1::VmSpec {
                memory_bytes: 64 << 20,
                vcpus: 1,
                ..Default::default()
            }),
            host: host.into(),
            validate_only: false,
        };
        answer(self.clients.vms.create_vm(request).await)
    }

    async fn cordon(&mut self, host: &str) -> Result<v1::Host, ApiError> {
        let request = v1::CordonHostRequest { name: host.into() };
        answer(self.clients.hosts.cordon_host(request).await)
    }

    async fn delete_host(
        &mut self,
        host: &str,
        give_up_vms: bool,
    ) -> Result<Vec<v1::Vm>, ApiError> {
        let request = v1::DeleteHostRequest {
            name: host.into(),
            give_up_vms,
        };
        let deleted = answer(self.clients.hosts.delete_host(request).await);
        deleted.map(|deleted| deleted.vms)
    }
}

async fn until_state(clients: &Clients, host: &str, state: HostState) {
    until("the host's state", async || {
        let mut hosts = clients.hosts.clone();
        let request = v1::GetHostRequest { name: host.into() };
        answer(hosts.get_host(request).await).unwrap().state() == state
    })
    .await;
}

fn twin(uid: &str) -> v1::Vm {
    v1::Vm {
        uid: uid.into(),
        ..vm(WEB, 64)
    }
}

/// Registers by hand.
async fn register(server: &Server, host: v1::Host) -> Result<(), ApiError> {
    let mut fleet = FleetServiceClient::new(channel(server.address()));
    let register = v1::RegisterHostRequest { host: Some(host) };
    answer(fleet.register_host(register).await).map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn twins_are_shown_and_every_call_by_their_name_is_refused() {
    let mut fleet = Fleet::start(vec![twin("u1")], vec![twin("u2")]).await;
    let list = fleet.clients.list().await;
    let shown: Vec<(&str, &str, &str)> = list
        .vms
        .iter()
        .map(|vm| {
            (
                vm.uid.as_str(),
                vm.conflicts[0].uid.as_str(),
                vm.conflicts[0].host.as_str(),
            )
        })
        .collect();
    assert_eq!(shown, [("u1", "u2", "hosts/b"), ("u2", "u1", "hosts/a")]);
    // One a page: neither is skipped.
    let request = v1::ListVmsRequest {
        page_size: 1,
        ..Default::default()
    };
    let page = answer(fleet.clients.vms.list_vms(request.clone()).await).unwrap();
    let next = v1::ListVmsRequest {
        page_token: page.next_page_token,
        ..request
    };
    let next = answer(fleet.clients.vms.list_vms(next).await).unwrap();
    assert_eq!(
        (page.vms[0].uid.as_str(), next.vms[0].uid.as_str()),
        ("u1", "u2")
    );
    assert_eq!(next.next_page_token, "");

    macro_rules! refused {
        ($($call:expr),* $(,)?) => {$(
            let error = answer($call.await).unwrap_err();
            assert_eq!(error.reason, Reason::NameConflict, stringify!($call));
            assert_eq!(error.metadata["uids"], "u1,u2");
            assert_eq!(error.metadata["hosts"], "hosts/a,hosts/b");
            assert!(error.metadata["advice"].contains("uid"));
        )*};
    }
    macro_rules! named {
        ($request:ident, $field:ident) => {
            v1::$request {
                $field: WEB.into(),
                ..Default::default()
            }
        };
    }
    let vms = &mut fleet.clients.vms;
    refused!(
        vms.get_vm(named!(GetVmRequest, name)),
        vms.watch_vm(named!(WatchVmRequest, name)),
        vms.start_vm(named!(StartVmRequest, name)),
        vms.pause_vm(named!(PauseVmRequest, name)),
        vms.resume_vm(named!(ResumeVmRequest, name)),
        vms.delete_vm(named!(DeleteVmRequest, name)),
    );
    let mut memory = MemoryServiceClient::new(channel(fleet.server.address()));
    let change = v1::UpdateSlotsRequest {
        changes: vec![v1::SlotChange {
            change: Some(v1::slot_change::Change::Delete(v1::slot_change::Delete {
                slot: 3,
            })),
        }],
        ..named!(UpdateSlotsRequest, vm)
    };
    refused!(
        memory.list_slots(named!(ListSlotsRequest, vm)),
        memory.update_slots(change),
        memory.harvest_dirty_pages(named!(HarvestDirtyPagesRequest, vm)),
        memory.delete_dirty_cursor(named!(DeleteDirtyCursorRequest, vm)),
        memory.invalidate_memory(named!(InvalidateMemoryRequest, vm)),
        memory.discard_memory(named!(DiscardMemoryRequest, vm)),
        memory.digest_memory(named!(DigestMemoryRequest, vm)),
    );
    let error = fleet.clients.migrate(WEB, "hosts/b").await.unwrap_err();
    assert_eq!(error.reason, Reason::NameConflict);

    // By uid or by host it is that one and no other.
    let pause = v1::PauseVmRequest {
        uid: "u2".into(),
        ..Default::default()
    };
    answer(fleet.clients.vms.pause_vm(pause).await).unwrap();
    assert_eq!(fleet.b.fake.vm(WEB).unwrap().state(), State::Paused);
    assert_eq!(fleet.a.fake.vm(WEB).unwrap().state(), State::Running);
    let slots = v1::ListSlotsRequest {
        vm: WEB.into(),
        host: "a".into(),
        ..Default::default()
    };
    answer(memory.list_slots(slots).await).unwrap();
    let forced = v1::DeleteVmRequest {
        name: WEB.into(),
        host: "hosts/a".into(),
        force: true,
        ..Default::default()
    };
    let forced = answer(fleet.clients.vms.delete_vm(forced).await).unwrap_err();
    assert_eq!(forced.reason, Reason::BadParameter);
    assert_eq!(forced.metadata["field"], "uid");
    let delete = v1::DeleteVmRequest {
        name: WEB.into(),
        host: "hosts/a".into(),
        ..Default::default()
    };
    answer(fleet.clients.vms.delete_vm(delete).await).unwrap();
    assert!(fleet.a.fake.vm(WEB).is_none());
    // What is left is the one that is meant.
    let left = fleet.clients.vm(WEB).await.unwrap();
    assert_eq!(left.uid, "u2");
    assert!(left.conflicts.is_empty());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_follows_its_own_vm_whoever_gets_its_name() {
    let mut fleet = Fleet::start(vec![twin("u1")], vec![]).await;
    let watch = v1::WatchVmRequest {
        name: WEB.into(),
        ..Default::default()
    };
    let mut updates = answer(fleet.clients.vms.watch_vm(watch).await).unwrap();
    assert_eq!(updates.message().await.unwrap().unwrap().uid, "u1");
    fleet.b.fake.put_vm(twin("u2"));
    until("both are known", async || {
        let mut vms = fleet.clients.vms.clone();
        let list = vms.list_vms(v1::ListVmsRequest::default()).await;
        answer(list).unwrap().vms.len() == 2
    })
    .await;
    fleet.a.fake.remove_vm(WEB);
    let end = async {
        while let Some(update) = updates.message().await.unwrap() {
            assert_eq!(update.uid, "u1");
        }
    };
    tokio::time::timeout(support::PATIENCE, end).await.unwrap();
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_keeps_the_names_of_hosts_that_do_not_report() {
    let mut fleet = Fleet::start(vec![twin("u1")], vec![vm("vms/db", 64)]).await;
    let made = fleet.create("new", "hosts/a").await.unwrap();
    let (a, at) = fleet.stop_a().await;
    fleet.server.stop().await;
    fleet.server = server(fleet.state.path()).await;
    fleet.clients = Clients::new(fleet.server.address());

    // Before anybody reports: everything is there, and said to be old.
    let list = fleet.clients.list().await;
    let shown: Vec<(&str, &str, bool)> = list
        .vms
        .iter()
        .map(|vm| (vm.name.as_str(), vm.uid.as_str(), vm.stale))
        .collect();
    assert_eq!(
        shown,
        [
            ("vms/db", "uid-vms/db", true),
            ("vms/new", made.uid.as_str(), true),
            (WEB, "u1", true)
        ]
    );
    assert_eq!(list.vms[2].spec.as_ref().unwrap().memory_bytes, 64 << 20);
    assert!(list.vms[2].mmu_stats.is_none(), "statistics are not kept");
    assert_eq!(list.unreported, ["hosts/a", "hosts/b"]);

    // One of them reports. What it does not have any more is gone, the other's names are taken.
    fleet.b.fake.remove_vm("vms/db");
    fleet.b.report_to(fleet.server.address()).await;
    let list = fleet.clients.list().await;
    assert_eq!(list.unreported, ["hosts/a"]);
    assert_eq!(list.vms.len(), 2);
    for id in ["web", "new"] {
        let taken = fleet.create(id, "hosts/b").await.unwrap_err();
        assert_eq!(taken.reason, Reason::VmExists);
        assert_eq!(taken.metadata["host"], "hosts/a");
        assert!(taken.metadata.contains_key("last_seen"));
    }
    fleet.create("db", "hosts/b").await.unwrap();

    // Back, it is as it says.
    let nobody = std::mem::replace(&mut fleet.a, Agent::serve_at(a, at).await);
    nobody.stop().await;
    fleet.a.report_to(fleet.server.address()).await;
    let web = fleet.clients.vm(WEB).await.unwrap();
    assert!(!web.stale);
    assert!(fleet.clients.list().await.unreported.is_empty());

    // And a deleted VM does not come back with the next restart.
    let delete = v1::DeleteVmRequest {
        name: WEB.into(),
        ..Default::default()
    };
    answer(fleet.clients.vms.delete_vm(delete).await).unwrap();
    fleet.server.stop().await;
    fleet.server = server(fleet.state.path()).await;
    fleet.clients = Clients::new(fleet.server.address());
    let names: Vec<String> = fleet
        .clients
        .list()
        .await
        .vms
        .into_iter()
        .map(|vm| vm.name)
        .collect();
    assert_eq!(names, ["vms/db", "vms/new"]);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_of_a_name_is_refused_and_shown_and_the_first_goes_on() {
    let mut fleet = Fleet::start(vec![twin("u1")], vec![]).await;
    let mut second = Fake::new("hosts/a");
    second.uid = "second".into();
    let second = Agent::serve(second).await;
    let host = v1::Host {
        address: second.address.to_string(),
        ..second.fake.host()
    };
    for _ in 0..5 {
        let refused = register(&fleet.server, host.clone()).await.unwrap_err();
        assert_eq!(refused.reason, Reason::HostNameTaken);
        assert_eq!(refused.metadata["host"], "hosts/a");
        assert_eq!(refused.metadata["address"], fleet.a.address.to_string());
        assert_eq!(refused.metadata["uid"], "agent-of-hosts/a");
        // Nothing flaps.
        let shown = fleet.clients.vm(WEB).await.unwrap();
        assert_eq!((shown.host.as_str(), shown.stale), ("hosts/a", false));
    }
    let shown = fleet.clients.host("hosts/a").await;
    assert_eq!(shown.state(), HostState::Ready);
    assert_eq!(shown.address, fleet.a.address.to_string());
    assert_eq!(shown.contender, format!("{} (second)", second.address));
    assert!(shown.state_message.contains(&shown.contender));
    second.stop().await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_be_called_back_is_not_ready_and_says_why() {
    let mut fleet = Fleet::start(vec![vm(WEB, 64)], vec![vm("vms/large", 900)]).await;
    let at = |address: String, name: &str| v1::Host {
        address,
        ..Fake::new(name).host()
    };
    let server_at = fleet.server.address().to_string();
    for (name, address, why) in [
        ("hosts/c", "no-such-host.invalid:7401".to_owned(), "lookup"),
        ("hosts/d", "127.0.0.1:1".to_owned(), "refused"),
        ("hosts/e", fleet.a.address.to_string(), "answers as hosts/a"),
        ("hosts/f", server_at, "does not answer as an agent"),
    ] {
        register(&fleet.server, at(address.clone(), name))
            .await
            .unwrap();
        let report = v1::ReportHostRequest {
            host: name.into(),
            incarnation: "1".into(),
            ..Default::default()
        };
        let mut reports = FleetServiceClient::new(channel(fleet.server.address()));
        answer(reports.report_host(report).await).unwrap();
        let host = fleet.clients.host(name).await;
        assert_eq!(host.state(), HostState::Unreachable, "{name}");
        assert!(host.reported);
        let message = host.state_message.to_lowercase();
        assert!(message.contains(why), "{name}: {message}");
        assert!(message.contains(&address), "{name}: {message}");
        let refused = fleet.create("x", name).await.unwrap_err();
        assert_eq!(refused.reason, Reason::HostUnreachable);
        assert_eq!(refused.metadata["cause"], host.state_message);
        let refused = fleet.clients.migrate(WEB, name).await.unwrap_err();
        assert_eq!(refused.reason, Reason::HostUnreachable);
    }
    // Placement chooses the one that can be reached, though others have more memory.
    assert_eq!(fleet.create("y", "").await.unwrap().host, "hosts/a");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_checked_as_long_as_it_reports() {
    let fleet = Fleet::start(vec![], vec![]).await;
    let mut other = fleet.a.fake.host();
    other.incarnation = "another".into();
    fleet.a.fake.answer_as(Some(other));
    until_state(&fleet.clients, "hosts/a", HostState::Unreachable).await;
    let mut clients = Clients::new(fleet.server.address());
    let shown = clients.host("hosts/a").await;
    assert!(shown.state_message.contains("another start"), "{shown:?}");
    assert_eq!(clients.host("hosts/b").await.state(), HostState::Ready);
    fleet.a.fake.answer_as(None);
    until_state(&fleet.clients, "hosts/a", HostState::Ready).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cordon_outlives_the_server_and_ends_by_order() {
    let mut fleet = Fleet::start(vec![vm(WEB, 64)], vec![]).await;
    assert!(fleet.cordon("hosts/b").await.unwrap().cordoned);
    assert!(fleet.cordon("b").await.unwrap().cordoned);
    assert_eq!(
        fleet.cordon("x").await.unwrap_err().reason,
        Reason::NoSuchHost
    );
    assert_eq!(fleet.create("one", "").await.unwrap().host, "hosts/a");
    fleet.server.stop().await;
    fleet.server = server(fleet.state.path()).await;
    fleet.clients = Clients::new(fleet.server.address());
    fleet.a.report_to(fleet.server.address()).await;
    fleet.b.report_to(fleet.server.address()).await;
    assert!(fleet.clients.host("hosts/b").await.cordoned);
    let refused = fleet.create("two", "hosts/b").await.unwrap_err();
    assert_eq!(refused.reason, Reason::HostCordoned);
    let refused = fleet.clients.migrate(WEB, "hosts/b").await.unwrap_err();
    assert_eq!(refused.reason, Reason::HostCordoned);
    // With the other cordoned too there is none, and it is said why.
    fleet.cordon("hosts/a").await.unwrap();
    let none = fleet.create("two", "").await.unwrap_err();
    assert_eq!(none.reason, Reason::NoHost);
    assert_eq!(none.metadata["cordoned_hosts"], "2");
    let request = v1::UncordonHostRequest {
        name: "hosts/b".into(),
    };
    let host = answer(fleet.clients.hosts.uncordon_host(request).await).unwrap();
    assert!(!host.cordoned);
    assert_eq!(fleet.create("two", "").await.unwrap().host, "hosts/b");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_forgotten_only_silent_and_with_its_vms_given_up() {
    let mut fleet = Fleet::start(vec![vm(WEB, 64)], vec![]).await;
    for give_up in [false, true] {
        let refused = fleet.delete_host("hosts/a", give_up).await.unwrap_err();
        assert_eq!(refused.reason, Reason::HostInUse);
        assert_eq!(refused.metadata["vms"], WEB);
    }
    let migration = fleet.clients.migrate(WEB, "hosts/b").await.unwrap().name;
    // Begun, it waits for its source; before that, a silent source would be its end.
    fleet.a.fake.wait_call(&format!("start {migration}")).await;
    let (a, at) = fleet.stop_a().await;
    until_state(&fleet.clients, "hosts/a", HostState::Unreachable).await;
    let refused = fleet.delete_host("hosts/a", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::HostInUse);
    assert_eq!(refused.metadata["migrations"], migration);
    let given_up = fleet.delete_host("hosts/a", true).await.unwrap();
    assert_eq!(given_up[0].name, WEB);
    let hosts = v1::ListHostsRequest::default();
    let hosts = answer(fleet.clients.hosts.list_hosts(hosts).await).unwrap();
    assert_eq!(hosts.hosts.len(), 1);
    let gone = fleet.delete_host("hosts/a", true).await.unwrap_err();
    assert_eq!(gone.reason, Reason::NoSuchHost);
    // Nothing of it comes back with the server, everything with its agent.
    fleet.server.stop().await;
    fleet.server = server(fleet.state.path()).await;
    fleet.clients = Clients::new(fleet.server.address());
    let list = fleet.clients.list().await;
    assert!(list.vms.iter().all(|vm| vm.host != "hosts/a"));
    assert_eq!(list.unreported, ["hosts/b"]);
    let nobody = std::mem::replace(&mut fleet.a, Agent::serve_at(a, at).await);
    nobody.stop().await;
    fleet.a.report_to(fleet.server.address()).await;
    assert_eq!(fleet.clients.vm(WEB).await.unwrap().host, "hosts/a");
    fleet.stop().await;
}

fn leftover(uid: &str, kind: Left) -> v1::Leftover {
    v1::Leftover {
        uid: uid.into(),
        vm: WEB.into(),
        kind: kind.into(),
        epoch: 4,
        adoptable: true,
        delete_gives_up: "the frozen memory".into(),
        ..Default::default()
    }
}

impl Fleet {
    async fn leftovers(&mut self, host: &str) -> v1::ListLeftoversResponse {
        let request = v1::ListLeftoversRequest { host: host.into() };
        answer(self.clients.hosts.list_leftovers(request).await).unwrap()
    }

    async fn adopt(&mut self, uid: &str, give_up: bool) -> Result<v1::Vm, ApiError> {
        let request = v1::AdoptLeftoverRequest {
            host: "hosts/a".into(),
            uid: uid.into(),
            give_up,
            epoch: 0,
        };
        let adopted = answer(self.clients.hosts.adopt_leftover(request).await);
        adopted.map(|adopted| adopted.vm.unwrap())
    }

    async fn delete_leftover(&mut self, uid: &str, give_up: bool) -> Result<(), ApiError> {
        let request = v1::DeleteLeftoverRequest {
            host: "hosts/a".into(),
            uid: uid.into(),
            give_up,
        };
        answer(self.clients.hosts.delete_leftover(request).await).map(drop)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_is_shown_adopted_and_deleted_by_uid() {
    let mut moved = twin("moved");
    moved.epoch = 5;
    let mut fleet = Fleet::start(vec![], vec![moved]).await;
    for uid in ["moved", "last", "other"] {
        let left = leftover(uid, Left::RelinquishedSource);
        fleet.a.fake.put_leftover(left);
    }
    fleet.a.report_to(fleet.server.address()).await;
    let shown = fleet.leftovers("").await;
    assert!(shown.unreachable.is_empty());
    let uids: Vec<&str> = shown.leftovers.iter().map(|l| l.uid.as_str()).collect();
    assert_eq!(uids, ["last", "moved", "other"]);
    assert!(shown.leftovers.iter().all(|left| left.host == "hosts/a"));
    assert_eq!(fleet.clients.host("hosts/a").await.leftovers, 3);
    assert_eq!(fleet.leftovers("hosts/b").await.leftovers, []);

    // Its VM lives elsewhere: nothing to adopt, and nothing is given up.
    let moved = &shown.leftovers[1];
    assert!(!moved.adoptable && moved.delete_gives_up.is_empty());
    assert!(moved.message.contains("hosts/b"));
    let refused = fleet.adopt("moved", true).await.unwrap_err();
    assert_eq!(refused.reason, Reason::VmExists);
    assert_eq!(refused.metadata["host"], "hosts/b");
    fleet.delete_leftover("moved", false).await.unwrap();

    // Of another nobody knows more than its host.
    let refused = fleet.delete_leftover("last", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::GiveUpRequired);
    assert_eq!(refused.metadata["gives_up"], "the frozen memory");
    let adopted = fleet.adopt("last", false).await.unwrap();
    assert_eq!((adopted.state(), adopted.epoch), (State::Paused, 5));
    let by_uid = v1::GetVmRequest {
        uid: "last".into(),
        ..Default::default()
    };
    let found = answer(fleet.clients.vms.get_vm(by_uid).await).unwrap();
    assert_eq!((found.host.as_str(), found.epoch), ("hosts/a", 5));

    // A host that is silent may have the third.
    let nobody = Agent::serve(Fake::new("hosts/nobody")).await;
    let b = std::mem::replace(&mut fleet.b, nobody);
    b.stop().await;
    until_state(&fleet.clients, "hosts/b", HostState::Unreachable).await;
    let shown = fleet.leftovers("").await;
    assert_eq!(shown.unreachable, ["hosts/b"]);
    let other = shown.leftovers.iter().find(|left| left.uid == "other");
    let words = other.unwrap().adopt_gives_up.clone();
    assert!(words.contains("hosts/b"), "{words}");
    let refused = fleet.adopt("other", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::GiveUpRequired);
    assert_eq!(refused.metadata["gives_up"], words);
    fleet.delete_leftover("other", true).await.unwrap();
    let none = fleet.adopt("other", true).await.unwrap_err();
    assert_eq!(none.reason, Reason::NoSuchLeftover);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_was_taken_over_elsewhere_is_a_leftover_and_deleted_alone() {
    let (mut old, mut new) = (twin("moved"), twin("moved"));
    old.epoch = 2;
    old.state = State::Lost.into();
    new.epoch = 3;
    let mut fleet = Fleet::start(vec![old], vec![new]).await;
    // A report alone may have been under way when the VM went.
    for _ in 0..2 {
        fleet.a.report_to(fleet.server.address()).await;
        fleet.b.report_to(fleet.server.address()).await;
    }
    let shown = fleet.leftovers("").await.leftovers;
    assert_eq!(shown.len(), 1, "{shown:?}");
    let left = &shown[0];
    assert_eq!((left.kind(), left.epoch), (Left::SupersededVm, 2));
    assert_eq!((left.host.as_str(), left.adoptable), ("hosts/a", false));
    assert!(
        left.message.contains("lives on hosts/b"),
        "{}",
        left.message
    );
    assert_eq!(fleet.clients.host("hosts/a").await.leftovers, 1);
    let refused = fleet.adopt("moved", true).await.unwrap_err();
    assert_eq!(refused.reason, Reason::VmExists);
    fleet.delete_leftover("moved", false).await.unwrap();
    assert!(fleet.a.fake.vm_by_uid("moved").is_none());
    let by_uid = v1::GetVmRequest {
        uid: "moved".into(),
        ..Default::default()
    };
    let lives = answer(fleet.clients.vms.get_vm(by_uid).await).unwrap();
    assert_eq!((lives.host.as_str(), lives.epoch), ("hosts/b", 3));
    assert_eq!(fleet.leftovers("").await.leftovers, []);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_migration_explains_is_no_leftover() {
    let mut fleet = Fleet::start(vec![vm(WEB, 64)], vec![]).await;
    let migration = fleet.clients.migrate(WEB, "hosts/b").await.unwrap().name;
    fleet.a.fake.wait_call(&format!("start {migration}")).await;
    let mut left = leftover("uid-vms/web", Left::RelinquishedSource);
    left.migration = migration.clone();
    fleet.a.fake.put_leftover(left);
    fleet.a.report_to(fleet.server.address()).await;
    assert_eq!(fleet.leftovers("").await.leftovers, []);
    assert_eq!(fleet.clients.host("hosts/a").await.leftovers, 0);
    let refused = fleet
        .delete_leftover("uid-vms/web", true)
        .await
        .unwrap_err();
    assert_eq!(refused.reason, Reason::MigrationInProgress);
    // When the migration has ended and let go, it is.
    fleet.clients.cancel(&migration).await.unwrap();
    until("nothing explains it", async || {
        let mut hosts = fleet.clients.hosts.clone();
        let request = v1::ListLeftoversRequest::default();
        let list = answer(hosts.list_leftovers(request).await).unwrap();
        list.leftovers.len() == 1
    })
    .await;
    fleet.stop().await;
}
