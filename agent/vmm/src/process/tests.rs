//! A whole VM process but for its main function: lock, socket, ready, end.

use std::os::unix::net::UnixStream;

use slat_proto::{
    transport::{Address, connect},
    v1::{self, vm_service_client::VmServiceClient},
};
use slat_record::journal::{Journal, Ownership};

use super::*;
use crate::fake::{self, FakeBackend};

const PATIENCE: Duration = Duration::from_secs(20);

fn config(dir: &Path) -> VmProcessConfig {
    VmProcessConfig {
        dir: dir.join("vms/web"),
        vm: VmName::parse("web").unwrap(),
        uid: None,
        host: HostName::parse("a").unwrap(),
        data_ip: [127, 0, 0, 1].into(),
        data_ports: slat_proto::model::PortRange::ANY,
        insecure_pages: false,
        faults: FaultEvents::default(),
    }
}

/// A signal nobody sends to this test process.
fn never() -> Signal {
    signal(SignalKind::user_defined2()).unwrap()
}

type Made = Result<Arc<Machine>, ApiError>;

/// Makes machines over a fake backend.
fn fakes() -> impl FnOnce(VmDir, VmName, HostName) -> Made {
    let backend = Arc::new(FakeBackend::default());
    move |dir, vm, host| Machine::with_parts(dir, vm, host, fake::parts(&backend))
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("in time")
}

#[test]
fn a_vm_has_the_uid_that_its_process_was_given() {
    let temp = slat_test_dir::TestDir::new();
    let backend = Arc::new(FakeBackend::default());
    let parts = Parts {
        uid: Some(VmUid::parse("given").unwrap()),
        ..fake::parts(&backend)
    };
    let machine = Machine::with_parts(
        VmDir::new(temp.path()),
        VmName::parse("web").unwrap(),
        HostName::parse("a").unwrap(),
        parts,
    )
    .unwrap();
    // Another VM is not received in its place.
    let migration = slat_proto::model::MigrationName::parse("m1").unwrap();
    let other = v1::Vm {
        name: "vms/web".into(),
        uid: "other".into(),
        epoch: 1,
        ..Default::default()
    };
    let refused = machine.begin_incoming(&migration, &other, &[]).unwrap_err();
    assert_eq!(refused.metadata["field"], "vm.uid");
    assert_eq!(machine.create(fake::spec()).unwrap().uid, "given");
}

#[tokio::test]
async fn somebody_who_asks_which_process_lives_here_does_not_keep_it_from_beginning() {
    let temp = slat_test_dir::TestDir::new();
    let config = config(temp.path());
    std::fs::create_dir_all(&config.dir).unwrap();
    // As `living_pid` holds it.
    let asking = File::create(config.dir.join("lock")).unwrap();
    asking.try_lock_shared().unwrap();
    let mut signal = never();
    let process = serve(&config, fakes(), &mut signal, || ());
    let user = async {
        tokio::time::sleep(LOCK_RETRY * 3).await;
        drop(asking);
        while !VmDir::new(&config.dir).socket().exists() {
            tokio::time::sleep(LOCK_RETRY).await;
        }
    };
    tokio::select! {
        ended = within(process) => panic!("it ended: {ended:?}"),
        () = within(user) => {}
    }
}

#[tokio::test]
async fn a_process_lives_as_long_as_its_vm() {
    let temp = slat_test_dir::TestDir::new();
    let config = config(temp.path());
    let dir = VmDir::new(&config.dir);
    let (ready, told) = tokio::sync::oneshot::channel();
    let mut signal = never();
    let process = serve(&config, fakes(), &mut signal, move || {
        ready.send(()).unwrap();
    });
    let user = async {
        within(told).await.unwrap();
        assert_eq!(dir.living_pid().unwrap(), Some(std::process::id()));
        let mode = std::fs::metadata(dir.socket()).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);

        // A second process for the same VM.
        let mut signal = never();
        let second = serve(&config, fakes(), &mut signal, || panic!("ready twice")).await;
        assert!(
            matches!(second, Err(VmProcessError::Locked { pid, .. }) if pid == std::process::id())
        );
        assert!(
            dir.socket().exists(),
            "the first one's socket is left alone"
        );

        let mut vms = VmServiceClient::new(connect(&Address::Unix(dir.socket())).unwrap());
        let request = v1::CreateVmRequest {
            vm_id: "web".into(),
            spec: Some(fake::spec().to_message()),
            ..v1::CreateVmRequest::default()
        };
        within(vms.create_vm(request)).await.unwrap();
        let name = "vms/web".to_owned();
        within(vms.delete_vm(v1::DeleteVmRequest {
            name,
            ..Default::default()
        }))
        .await
        .expect("the answer arrives before the endpoint closes");
    };
    let (process, ()) = within(async { tokio::join!(process, user) }).await;
    process.unwrap();
    assert!(!dir.socket().exists());
    assert_eq!(dir.living_pid().unwrap(), None);
    let journal = Journal::read(&dir.journal()).unwrap().unwrap();
    assert_eq!(journal.ownership, Ownership::Ended);
}

#[tokio::test]
async fn a_stale_socket_goes_and_a_dead_owners_journal_refuses() {
    let temp = slat_test_dir::TestDir::new();
    let config = config(temp.path());
    let dir = VmDir::new(&config.dir);
    std::fs::create_dir_all(dir.path()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.socket()).unwrap());
    assert!(UnixStream::connect(dir.socket()).is_err(), "stale");
    let machine = fakes();
    let mut made = None;
    let keep = |dir, vm, host| {
        let machine: Made = machine(dir, vm, host);
        made = machine.as_ref().ok().cloned();
        machine
    };
    let (ready, told) = tokio::sync::oneshot::channel();
    let socket = dir.socket();
    let mut signal = never();
    let process = serve(&config, keep, &mut signal, move || {
        UnixStream::connect(socket).expect("ready means that it can be called");
        ready.send(()).unwrap();
    });
    {
        tokio::pin!(process);
        // Dies with its VM, as by kill -9: the future is dropped where it stands.
        let alive = within(async {
            tokio::select! {
                result = &mut process => Some(result),
                _ = told => None,
            }
        })
        .await;
        assert!(alive.is_none());
    }
    made.unwrap().create(fake::spec()).unwrap();
    assert_eq!(dir.living_pid().unwrap(), None);

    let mut signal = never();
    let again = serve(&config, fakes(), &mut signal, || panic!("ready")).await;
    let Err(VmProcessError::Api(error)) = again else {
        panic!("{again:?}");
    };
    assert_eq!(error.reason, Reason::VmState);
    assert_eq!(error.metadata["state"], "STATE_LOST");
}

#[tokio::test]
async fn a_signal_stops_the_vm_but_not_one_that_was_handed_over() {
    use rustix::process::{Signal as Kill, getpid, kill_process};
    // SIGUSR1 stands for SIGTERM here: the test process must outlive it, and no other test uses it.
    let mut usr1 = signal(SignalKind::user_defined1()).unwrap();
    let vm = fake::created();
    let machine = Arc::clone(&vm.machine);
    machine.start().unwrap();
    let migration = slat_proto::model::MigrationName::parse("m1").unwrap();
    machine.begin_outgoing(&migration, 1).unwrap();
    machine.enter_switchover(&migration).unwrap();
    machine.relinquish(&migration).unwrap();
    let refused = on_machine(&machine, Machine::stop).await.unwrap_err();
    assert_eq!(refused.reason, Reason::PastPointOfNoReturn);
    // Whatever comes first, the signal or the release, only the release ends it.
    kill_process(getpid(), Kill::USR1).unwrap();
    machine.release().unwrap();
    assert_eq!(
        within(live(&machine, &mut usr1, || false)).await,
        Exit::Released
    );

    let vm = fake::created();
    vm.machine.start().unwrap();
    kill_process(getpid(), Kill::USR1).unwrap();
    assert_eq!(
        within(live(&vm.machine, &mut usr1, || false)).await,
        Exit::Deleted
    );
    assert!(!vm.backend.state().running);
}

/// Makes a process a migration's destination, in PREPARING.
fn await_incoming(machine: &Machine) {
    let source = fake::created();
    let vm = source.machine.snapshot().unwrap();
    let slots = source.machine.memory().table();
    let slots: Vec<_> = slots.slots().iter().map(|slot| slot.spec()).collect();
    machine.begin_incoming(&m1(), &vm, &slots).unwrap();
}

/// A process over a fake backend, in a directory of its own, until `act` has seen it end.
async fn lives(act: impl AsyncFnOnce(Arc<Machine>, PathBuf)) {
    let temp = slat_test_dir::TestDir::new();
    let config = config(temp.path());
    let (made, machine) = tokio::sync::oneshot::channel();
    let fakes = fakes();
    let keep = |dir, vm, host| {
        let machine: Made = fakes(dir, vm, host);
        made.send(Arc::clone(machine.as_ref().unwrap())).unwrap();
        machine
    };
    let mut signal = signal(SignalKind::hangup()).unwrap();
    let process = serve(&config, keep, &mut signal, || ());
    let user = async {
        act(within(machine).await.unwrap(), config.dir.clone()).await;
    };
    let (ended, ()) = within(async { tokio::join!(process, user) }).await;
    ended.unwrap();
}

fn sigterm() {
    use rustix::process::{Signal as Kill, getpid, kill_process};
    // SIGHUP stands for it, see above.
    kill_process(getpid(), Kill::HUP).unwrap();
}

fn m1() -> slat_proto::model::MigrationName {
    slat_proto::model::MigrationName::parse("m1").unwrap()
}

/// What SIGTERM does in each state, with and without the VM's directory.
#[tokio::test]
async fn what_a_signal_may_not_end_ends_when_its_directory_is_gone() {
    // Handed over and not released, the signal first: it is remembered.
    lives(async |machine, dir| {
        machine.create(fake::spec()).unwrap();
        machine.start().unwrap();
        machine.begin_outgoing(&m1(), 1).unwrap();
        machine.enter_switchover(&m1()).unwrap();
        machine.relinquish(&m1()).unwrap();
        sigterm();
        tokio::time::sleep(TIDYING * 2).await;
        assert!(!machine.is_over(), "its directory is there, and answers");
        std::fs::remove_dir_all(dir).unwrap();
    })
    .await;

    // PREPARED, the directory first.
    lives(async |machine, dir| {
        await_incoming(&machine);
        machine.prepare(&m1()).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        tokio::time::sleep(TIDYING * 2).await;
        assert!(!machine.is_over(), "the source may have committed");
        sigterm();
    })
    .await;

    // A running VM lives on, and ends when it is told.
    lives(async |machine, dir| {
        machine.create(fake::spec()).unwrap();
        machine.start().unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        tokio::time::sleep(TIDYING * 2).await;
        assert!(machine.runs());
        sigterm();
    })
    .await;

    // What never owned the VM needs not be told.
    lives(async |_, dir| std::fs::remove_dir_all(dir).unwrap()).await;
    lives(async |machine, dir| {
        await_incoming(&machine);
        std::fs::remove_dir_all(dir).unwrap();
    })
    .await;
}
