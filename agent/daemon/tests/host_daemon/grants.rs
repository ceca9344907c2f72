//! Leave for migrations: what the agent checks before it does anything, and what its VM processes
//! get to see of it.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::json;

/// Writes keys where an agent keeps what its server announced: in force for an hour more.
pub(crate) fn announce(state_dir: &Path, keys: &[[u8; 32]]) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let hour = Duration::from_secs(3600);
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap();
    let hex = |key: &[u8; 32]| -> String { key.iter().map(|byte| format!("{byte:02x}")).collect() };
    let keys: Vec<_> = keys
        .iter()
        .map(|key| {
            json!({
                "public_key": hex(key),
                "not_before_ms": millis(now - hour),
                // Beyond the clocks that tests have.
                "not_after_ms": millis(now + hour * 48),
            })
        })
        .collect();
    let file = state_dir.join("grant-keys.json");
    std::fs::write(file, json!({ "keys": keys }).to_string()).unwrap();
}

use slat_proto::{
    ApiError, Reason,
    transport::Endpoint,
    v1::{
        self, TransferPhase as Phase, TransferRole as Side,
        transfer_service_server::{TransferService, TransferServiceServer},
    },
};
use slat_record::dir::VmDir;
use slat_trust::grant::{Grant, Party, Purpose, Signer};
use tonic::{Request, Response, Status};

use crate::rig::{MIB, Rig, answer, reason, until};

fn signed(signer: &Signer, grant: &Grant) -> Option<v1::SignedGrant> {
    Some((&signer.sign(grant).unwrap()).into())
}

fn prepare(migration: &str, grant: Option<v1::SignedGrant>) -> v1::PrepareIncomingRequest {
    v1::PrepareIncomingRequest {
        migration: format!("migrations/{migration}"),
        grant,
        vm: Some(v1::Vm {
            uid: "u-web".into(),
            name: "vms/web".into(),
            epoch: 4,
            spec: Some(v1::VmSpec {
                memory_bytes: 16 * MIB,
                vcpus: 1,
                ..Default::default()
            }),
            ..Default::default()
        }),
        source_agent_address: "127.0.0.1:1".into(),
        preamble: Some(v1::Preamble {
            architecture: "fake".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn prepared(
    rig: &Rig,
    request: v1::PrepareIncomingRequest,
) -> Result<v1::PrepareIncomingResponse, ApiError> {
    answer(rig.transfers().prepare_incoming(request).await)
}

/// What a VM's process was asked.
fn asked<M: prost::Message + Default>(rig: &Rig, uid: &str, file: &str) -> M {
    let bytes = std::fs::read(rig.path_of(uid).join(file)).unwrap();
    M::decode(bytes.as_slice()).unwrap()
}

#[tokio::test]
async fn nothing_is_begun_without_leave_for_it() {
    let rig = Rig::started().await;
    let right = rig.unsigned(Purpose::Receive, "m1", ("u-web", 4)).await;
    let foreign = Signer::generate().unwrap();
    let own = &right.destination;
    let but = |change: &dyn Fn(&mut Grant)| {
        let mut grant = right.clone();
        change(&mut grant);
        signed(&rig.signer, &grant)
    };
    let other = |host: &str, incarnation: &str| Party {
        host: host.to_owned(),
        incarnation: incarnation.to_owned(),
    };
    let mut flipped = signed(&rig.signer, &right).unwrap();
    flipped.grant[60] ^= 4;
    let mut forged = signed(&rig.signer, &right).unwrap();
    forged.signature[0] ^= 1;
    let invalid = Reason::GrantInvalid;
    let cases = [
        (None, invalid, ""),
        (Some(flipped), invalid, ""),
        (Some(forged), invalid, ""),
        (but(&|it| it.purpose = Purpose::Send), invalid, "purpose"),
        (but(&|it| it.purpose = Purpose::Commit), invalid, "purpose"),
        (but(&|it| it.migration = "m2".into()), invalid, "migration"),
        (but(&|it| it.vm_uid = "u-db".into()), invalid, "vm_uid"),
        (but(&|it| it.epoch = 3), invalid, "epoch"),
        (
            but(&|it| it.destination = other("b", &own.incarnation)),
            invalid,
            "destination",
        ),
        (
            but(&|it| it.destination = other("a", "an earlier start")),
            invalid,
            "destination_incarnation",
        ),
        (but(&|it| it.not_after_ms = 1000), Reason::GrantExpired, ""),
        (signed(&foreign, &right), Reason::GrantKeyUnknown, ""),
    ];
    for (number, (grant, wanted, field)) in cases.into_iter().enumerate() {
        let refused = prepared(&rig, prepare("m1", grant)).await.unwrap_err();
        assert_eq!(refused.reason, wanted, "{number}: {refused}");
        let found = refused.metadata.get("field").map_or("", String::as_str);
        assert_eq!(found, field, "{number}: {refused}");
        assert!(!rig.path_of("u-web").exists(), "{number}");
    }
    // A question needs none.
    let dry = v1::PrepareIncomingRequest {
        validate_only: true,
        ..prepare("m1", None)
    };
    prepared(&rig, dry).await.unwrap();
    let grant = signed(&rig.signer, &right);
    let first = prepared(&rig, prepare("m1", grant.clone())).await.unwrap();
    let again = prepared(&rig, prepare("m1", grant)).await.unwrap();
    assert_eq!(first.ticket, again.ticket);
}

#[tokio::test]
async fn nothing_is_sent_or_decided_without_leave_for_it() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    let right = rig.sending("m1", "web").await;
    let commit = rig.grant(Purpose::Commit, "m1", ("u-web", 0)).await;
    let other = rig.grant(Purpose::Send, "m1", ("another", 0)).await;
    let stale = {
        let uid = rig.get("web").await.unwrap().uid;
        rig.grant(Purpose::Send, "m1", (&uid, 1)).await
    };
    for grant in [None, commit, other, stale] {
        let request = v1::StartOutgoingRequest {
            grant,
            ..right.clone()
        };
        let refused = answer(rig.transfers().start_outgoing(request).await);
        assert_eq!(reason(refused), Reason::GrantInvalid);
        assert_eq!(
            reason(rig.side("m1", Side::Source).await),
            Reason::NoSuchMigration
        );
    }
    answer(rig.transfers().start_outgoing(right).await).unwrap();

    rig.prepare("ready-1", "came", 16 * MIB).await.unwrap();
    let right = rig.commit("ready-1", ("u-came", 4)).await;
    let abort = rig.grant(Purpose::Abort, "ready-1", ("u-came", 4)).await;
    let elsewhere = rig.grant(Purpose::Commit, "ready-1", ("u-web", 4)).await;
    let another = rig.grant(Purpose::Commit, "ready-2", ("u-came", 4)).await;
    for grant in [None, abort, elsewhere, another] {
        let request = v1::ResolveTransferRequest {
            grant,
            // Only its agent may say so.
            ordered: true,
            ..right.clone()
        };
        let refused = answer(rig.transfers().resolve_transfer(request).await);
        assert_eq!(reason(refused), Reason::GrantInvalid);
    }
    let side = rig.side("ready-1", Side::Destination).await.unwrap();
    assert_eq!(side.phase(), Phase::Ready);
    answer(rig.transfers().resolve_transfer(right).await).unwrap();
}

#[tokio::test]
async fn a_vm_process_gets_the_grant_and_the_agents_own_keys() {
    let rig = Rig::started().await;
    let foreign = Signer::generate().unwrap();
    let theirs = vec![v1::GrantKey {
        key_id: foreign.key_id().to_vec(),
        public_key: foreign.public_key().to_vec(),
        ..Default::default()
    }];
    let own = rig.signer.public_key().to_vec();
    let keys = |keys: &[v1::GrantKey]| -> Vec<Vec<u8>> {
        keys.iter().map(|key| key.public_key.clone()).collect()
    };
    let grant = rig.grant(Purpose::Receive, "ready-1", ("u-web", 4)).await;
    let request = v1::PrepareIncomingRequest {
        grant_keys: theirs.clone(),
        ..prepare("ready-1", grant.clone())
    };
    prepared(&rig, request).await.unwrap();
    let got: v1::PrepareIncomingRequest = asked(&rig, "u-web", "prepared.pb");
    assert_eq!(
        (got.grant, keys(&got.grant_keys)),
        (grant, vec![own.clone()])
    );

    let request = v1::ResolveTransferRequest {
        grant_keys: theirs.clone(),
        ordered: true,
        ..rig.commit("ready-1", ("u-web", 4)).await
    };
    answer(rig.transfers().resolve_transfer(request.clone()).await).unwrap();
    let got: v1::ResolveTransferRequest = asked(&rig, "u-web", "resolved.pb");
    assert_eq!(
        (got.grant, keys(&got.grant_keys)),
        (request.grant, vec![own.clone()])
    );
    assert!(!got.ordered);

    let made = rig.create("db", 16 * MIB).await.unwrap();
    let request = v1::StartOutgoingRequest {
        grant_keys: theirs,
        ..rig.sending("m2", "db").await
    };
    answer(rig.transfers().start_outgoing(request.clone()).await).unwrap();
    let got: v1::StartOutgoingRequest = asked(&rig, &made.uid, "started.pb");
    assert_eq!(
        (got.grant, keys(&got.grant_keys)),
        (request.grant, vec![own])
    );
}

#[tokio::test]
async fn old_leave_does_not_begin_a_side_again() {
    let mut rig = Rig::started().await;
    let used = rig.grant(Purpose::Receive, "m1", ("u-web", 4)).await;
    prepared(&rig, prepare("m1", used.clone())).await.unwrap();
    rig.cancel("m1", Side::Destination).await.unwrap();
    rig.release("m1", Side::Destination).await.unwrap();
    let again = prepared(&rig, prepare("m1", used.clone())).await;
    assert_eq!(reason(again), Reason::GrantUsed);
    // What another start of this agent was given is no leave for this one.
    rig.stop().await;
    rig.start().await;
    let again = prepared(&rig, prepare("m1", used)).await;
    assert_eq!(reason(again), Reason::GrantInvalid);
    let anew = rig.grant(Purpose::Receive, "m1", ("u-web", 4)).await;
    prepared(&rig, prepare("m1", anew)).await.unwrap();
}

/// A source's agent that says how its side stands, and to whom.
struct Source {
    phase: Phase,
    asked: tokio::sync::watch::Sender<Option<v1::GetTransferRequest>>,
}

type Reply<T> = Result<Response<T>, Status>;

fn never<T>() -> Reply<T> {
    Err(Status::internal("not of a source's agent"))
}

#[tonic::async_trait]
impl TransferService for Source {
    async fn get_transfer(&self, request: Request<v1::GetTransferRequest>) -> Reply<v1::Transfer> {
        let request = request.into_inner();
        let migration = request.migration.clone();
        self.asked.send_replace(Some(request));
        Ok(Response::new(v1::Transfer {
            migration,
            role: Side::Source.into(),
            phase: self.phase.into(),
            epoch: 4,
            ..Default::default()
        }))
    }

    async fn describe_outgoing(
        &self,
        _: Request<v1::DescribeOutgoingRequest>,
    ) -> Reply<v1::DescribeOutgoingResponse> {
        never()
    }

    async fn prepare_incoming(
        &self,
        _: Request<v1::PrepareIncomingRequest>,
    ) -> Reply<v1::PrepareIncomingResponse> {
        never()
    }

    async fn start_outgoing(&self, _: Request<v1::StartOutgoingRequest>) -> Reply<v1::Transfer> {
        never()
    }

    type WatchTransferStream = tokio_stream::wrappers::ReceiverStream<Result<v1::Transfer, Status>>;

    async fn watch_transfer(
        &self,
        _: Request<v1::WatchTransferRequest>,
    ) -> Reply<Self::WatchTransferStream> {
        never()
    }

    async fn cancel_transfer(&self, _: Request<v1::CancelTransferRequest>) -> Reply<v1::Transfer> {
        never()
    }

    async fn resolve_transfer(
        &self,
        _: Request<v1::ResolveTransferRequest>,
    ) -> Reply<v1::Transfer> {
        never()
    }

    async fn release_transfer(
        &self,
        _: Request<v1::ReleaseTransferRequest>,
    ) -> Reply<v1::ReleaseTransferResponse> {
        never()
    }

    async fn adopt_transfer(
        &self,
        _: Request<v1::AdoptTransferRequest>,
    ) -> Reply<v1::AdoptTransferResponse> {
        never()
    }
}

#[tokio::test]
async fn a_destination_in_doubt_asks_by_its_agent_with_the_grant_that_it_came_by() {
    for (phase, ends) in [
        (Phase::Relinquished, Phase::Completed),
        (Phase::Failed, Phase::Cancelled),
    ] {
        let mut rig = Rig::started().await;
        let grant = rig.grant(Purpose::Receive, "ready-1", ("u-web", 4)).await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let request = v1::PrepareIncomingRequest {
            source_agent_address: address.to_string(),
            ..prepare("ready-1", grant.clone())
        };
        prepared(&rig, request).await.unwrap();
        // The agent that asks is a later one.
        rig.stop().await;
        let (asked, mut heard) = tokio::sync::watch::channel(None);
        let source = TransferServiceServer::new(Source { phase, asked });
        let endpoint = Endpoint::new()
            .service(source)
            .serve_tcp(listener)
            .await
            .unwrap();
        rig.start().await;
        let asking = heard.wait_for(Option::is_some);
        let question = tokio::time::timeout(crate::rig::SOON, asking)
            .await
            .unwrap();
        let question = question.unwrap().clone().unwrap();
        assert_eq!(question.grant, grant);
        assert_eq!(question.role(), Side::Source);
        until(async || {
            let side = rig.side("ready-1", Side::Destination).await.ok()?;
            (side.phase() == ends).then_some(())
        })
        .await;
        let kept = VmDir::new(rig.path_of("u-web"))
            .path()
            .join("received-ready-1.pb");
        rig.release("ready-1", Side::Destination).await.unwrap();
        assert!(!kept.exists());
        endpoint.stop().await;
    }
}
