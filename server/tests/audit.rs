//! The audit through a real server and a real relay to an agent: one line at INFO for each changing
//! call, none for a reading one, whichever endpoint answers in the end. One test: a process has one
//! subscriber.

mod support;

use std::sync::{Arc, Mutex};

use slat_proto::v1;
use support::{Agent, Clients, Fake, answer, server, until, vm};
use tracing::{
    Event, Id, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Record},
};

/// Lines of the audit: level and all fields, as text.
type Lines = Arc<Mutex<Vec<(Level, String)>>>;

struct Keep(Lines);

#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0 += &format!("{field}={value};");
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!("{field}={value:?};");
    }
}

impl Subscriber for Keep {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "audit"
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let level = *event.metadata().level();
        self.0.lock().unwrap().push((level, text.0));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_logged_where_it_was_made_and_not_again_where_it_was_relayed_to() {
    let lines = Lines::default();
    tracing::subscriber::set_global_default(Keep(Arc::clone(&lines))).unwrap();
    let state = slat_test_dir::TestDir::new();
    let server = server(state.path()).await;
    let fake = Fake::new("hosts/a");
    fake.put_vm(vm("vms/web", 64));
    let agent = Agent::start(fake, server.address()).await;
    let mut clients = Clients::new(server.address());
    // What joins the fleet is a change, and its reports are none.
    let logged = |method: &str| -> Vec<(Level, String)> {
        let lines = lines.lock().unwrap();
        let wanted = format!("method={method};");
        let of = |(_, line): &&(Level, String)| line.contains(&wanted);
        lines.iter().filter(of).cloned().collect()
    };
    until("the registration is logged", async || {
        logged("slat.v1.FleetService/RegisterHost").len() == 1
    })
    .await;

    clients.vm("vms/web").await.unwrap();
    let pause = v1::PauseVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    answer(clients.vms.pause_vm(pause).await).unwrap();
    let gone = v1::DeleteVmRequest {
        name: "vms/none".into(),
        ..Default::default()
    };
    answer(clients.vms.delete_vm(gone).await).unwrap_err();

    // The agent's own line, at DEBUG, and the caller's, at INFO.
    let method = "slat.v1.VmService/PauseVm";
    until("both ends have logged", async || logged(method).len() == 2).await;
    let levels: Vec<Level> = logged(method).iter().map(|(level, _)| *level).collect();
    assert!(levels.contains(&Level::INFO) && levels.contains(&Level::DEBUG));
    let lines_of = logged(method);
    let (_, line) = lines_of.iter().find(|(at, _)| *at == Level::INFO).unwrap();
    for part in [
        "peer=127.0.0.1:",
        "what=name=vms/web;",
        "uid=uid-vms/web;",
        "result=OK;",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let method = "slat.v1.VmService/DeleteVm";
    until("the refusal is logged", async || !logged(method).is_empty()).await;
    assert_eq!(logged(method).len(), 1);
    assert!(logged(method)[0].1.contains("result=NO_SUCH_VM;"));
    // Whoever asks an agent himself is logged there.
    let mut direct = Clients::new(agent.address);
    let start = v1::StartVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    answer(direct.vms.start_vm(start).await).unwrap();
    let method = "slat.v1.VmService/StartVm";
    until("it is logged at the agent", async || {
        !logged(method).is_empty()
    })
    .await;
    assert_eq!(logged(method)[0].0, Level::INFO);

    let reading = lines
        .lock()
        .unwrap()
        .iter()
        .filter(|(_, line)| line.contains("/Get") || line.contains("/ReportHost"))
        .filter(|(level, _)| *level != Level::DEBUG)
        .count();
    assert_eq!(reading, 0, "looks are quiet");
    server.stop().await;
    agent.stop().await;
}
