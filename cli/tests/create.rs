//! `slat create vm` against an endpoint whose VM is populated, dies, or is not heard meanwhile: the
//! command ends, and says that the VM exists and what to do with it.

use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use slat_proto::v1::{
    self,
    vm::State,
    vm_service_server::{VmService, VmServiceServer},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

type Reply<T> = Result<Response<T>, Status>;

/// Longer than any of these commands may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One VM, whose name says what becomes of it.
#[derive(Clone, Debug, Default)]
struct Populating {
    looks: Arc<AtomicU32>,
}

fn vm(name: &str, state: State, populated_bytes: u64) -> v1::Vm {
    v1::Vm {
        name: name.into(),
        uid: "u-1".into(),
        host: "hosts/a".into(),
        state: state.into(),
        prefault: Some(v1::Prefault {
            populated_bytes,
            total_bytes: 100,
            done: populated_bytes == 100,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn not_asked<T>() -> Reply<T> {
    Err(Status::internal("no order of these tests asks for this"))
}

#[tonic::async_trait]
impl VmService for Populating {
    type WatchVmStream = tokio_stream::Empty<Result<v1::Vm, Status>>;

    async fn create_vm(&self, request: Request<v1::CreateVmRequest>) -> Reply<v1::Vm> {
        let name = format!("vms/{}", request.get_ref().vm_id);
        Ok(Response::new(vm(&name, State::Created, 0)))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Reply<v1::Vm> {
        let v1::GetVmRequest { name, uid, .. } = request.into_inner();
        assert_eq!(uid, "u-1");
        let look = self.looks.fetch_add(1, Ordering::SeqCst);
        let seen = match name.as_str() {
            "vms/done" | "vms/silent" if look > 1 => vm(&name, State::Created, 100),
            "vms/dead" if look > 0 => v1::Vm {
                state_message: "its process was killed".into(),
                ..vm(&name, State::Lost, 0)
            },
            "vms/stale" if look < 2 => v1::Vm {
                stale: true,
                ..vm(&name, State::Created, 0)
            },
            "vms/stale" => vm(&name, State::Created, 100),
            _ => vm(&name, State::Created, 30),
        };
        Ok(Response::new(seen))
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Reply<v1::Vm> {
        let name = request.into_inner().name;
        if name == "vms/silent" {
            return Err(Status::unavailable("the connection broke"));
        }
        Ok(Response::new(vm(&name, State::Running, 100)))
    }

    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Reply<v1::ListVmsResponse> {
        not_asked()
    }

    async fn watch_vm(&self, _: Request<v1::WatchVmRequest>) -> Reply<Self::WatchVmStream> {
        not_asked()
    }

    async fn pause_vm(&self, _: Request<v1::PauseVmRequest>) -> Reply<v1::Vm> {
        not_asked()
    }

    async fn resume_vm(&self, _: Request<v1::ResumeVmRequest>) -> Reply<v1::Vm> {
        not_asked()
    }

    async fn delete_vm(&self, _: Request<v1::DeleteVmRequest>) -> Reply<v1::DeleteVmResponse> {
        not_asked()
    }
}

/// The endpoint, until dropped.
struct Endpoint {
    address: SocketAddr,
    vms: Populating,
    _runtime: tokio::runtime::Runtime,
}

impl Endpoint {
    fn start() -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let vms = Populating::default();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let services =
            tonic::transport::Server::builder().add_service(VmServiceServer::new(vms.clone()));
        runtime.spawn(services.serve_with_incoming(TcpListenerStream::new(listener)));
        Self {
            address,
            vms,
            _runtime: runtime,
        }
    }

    fn create(&self, name: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_slat"))
            .args(["create", "vm", name, "--prefault"])
            .args(["--server", &self.address.to_string()])
            .env_remove("RUST_LOG")
            .env("SLAT_INSECURE_PLAINTEXT", "true")
            .env_remove("SLAT_SERVER")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

/// Its exit code and what it said, within a bound.
fn ended(mut child: Child) -> (i32, String) {
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it did not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), said)
}

#[test]
fn a_vm_that_dies_while_it_is_populated_ends_the_command() {
    let endpoint = Endpoint::start();
    let (code, said) = ended(endpoint.create("dead"));
    assert_eq!(code, 4, "{said}");
    for words in [
        "vms/dead: 30 B of 100 B populated\n",
        "was created and is LOST now: its process was killed",
        "slat delete vm dead",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(said.matches(" populated\n").count(), 2, "{said}");
}

#[test]
fn a_host_that_comes_back_is_waited_for() {
    let endpoint = Endpoint::start();
    let (code, said) = ended(endpoint.create("stale"));
    assert_eq!(code, 0, "{said}");
    assert_eq!(
        said,
        "vms/stale: 0 B of 100 B populated\n\
         vms/stale: its host does not answer; waiting for it, at most 1m00s\n\
         vms/stale: it answers again\n"
    );
    let (code, said) = ended(endpoint.create("done"));
    assert_eq!(code, 0, "{said}");
}

#[test]
fn whoever_is_interrupted_is_told_of_the_vm() {
    let endpoint = Endpoint::start();
    let child = endpoint.create("slow");
    let begun = Instant::now();
    while endpoint.vms.looks.load(Ordering::SeqCst) == 0 {
        assert!(begun.elapsed() < PATIENCE, "it never looked");
        std::thread::sleep(Duration::from_millis(10));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let (code, said) = ended(child);
    assert_eq!(code, 130, "{said}");
    for words in [
        "vms/slow was created and is there, CREATED, not started",
        "slat start vm slow",
        "slat delete vm slow",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn an_order_to_start_without_an_answer_says_that_it_may_have_started() {
    let endpoint = Endpoint::start();
    let (code, said) = ended(endpoint.create("silent"));
    assert_eq!(code, 5, "{said}");
    let words = "vms/silent was created and is there; it may have started: slat get vm silent";
    assert!(said.contains(words), "{said}");
}
