//! What the client commands send and say, against an endpoint that notes what it is asked: which VM
//! is meant, what an order gives up, several things after an error, errors for programs.

use std::{
    net::SocketAddr,
    process::Command,
    sync::{Arc, Mutex},
};

use serde_json::Value;
use slat_proto::{
    ApiError, Reason,
    v1::{
        self,
        host_service_server::{HostService, HostServiceServer},
        vm_service_server::{VmService, VmServiceServer},
    },
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

type Reply<T> = Result<Response<T>, Status>;

/// What was asked, in order, as the requests print themselves.
#[derive(Clone, Debug, Default)]
struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    fn note(&self, request: &impl std::fmt::Debug) {
        self.0.lock().unwrap().push(format!("{request:?}"));
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

fn no_such_vm(name: &str) -> Status {
    ApiError::no_such_vm(name).into()
}

/// Two VMs are called web, one db; nothing else is here.
fn named(name: &str, uid: &str, host: &str) -> Result<v1::Vm, Status> {
    let vm = |name: &str, uid: &str| v1::Vm {
        name: name.into(),
        uid: uid.into(),
        state: v1::vm::State::Paused.into(),
        ..Default::default()
    };
    match (name, uid, host) {
        ("vms/web", "", "") => {
            let error = ApiError::new(Reason::NameConflict, "2 VMs are called vms/web")
                .with("uids", "u-1,u-2")
                .with("hosts", "hosts/a,hosts/b");
            Err(error.into())
        }
        ("vms/web", "", "hosts/b") | ("" | "vms/web", "u-2", "") => Ok(vm("vms/web", "u-2")),
        ("vms/db", "", "") => Ok(vm("vms/db", "u-3")),
        _ => Err(no_such_vm(name)),
    }
}

#[tonic::async_trait]
impl VmService for Notes {
    type WatchVmStream = tokio_stream::Empty<Result<v1::Vm, Status>>;

    async fn create_vm(&self, _: Request<v1::CreateVmRequest>) -> Reply<v1::Vm> {
        Err(Status::internal("no order of these tests asks for this"))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Reply<v1::Vm> {
        let v1::GetVmRequest { name, uid, host } = request.into_inner();
        named(&name, &uid, &host).map(Response::new)
    }

    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Reply<v1::ListVmsResponse> {
        let on_a = v1::Vm {
            name: "vms/web".into(),
            uid: "u-1".into(),
            host: "hosts/a".into(),
            state: v1::vm::State::Running.into(),
            stale: true,
            conflicts: vec![v1::NameConflict {
                uid: "u-2".into(),
                host: "hosts/b".into(),
            }],
            ..Default::default()
        };
        Ok(Response::new(v1::ListVmsResponse {
            vms: vec![on_a],
            unreachable: vec!["hosts/a".into(), "hosts/c".into()],
            unreported: vec!["hosts/c".into()],
            ..Default::default()
        }))
    }

    async fn watch_vm(&self, _: Request<v1::WatchVmRequest>) -> Reply<Self::WatchVmStream> {
        Err(Status::internal("no order of these tests asks for this"))
    }

    async fn start_vm(&self, _: Request<v1::StartVmRequest>) -> Reply<v1::Vm> {
        Err(Status::internal("no order of these tests asks for this"))
    }

    async fn pause_vm(&self, request: Request<v1::PauseVmRequest>) -> Reply<v1::Vm> {
        let v1::PauseVmRequest { name, uid, host } = request.into_inner();
        named(&name, &uid, &host).map(Response::new)
    }

    async fn resume_vm(&self, _: Request<v1::ResumeVmRequest>) -> Reply<v1::Vm> {
        Err(Status::internal("no order of these tests asks for this"))
    }

    async fn delete_vm(
        &self,
        request: Request<v1::DeleteVmRequest>,
    ) -> Reply<v1::DeleteVmResponse> {
        let request = request.into_inner();
        self.note(&request);
        named(&request.name, &request.uid, &request.host)?;
        Ok(Response::new(v1::DeleteVmResponse {}))
    }
}

fn leftover() -> v1::Leftover {
    v1::Leftover {
        host: "hosts/a".into(),
        uid: "u-9".into(),
        vm: "vms/old".into(),
        kind: v1::leftover::Kind::RelinquishedSource.into(),
        adoptable: true,
        adopt_gives_up: "whatever ran elsewhere since".into(),
        delete_gives_up: "the last copy of its memory".into(),
        ..Default::default()
    }
}

#[tonic::async_trait]
impl HostService for Notes {
    async fn get_host(&self, _: Request<v1::GetHostRequest>) -> Reply<v1::Host> {
        Err(Status::internal("no order of these tests asks for this"))
    }

    async fn list_hosts(&self, _: Request<v1::ListHostsRequest>) -> Reply<v1::ListHostsResponse> {
        Ok(Response::new(v1::ListHostsResponse::default()))
    }

    async fn cordon_host(&self, request: Request<v1::CordonHostRequest>) -> Reply<v1::Host> {
        self.note(request.get_ref());
        Ok(Response::new(v1::Host {
            name: request.into_inner().name,
            cordoned: true,
            ..Default::default()
        }))
    }

    async fn fence_host(&self, request: Request<v1::FenceHostRequest>) -> Reply<v1::Host> {
        self.note(request.get_ref());
        let request = request.into_inner();
        if request.name == "hosts/live" && !request.force {
            let error = ApiError::new(Reason::HostInUse, "its agent reports");
            return Err(error.with("advice", "with --force").into());
        }
        if request.name == "hosts/broken" {
            let error = ApiError::new(Reason::FenceFailed, "the hook failed: exit status: 3");
            return Err(error.with("said", "no route to bmc").into());
        }
        if request.name == "hosts/slow" {
            tokio::time::sleep(std::time::Duration::from_secs(14)).await;
        }
        Ok(Response::new(v1::Host {
            name: request.name,
            fence: Some(v1::Fence {
                id: "f00d".into(),
                proof: "chassis power is off".into(),
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    async fn uncordon_host(&self, request: Request<v1::UncordonHostRequest>) -> Reply<v1::Host> {
        self.note(request.get_ref());
        Ok(Response::new(v1::Host {
            name: request.into_inner().name,
            ..Default::default()
        }))
    }

    async fn delete_host(
        &self,
        request: Request<v1::DeleteHostRequest>,
    ) -> Reply<v1::DeleteHostResponse> {
        self.note(request.get_ref());
        if request.get_ref().give_up_vms {
            return Ok(Response::new(v1::DeleteHostResponse {
                vms: vec![v1::Vm::default()],
            }));
        }
        let error = ApiError::new(Reason::HostInUse, "VMs were last seen there");
        Err(error.into())
    }

    async fn list_leftovers(
        &self,
        _: Request<v1::ListLeftoversRequest>,
    ) -> Reply<v1::ListLeftoversResponse> {
        Ok(Response::new(v1::ListLeftoversResponse {
            leftovers: vec![leftover()],
            unreachable: Vec::new(),
        }))
    }

    async fn adopt_leftover(
        &self,
        request: Request<v1::AdoptLeftoverRequest>,
    ) -> Reply<v1::AdoptLeftoverResponse> {
        self.note(request.get_ref());
        Ok(Response::new(v1::AdoptLeftoverResponse {
            vm: Some(v1::Vm {
                name: "vms/old".into(),
                epoch: 7,
                state: v1::vm::State::Paused.into(),
                ..Default::default()
            }),
        }))
    }

    async fn delete_leftover(
        &self,
        request: Request<v1::DeleteLeftoverRequest>,
    ) -> Reply<v1::DeleteLeftoverResponse> {
        self.note(request.get_ref());
        Ok(Response::new(v1::DeleteLeftoverResponse {}))
    }
}

/// The endpoint, until dropped.
struct Endpoint {
    address: SocketAddr,
    notes: Notes,
    _runtime: tokio::runtime::Runtime,
}

/// What a command ended with.
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Endpoint {
    fn start() -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let notes = Notes::default();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let services = tonic::transport::Server::builder()
            .add_service(VmServiceServer::new(notes.clone()))
            .add_service(HostServiceServer::new(notes.clone()));
        runtime.spawn(services.serve_with_incoming(TcpListenerStream::new(listener)));
        Self {
            address,
            notes,
            _runtime: runtime,
        }
    }

    fn slat(&self, line: &str) -> Ended {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slat"));
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("SLAT_") {
                command.env_remove(variable);
            }
        }
        let output = command
            .args(line.split_whitespace())
            .env_remove("RUST_LOG")
            .env("SLAT_INSECURE_PLAINTEXT", "true")
            .env("SLAT_SERVER", self.address.to_string())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended {
            code: output.status.code().unwrap(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

#[test]
fn a_name_that_two_vms_have_needs_a_uid_or_a_host() {
    let endpoint = Endpoint::start();
    let conflict = endpoint.slat("delete vm web");
    assert_eq!(conflict.code, 4, "{}", conflict.stderr);
    for words in [
        "NAME_CONFLICT",
        "u-1 on a",
        "u-2 on b",
        "slat delete vm web --uid u-1",
        "slat delete vm web --uid u-2",
    ] {
        assert!(
            conflict.stderr.contains(words),
            "{words}: {}",
            conflict.stderr
        );
    }
    let json = endpoint.slat("delete vm web -o json");
    let error: Value = serde_json::from_str(&json.stderr).unwrap();
    assert_eq!(error["error"]["code"], "FAILED_PRECONDITION");
    assert_eq!(error["error"]["metadata"]["uids"], "u-1,u-2");
    endpoint.notes.take();
    let by_host = endpoint.slat("delete vm web --host b");
    assert_eq!(by_host.code, 0, "{}", by_host.stderr);
    let by_uid = endpoint.slat("delete vm --uid u-2 --force");
    assert_eq!(by_uid.code, 0, "{}", by_uid.stderr);
    assert!(
        by_uid.stderr.contains("this gives up the memory"),
        "{}",
        by_uid.stderr
    );
    let notes = endpoint.notes.take();
    assert!(
        notes[0].contains("host: \"hosts/b\", force: false"),
        "{notes:?}"
    );
    assert!(
        notes[1].contains("uid: \"u-2\", host: \"\", force: true"),
        "{notes:?}"
    );
    assert_eq!(
        endpoint.slat("pause vm web --host b").stdout,
        "vms/web PAUSED\n"
    );
    assert_eq!(
        endpoint.slat("pause vm web --host b -o name").stdout,
        "vms/web\n"
    );
    assert_eq!(
        endpoint.slat("get vm --uid u-2 -o name").stdout,
        "vms/web\n"
    );
}

#[test]
fn deleting_several_goes_on_after_an_error() {
    let endpoint = Endpoint::start();
    let ended = endpoint.slat("delete vm nobody web db");
    assert_eq!(ended.code, 4, "the worst, not the last: {}", ended.stderr);
    assert_eq!(ended.stdout, "vms/db deleted\n");
    assert!(ended.stderr.contains("NO_SUCH_VM") && ended.stderr.contains("NAME_CONFLICT"));
    assert_eq!(endpoint.notes.take().len(), 3);
    let ended = endpoint.slat("delete vm nobody web db -o json");
    let reasons: Vec<Value> = ended
        .stderr
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["error"]["reason"].take())
        .collect();
    assert_eq!(reasons, ["NO_SUCH_VM", "NAME_CONFLICT"]);
    let deleted: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(deleted["name"], "vms/db");
}

#[test]
fn hosts_are_cordoned_and_forgotten() {
    let endpoint = Endpoint::start();
    let cordoned = endpoint.slat("cordon host a b");
    assert_eq!(cordoned.code, 0, "{}", cordoned.stderr);
    assert!(
        cordoned.stdout.starts_with("hosts/a cordoned"),
        "{}",
        cordoned.stdout
    );
    let ended = endpoint.slat("uncordon host a -o json");
    let host: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(host["cordoned"], false);
    assert_eq!(endpoint.notes.take().len(), 3);

    let refused = endpoint.slat("delete host a");
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    let would = "--give-up-vms would give up VMs last seen on a; they may still run there:\n  \
                 vms/web (u-1), last seen RUNNING";
    assert!(refused.stderr.contains(would), "{}", refused.stderr);
    let deleted = endpoint.slat("delete host a --give-up-vms");
    assert_eq!(deleted.code, 0, "{}", deleted.stderr);
    assert!(
        deleted.stderr.contains("this gives up VMs"),
        "{}",
        deleted.stderr
    );
    assert_eq!(
        deleted.stdout,
        "hosts/a forgotten, and 1 VMs last seen there\n"
    );
}

#[test]
fn hosts_are_fenced_and_the_proof_is_shown() {
    let endpoint = Endpoint::start();
    let fenced = endpoint.slat("fence host a");
    assert_eq!(fenced.code, 0, "{}", fenced.stderr);
    assert!(
        fenced.stdout.starts_with("hosts/a is fenced (fence f00d)"),
        "{}",
        fenced.stdout
    );
    assert!(fenced.stdout.contains("proof: chassis power is off"));
    let refused = endpoint.slat("fence host live");
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    let forced = endpoint.slat("fence host live --force -o json");
    let host: Value = serde_json::from_str(&forced.stdout).unwrap();
    assert_eq!(host["fence"]["proof"], "chassis power is off");
    let failed = endpoint.slat("fence host broken a");
    assert_eq!(failed.code, 4, "{}", failed.stderr);
    assert!(
        failed.stderr.contains("no route to bmc"),
        "{}",
        failed.stderr
    );
    assert!(
        failed.stderr.contains("nothing was decided"),
        "{}",
        failed.stderr
    );
    assert!(failed.stdout.contains("hosts/a is fenced"), "each is tried");
    assert_eq!(endpoint.notes.take().len(), 5);
}

#[test]
fn a_hook_that_takes_long_is_told_of() {
    let fenced = Endpoint::start().slat("fence host slow");
    assert_eq!(fenced.code, 0, "{}", fenced.stderr);
    let said = "hosts/slow: the hook runs, 1";
    assert!(fenced.stderr.contains(said), "{}", fenced.stderr);
}

#[test]
fn leftovers_say_what_an_order_gives_up_before_it_is_given() {
    let endpoint = Endpoint::start();
    let listed = endpoint.slat("get leftovers");
    assert!(
        listed.stdout.contains("RELINQUISHED_SOURCE"),
        "{}",
        listed.stdout
    );
    assert!(
        listed.stdout.contains("adopt --give-up, delete --give-up"),
        "{}",
        listed.stdout
    );
    for (order, gives_up) in [
        ("adopt vm", "whatever ran elsewhere since"),
        ("delete leftover", "the last copy of its memory"),
    ] {
        let refused = endpoint.slat(&format!("{order} --uid u-9 --host a"));
        assert_eq!(refused.code, 4, "{}", refused.stderr);
        assert!(refused.stderr.contains(gives_up), "{}", refused.stderr);
        assert_eq!(endpoint.notes.take().len(), 0, "nothing was ordered");
        let done = endpoint.slat(&format!("{order} --uid u-9 --host a --give-up"));
        assert_eq!(done.code, 0, "{}", done.stderr);
        let said = format!("this gives up: {gives_up}");
        assert!(done.stderr.contains(&said), "{}", done.stderr);
        let notes = endpoint.notes.take();
        assert!(
            notes[0].contains("uid: \"u-9\", give_up: true"),
            "{notes:?}"
        );
    }
    let none = endpoint.slat("adopt vm --uid u-8 --host a --give-up");
    assert_eq!(none.code, 3, "{}", none.stderr);
}

#[test]
fn a_list_marks_conflicts_stale_vms_and_silent_hosts() {
    let endpoint = Endpoint::start();
    let table = endpoint.slat("get vms");
    assert_eq!(table.code, 0);
    assert!(table.stdout.contains("STALE"), "{}", table.stdout);
    assert!(
        table
            .stdout
            .contains("CONFLICT: its name is also that of u-2 on b")
    );
    let warning = "c did not report since the server started; no answer from a";
    assert!(table.stderr.contains(warning), "{}", table.stderr);
    let bare = endpoint.slat("get vms --no-headers --sort-by -memory");
    assert!(bare.stdout.starts_with("web "), "{}", bare.stdout);
    assert_eq!(endpoint.slat("get vms --sort-by nothing").code, 2);
    // None is known of a host that has not reported: that is no empty list.
    let unknown = endpoint.slat("get vms --host c");
    assert_eq!(unknown.code, 5, "{}", unknown.stderr);
    assert_eq!(unknown.stdout, "");
    let unknown = endpoint.slat("get vms --host c -o json");
    assert_eq!(unknown.code, 5);
    let list: Value = serde_json::from_str(&unknown.stdout).unwrap();
    assert_eq!(list["unreported"], serde_json::json!(["hosts/c"]));
    let error: Value = serde_json::from_str(&unknown.stderr).unwrap();
    assert_eq!(error["error"]["reason"], "HOST_UNREACHABLE");
    let nothing = endpoint.slat("get vms --host b");
    assert_eq!((nothing.code, nothing.stderr.as_str()), (0, "no vms\n"));
    let yaml = endpoint.slat("get vms -o yaml");
    assert!(
        yaml.stdout.contains("state: STATE_RUNNING"),
        "{}",
        yaml.stdout
    );
}

#[test]
fn a_file_that_cannot_be_read_is_no_wrong_command_line() {
    let endpoint = Endpoint::start();
    for path in ["/nowhere/changes.txt", "/"] {
        let ended = endpoint.slat(&format!("memory change-slots web -f {path}"));
        assert_eq!(ended.code, 1, "{}", ended.stderr);
        let begins = format!("error: cannot read {path}: ");
        assert!(ended.stderr.starts_with(&begins), "{}", ended.stderr);
        assert!(!ended.stderr.contains("next:"), "{}", ended.stderr);
    }
}

#[test]
fn a_wrong_command_line_is_json_for_programs() {
    let endpoint = Endpoint::start();
    let ended = endpoint.slat("get vms -o json --nonsense");
    assert_eq!((ended.code, ended.stdout.as_str()), (2, ""));
    let error: Value = serde_json::from_str(&ended.stderr).unwrap();
    assert_eq!(error["error"]["code"], "INVALID_ARGUMENT");
    assert_eq!(error["error"]["exitCode"], 2);
    let ended = endpoint.slat("migrate web --to b -o json --max-downtime 0ms");
    let error: Value = serde_json::from_str(&ended.stderr).unwrap();
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("--max-downtime is"), "{message}");
}
