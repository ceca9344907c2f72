//! Hosts are fenced while migrations have sides there: only then is a doubt decided without the
//! source's journal.

use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    v1::{
        self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role,
        VmLocation, host, vm::State,
    },
};
use slat_server::{FenceHook, Server};

use super::{
    Fleet, VM, reason,
    support::{Agent, Clients, Fake, answer, hand_over, server_that_fences, until, vm},
};

/// A fleet whose server has a hook: a shell script with `lines`. What `$RAN` names grows by a line
/// with each run.
async fn fleet(lines: &str) -> Fleet {
    let state = slat_test_dir::TestDir::new();
    let server = start(state.path(), lines).await;
    let source = Fake::new("hosts/a");
    source.put_vm(vm(VM, 64));
    let a = Agent::start(source, server.address()).await;
    let b = Agent::start(Fake::new("hosts/b"), server.address()).await;
    let clients = Clients::new(server.address());
    Fleet {
        state,
        server,
        a,
        b,
        clients,
    }
}

async fn start(state: &std::path::Path, lines: &str) -> Server {
    let program = state.join("hook");
    let ran = state.join("ran");
    let text = format!(
        "#!/bin/sh\nRAN={}\necho x >> $RAN\n{lines}\n",
        ran.display()
    );
    // By another process, and a new file: what this one has open for writing the children of other
    // tests have too, and nobody can run it meanwhile.
    drop(fs::remove_file(&program));
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
        .arg(&program);
    let mut shell = shell.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = shell.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    assert!(shell.wait().unwrap().success());
    let timeout = Duration::from_secs(60);
    server_that_fences(state, FenceHook { program, timeout }).await
}

fn runs(fleet: &Fleet) -> usize {
    fs::read_to_string(fleet.state.path().join("ran")).map_or(0, |ran| ran.lines().count())
}

async fn fence(clients: &Clients, name: &str, force: bool) -> Result<v1::Host, ApiError> {
    let request = v1::FenceHostRequest {
        name: name.into(),
        force,
    };
    answer(clients.hosts.clone().fence_host(request).await)
}

async fn silent(clients: &Clients, host: &str) {
    until("the host is silent", async || {
        let mut clients = clients.clone();
        clients.host(host).await.state() != host::State::Ready
    })
    .await;
}

impl Fleet {
    /// A migration in doubt, its source gone.
    async fn doubt(mut self) -> (Self, String, Fake) {
        let name = self.precopy().await;
        self.b
            .fake
            .phase(&name, Role::Destination, SidePhase::Ready);
        self.clients.wait_phase(&name, Phase::Switchover).await;
        let (source, _) = self.a.stop().await;
        // Something has to be there to be stopped at the end.
        self.a = Agent::serve(Fake::new("hosts/none")).await;
        self.clients.wait_phase(&name, Phase::InDoubt).await;
        silent(&self.clients, "hosts/a").await;
        (self, name, source)
    }

    fn resolved(&self) -> Vec<String> {
        let mut calls = self.b.fake.calls();
        calls.retain(|call| call.starts_with("resolve"));
        calls
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_doubt_is_decided_for_the_destination_by_a_fence_and_by_nothing_else() {
    let (mut fleet, name, source) = fleet("echo chassis power is off").await.doubt().await;
    assert_eq!(fleet.resolved(), [] as [&str; 0]);
    let fenced = fence(&fleet.clients, "hosts/a", false).await.unwrap();
    let proof = fenced.fence.unwrap();
    assert_eq!(proof.proof, "chassis power is off");
    assert_eq!((proof.incarnation.as_str(), proof.id.len()), ("1", 32));
    assert!(proof.hook.ends_with("/hook") && proof.time.is_some());
    assert!(proof.ordered_by == "unknown" || proof.ordered_by.contains("127.0.0.1"));
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(done.vm_location(), VmLocation::Destination);
    assert!(fleet.resolved()[0].contains("DECISION_COMMIT"));
    let leave = fleet.b.fake.leave().pop().unwrap();
    assert_eq!(leave.ground, format!("fence {}", proof.id));
    let moved = fleet.clients.vm(VM).await.unwrap();
    assert_eq!((moved.host.as_str(), moved.epoch), ("hosts/b", 2));

    // The proof is there after a restart of the server, and still refuses that start of the agent.
    for cordoned in [true, false] {
        fleet.server.stop().await;
        fleet.server = start(fleet.state.path(), "exit 1").await;
        fleet.clients = Clients::new(fleet.server.address());
        // Written once more meanwhile.
        let name = "hosts/a".to_owned();
        let mut hosts = fleet.clients.hosts.clone();
        if cordoned {
            answer(hosts.cordon_host(v1::CordonHostRequest { name }).await).unwrap();
        } else {
            answer(hosts.uncordon_host(v1::UncordonHostRequest { name }).await).unwrap();
        }
    }
    let host = fleet.clients.host("hosts/a").await;
    assert_eq!(host.fence.as_ref(), Some(&proof));
    assert_eq!(host.state(), host::State::Unreachable);
    assert!(
        host.state_message.contains(&proof.id),
        "{}",
        host.state_message
    );
    source.remove_vm(VM);
    let mut old = Agent::serve(source).await;
    let refused = old.try_report_to(fleet.server.address()).await.unwrap_err();
    assert_eq!(refused.reason, Reason::HostFenced);
    assert_eq!(refused.metadata["fence"], proof.id);
    // A new one is welcome: it gives the source's side up, as its journal says.
    old.fake.start_anew("2");
    old.fake.phase(&name, Role::Source, SidePhase::Relinquished);
    old.report_to(fleet.server.address()).await;
    let host = fleet.clients.host("hosts/a").await;
    assert_eq!(host.state(), host::State::Ready);
    assert_eq!(host.fence, Some(proof), "it is remembered");
    old.fake.wait_call("release TRANSFER_ROLE_SOURCE").await;
    old.stop().await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_fails_decides_nothing() {
    let (mut fleet, name, _) = fleet("echo 'no route' >&2; exit 7").await.doubt().await;
    let refused = fence(&fleet.clients, "hosts/a", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::FenceFailed);
    assert_eq!(refused.metadata["said"], "no route");
    assert!(refused.metadata["exit"].contains('7'), "{refused}");
    assert_eq!(fleet.clients.migration(&name).await.phase(), Phase::InDoubt);
    assert_eq!(fleet.clients.host("hosts/a").await.fence, None);
    assert_eq!(fleet.resolved(), [] as [&str; 0]);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_hook_there_is_no_fence() {
    let mut fleet = Fleet::start().await;
    let refused = fence(&fleet.clients, "hosts/a", true).await.unwrap_err();
    assert_eq!(refused.reason, Reason::NoFenceHook);
    let refused = fence(&fleet.clients, "hosts/none", true).await.unwrap_err();
    assert_eq!(refused.reason, Reason::NoSuchHost);
    assert_eq!(fleet.clients.host("hosts/a").await.fence, None);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_reports_is_fenced_by_force_alone_and_is_over_at_once() {
    let mut fleet = fleet("echo off").await;
    let refused = fence(&fleet.clients, "hosts/a", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::HostInUse);
    assert!(refused.metadata["advice"].contains("--force"), "{refused}");
    assert_eq!(runs(&fleet), 0);
    let fenced = fence(&fleet.clients, "hosts/a", true).await.unwrap();
    assert_eq!(fenced.state(), host::State::Unreachable);
    let words = "fenced before";
    assert!(!fenced.state_message.contains(words), "{fenced:?}");
    let lost = fleet.clients.vm(VM).await.unwrap();
    assert_eq!(lost.state(), State::Lost);
    assert!(
        lost.state_message.contains("was fenced"),
        "{}",
        lost.state_message
    );
    // The hook lied, or the agent was cut off alone: what it says is not listened to.
    let said = fleet.a.try_report_to(fleet.server.address()).await;
    assert_eq!(said.unwrap_err().reason, Reason::HostFenced);
    assert_eq!(fleet.clients.vm(VM).await.unwrap().state(), State::Lost);
    // Again, it is the same fence, and the hook is not run for it.
    let again = fence(&fleet.clients, "hosts/a", false).await.unwrap();
    assert_eq!(again.fence, fenced.fence);
    assert_eq!(runs(&fleet), 1);
    let time = again.fence.unwrap().time.unwrap().to_string();
    for said in [words, &time, "the hook was not run again"] {
        assert!(
            again.state_message.contains(said),
            "{}",
            again.state_message
        );
    }
    // A new start that has the VM is believed.
    fleet.a.fake.start_anew("2");
    fleet.a.report_to(fleet.server.address()).await;
    assert_eq!(fleet.clients.vm(VM).await.unwrap().state(), State::Running);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_share_one_run_and_one_that_goes_away_ends_nothing() {
    let (mut fleet, name, _) = fleet("until test -e $RAN.go; do sleep 0.02; done; echo off")
        .await
        .doubt()
        .await;
    let order = || {
        let clients = fleet.clients.clone();
        tokio::spawn(async move { fence(&clients, "hosts/a", false).await })
    };
    let (first, second) = (order(), order());
    until("the hook runs", async || runs(&fleet) > 0).await;
    first.abort();
    fs::write(fleet.state.path().join("ran.go"), "").unwrap();
    let fenced = second.await.unwrap().unwrap();
    assert_eq!(fenced.fence.unwrap().proof, "off");
    assert_eq!(runs(&fleet), 1);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_starts_anew_while_the_hook_runs_is_not_fenced() {
    let mut fleet = fleet("until test -e $RAN.go; do sleep 0.02; done; echo off").await;
    let order = |fleet: &Fleet| {
        let clients = fleet.clients.clone();
        tokio::spawn(async move { fence(&clients, "hosts/a", true).await })
    };
    let first = order(&fleet);
    until("the hook runs", async || runs(&fleet) > 0).await;
    // Which start the hook ends nobody knows yet: nothing begins there.
    for to in ["hosts/b", "hosts/a"] {
        let refused = fleet.clients.migrate(VM, to).await.unwrap_err();
        assert_eq!(refused.reason, Reason::HostFenced, "{refused}");
        assert_eq!(refused.metadata["host"], "hosts/a");
    }
    fleet.a.fake.start_anew("2");
    fleet.a.report_to(fleet.server.address()).await;
    fs::write(fleet.state.path().join("ran.go"), "").unwrap();
    let refused = first.await.unwrap().unwrap_err();
    assert_eq!(refused.reason, Reason::FenceFailed);
    assert!(refused.message.contains("started anew"), "{refused}");
    assert_eq!(refused.metadata["incarnation"], "1");
    assert_eq!(refused.metadata["found"], "2");
    let host = fleet.clients.host("hosts/a").await;
    assert_eq!((host.state(), host.fence), (host::State::Ready, None));
    assert_eq!(fleet.clients.vm(VM).await.unwrap().state(), State::Running);
    // What the new start begins is its own, and the next order is about it.
    let name = fleet.precopy().await;
    let fenced = order(&fleet).await.unwrap().unwrap();
    assert_eq!(fenced.fence.unwrap().incarnation, "2");
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "HOST_FENCED");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_of_a_later_start_of_the_agent_ends_what_an_earlier_one_began() {
    let mut fleet = fleet("echo off").await;
    let name = fleet.precopy().await;
    // VM processes outlive their agent, and so do migrations.
    fleet.a.fake.start_anew("2");
    fleet.a.report_to(fleet.server.address()).await;
    let fenced = fence(&fleet.clients, "hosts/a", true).await.unwrap();
    assert_eq!(fenced.fence.unwrap().incarnation, "2");
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "HOST_FENCED");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_kills_the_hook_and_decides_nothing() {
    let (mut fleet, name, _) = fleet("exec sleep 600").await.doubt().await;
    let clients = fleet.clients.clone();
    let order = tokio::spawn(async move { fence(&clients, "hosts/a", false).await });
    until("the hook runs", async || runs(&fleet) > 0).await;
    let begun = std::time::Instant::now();
    fleet.server.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(30));
    order.await.unwrap().unwrap_err();
    fleet.server = start(fleet.state.path(), "exit 1").await;
    fleet.clients = Clients::new(fleet.server.address());
    assert_eq!(fleet.clients.host("hosts/a").await.fence, None);
    assert_eq!(fleet.clients.migration(&name).await.phase(), Phase::InDoubt);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_was_silent_is_told_by_a_later_life_of_the_server() {
    let (mut fleet, name, _) = fleet("echo off").await.doubt().await;
    let (destination, address) = fleet.b.stop().await;
    fence(&fleet.clients, "hosts/a", false).await.unwrap();
    let doubt = fleet
        .clients
        .wait(&name, |migration| reason(migration) == "HOST_FENCED")
        .await;
    assert_eq!(doubt.phase(), Phase::InDoubt);
    assert_eq!(doubt.vm_location(), VmLocation::Unknown);
    fleet.server.stop().await;
    fleet.server = start(fleet.state.path(), "exit 1").await;
    fleet.clients = Clients::new(fleet.server.address());
    fleet.b = Agent::serve_at(destination, address).await;
    fleet.b.report_to(fleet.server.address()).await;
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(done.vm_location(), VmLocation::Destination);
    assert!(fleet.resolved()[0].contains("DECISION_COMMIT"));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_fenced_source_was_sending_is_lost_and_its_destination_ended() {
    let mut fleet = fleet("echo off").await;
    let name = fleet.precopy().await;
    fence(&fleet.clients, "hosts/a", true).await.unwrap();
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "HOST_FENCED");
    assert_eq!(failed.vm_location(), VmLocation::Lost);
    fleet.b.fake.wait_call("cancel").await;
    assert_eq!(fleet.resolved(), [] as [&str; 0]);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_to_a_fenced_host_ends_and_the_next_is_none_of_that_fence() {
    let mut fleet = fleet("echo off").await;
    let name = fleet.precopy().await;
    fence(&fleet.clients, "hosts/b", true).await.unwrap();
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "HOST_FENCED");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    fleet.a.fake.wait_call("release TRANSFER_ROLE_SOURCE").await;
    // It comes back and takes the VM.
    fleet.b.fake.start_anew("2");
    fleet.b.report_to(fleet.server.address()).await;
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    fleet.a.fake.wait_call(&format!("start {name}")).await;
    fleet.a.fake.phase(&name, Role::Source, SidePhase::Precopy);
    fleet.clients.wait_phase(&name, Phase::PrecopyActive).await;
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}
