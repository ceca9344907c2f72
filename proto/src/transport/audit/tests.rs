//! Every method of the package through the layer, and what a line says.

use http_body_util::{BodyExt as _, Full};
use prost::Message as _;
use tower::ServiceExt as _;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, Registry, layer::SubscriberExt as _};

use super::*;
use crate::{ApiError, Reason};

/// Lines of the audit: level and fields.
type Lines = Arc<Mutex<Vec<(Level, BTreeMap<String, String>)>>>;

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

struct Keep(Lines);

impl<S: Subscriber> Layer<S> for Keep {
    fn on_event(&self, event: &Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if event.metadata().target() == "audit" {
            let mut fields = Fields::default();
            event.record(&mut fields);
            let level = *event.metadata().level();
            self.0.lock().unwrap().push((level, fields.0));
        }
    }
}

fn framed(message: &[u8]) -> Bytes {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(message);
    bytes.into()
}

/// A service that answers every call with this message, or this error.
#[derive(Clone)]
struct Answers(Result<Vec<u8>, ApiError>);

impl Service<Request<AxumBody>> for Answers {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<AxumBody>) -> Self::Future {
        let answer = self.0.clone();
        Box::pin(async move {
            drop(request.into_body().collect().await);
            Ok(match answer {
                Err(error) => Status::from(error).into_http(),
                Ok(message) => {
                    let trailers = HeaderMap::from_iter([(
                        http::HeaderName::from_static("grpc-status"),
                        http::HeaderValue::from_static("0"),
                    )]);
                    let body =
                        Full::new(framed(&message)).with_trailers(async { Some(Ok(trailers)) });
                    Response::new(AxumBody::new(body))
                }
            })
        })
    }
}

/// The lines of one call.
async fn call(
    audit: &Audit<Answers>,
    path: &str,
    message: &[u8],
    relayed: bool,
) -> Vec<(Level, BTreeMap<String, String>)> {
    call_as(Role::Server, audit, path, message, relayed).await
}

async fn call_as(
    role: Role,
    audit: &Audit<Answers>,
    path: &str,
    message: &[u8],
    relayed: bool,
) -> Vec<(Level, BTreeMap<String, String>)> {
    let lines = Lines::default();
    let kept = Registry::default().with(Keep(Arc::clone(&lines)));
    let guard = tracing::subscriber::set_default(kept);
    let mut request = Request::post(path)
        .body(AxumBody::from(framed(message)))
        .unwrap();
    request.extensions_mut().insert(Caller {
        identity: None,
        peer: "192.0.2.7:4242".into(),
    });
    request.extensions_mut().insert(Permit::of(role));
    if relayed {
        request.headers_mut().insert(RELAYED, "1".parse().unwrap());
    }
    let answer = audit.clone().oneshot(request).await.unwrap();
    drop(answer.into_body().collect().await);
    drop(guard);
    Arc::try_unwrap(lines).unwrap().into_inner().unwrap()
}

const READING: [&str; 18] = [
    "VmService/GetVm",
    "VmService/ListVms",
    "VmService/WatchVm",
    "MemoryService/ListSlots",
    "MemoryService/ListDirtyCursors",
    "MemoryService/DigestMemory",
    "HostService/GetHost",
    "HostService/ListHosts",
    "HostService/ListLeftovers",
    "FleetService/ReportHost",
    "MigrationService/GetMigration",
    "MigrationService/ListMigrations",
    "MigrationService/WatchMigration",
    "SnapshotService/GetSave",
    "SnapshotService/ListSaves",
    "SnapshotService/WatchSave",
    "SnapshotService/VerifySave",
    "PagingService/ListMappings",
];

#[tokio::test]
async fn each_call_is_one_line_and_a_look_a_quiet_one() {
    let pool = DescriptorPool::decode(v1::FILE_DESCRIPTOR_SET).unwrap();
    let ok = Audit::new(Answers(Ok(Vec::new())), false);
    let refuses = Audit::new(
        Answers(Err(ApiError::new(Reason::VmState, "it is stopped"))),
        false,
    );
    let denies = Audit::new(
        Answers(Err(ApiError::new(Reason::Permission, "not for you"))),
        false,
    );
    let mut changing = 0;
    for service in pool.services() {
        for method in service.methods() {
            let name = format!("{}/{}", service.name(), method.name());
            let path = format!("/slat.v1.{name}");
            // Of TransferService, sides are looked at, and one end described.
            let reads = READING.contains(&name.as_str())
                || ["GetTransfer", "WatchTransfer", "DescribeOutgoing"].contains(&method.name());
            let lines = call(&ok, &path, &[], false).await;
            assert_eq!(lines.len(), 1, "{name}: {lines:?}");
            let refused = call(&refuses, &path, &[], false).await;
            assert_eq!(refused.len(), 1, "{name}: {refused:?}");
            changing += usize::from(!reads);
            let level = if reads { Level::DEBUG } else { Level::INFO };
            assert_eq!(lines[0].0, level, "{name}");
            assert_eq!(refused[0].0, level, "{name}");
            assert_eq!(lines[0].1["result"], "OK", "{name}");
            assert_eq!(refused[0].1["result"], "VM_STATE", "{name}");
            assert_eq!(lines[0].1["method"], format!("slat.v1.{name}"));
            let denied = call(&denies, &path, &[], false).await;
            assert_eq!(denied[0].0, Level::INFO, "{name}: a denial is never quiet");
        }
    }
    assert!(changing >= 20, "{changing}");
}

#[tokio::test]
async fn a_line_says_who_what_which_and_how_it_ended() {
    let vm = v1::Vm {
        uid: "uid-of-the-answer".into(),
        ..Default::default()
    };
    let audit = Audit::new(Answers(Ok(vm.encode_to_vec())), false);
    let create = v1::CreateVmRequest {
        vm_id: "we\nb".into(),
        host: "h".repeat(1000),
        validate_only: true,
        ..Default::default()
    };
    let path = "/slat.v1.VmService/CreateVm";
    let lines = call(&audit, path, &create.encode_to_vec(), false).await;
    let line = &lines[0].1;
    assert_eq!(line["peer"], "192.0.2.7:4242");
    assert_eq!(line["uid"], "uid-of-the-answer");
    assert_eq!(
        line["what"],
        format!("vm_id=we\\nb host={} validate_only=true", "h".repeat(TEXT))
    );
    let delete = v1::DeleteVmRequest {
        name: "vms/web".into(),
        uid: "uid-of-the-request".into(),
        force: true,
        ..Default::default()
    };
    let path = "/slat.v1.VmService/DeleteVm";
    let lines = call(&audit, path, &delete.encode_to_vec(), false).await;
    assert_eq!(lines[0].1["uid"], "uid-of-the-request");
    assert_eq!(lines[0].1["what"], "name=vms/web force=true");
    let migrate = v1::CreateMigrationRequest {
        migration: Some(v1::Migration {
            vm: "vms/web".into(),
            destination: "hosts/b".into(),
            vm_uid: "u".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let path = "/slat.v1.MigrationService/CreateMigration";
    let lines = call(&audit, path, &migrate.encode_to_vec(), false).await;
    assert_eq!(lines[0].1["what"], "vm=vms/web destination=hosts/b");
    assert_eq!(lines[0].1["uid"], "u");
}

#[tokio::test]
async fn a_relayed_call_is_its_first_endpoints_and_an_entry_believes_no_relay() {
    let path = "/slat.v1.VmService/PauseVm";
    let agent = Audit::new(Answers(Ok(Vec::new())), false);
    assert_eq!(call(&agent, path, &[], true).await[0].0, Level::DEBUG);
    assert_eq!(call(&agent, path, &[], false).await[0].0, Level::INFO);
    let server = Audit::new(Answers(Ok(Vec::new())), true);
    assert_eq!(call(&server, path, &[], true).await[0].0, Level::INFO);
}

#[tokio::test]
async fn only_who_may_relay_is_believed_and_a_refusal_is_always_told() {
    let path = "/slat.v1.VmService/DeleteVm";
    let agent = Audit::new(Answers(Ok(Vec::new())), false);
    for role in Role::ALL {
        let line = call_as(role, &agent, path, &[], true).await.remove(0);
        let expected = match role {
            Role::Server | Role::Local | Role::Open => Level::DEBUG,
            _ => Level::INFO,
        };
        assert_eq!(line.0, expected, "{role}");
    }
    let refuses = Audit::new(
        Answers(Err(ApiError::new(Reason::GrantUsed, "it was used"))),
        false,
    );
    let line = call(&refuses, path, &[], true).await.remove(0);
    assert_eq!((line.0, &*line.1["result"]), (Level::INFO, "GRANT_USED"));
}

#[test]
fn no_more_is_kept_of_a_body_than_its_first_message() {
    let passed = Passed::default();
    let first = framed(&[7; 100]);
    // The head comes in two pieces.
    for piece in [first.slice(..3), first.slice(3..50), first.slice(50..)] {
        passed.add(&piece);
    }
    for _ in 0..1_000 {
        passed.add(&framed(&[8; 1_000]));
    }
    assert_eq!(&*passed.0.lock().unwrap().all(), &*first);
    let endless = Passed::default();
    for _ in 0..100 {
        endless.add(&vec![0xff; 1 << 20].into());
    }
    let kept = endless.0.lock().unwrap().bytes;
    assert!(kept <= LOOK_AT + (1 << 20), "{kept}");
}

#[tokio::test]
async fn a_call_whose_caller_went_away_is_logged_as_cancelled() {
    let lines = Lines::default();
    let kept = Registry::default().with(Keep(Arc::clone(&lines)));
    let guard = tracing::subscriber::set_default(kept);
    let mut audit = Audit::new(Answers(Ok(Vec::new())), false);
    let request = Request::post("/slat.v1.VmService/StartVm");
    // Never polled: as when the connection broke.
    drop(audit.call(request.body(AxumBody::empty()).unwrap()));
    drop(guard);
    let lines = lines.lock().unwrap();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].1["result"], "CANCELLED");
}
