//! What both ends must know before anything is reserved: handed on as the source says it, and a
//! mismatch reaches the user as the destination says it.

use slat_proto::{
    ApiError, Reason,
    v1::{self, Migration, MigrationPhase as Phase, VmLocation},
};
use tonic::Status;

use super::{Fleet, VM, reason};

const MISMATCHES: [Reason; 5] = [
    Reason::CpuIncompatible,
    Reason::IsaMismatch,
    Reason::PageSizeMismatch,
    Reason::StateVersionUnsupported,
    Reason::CapabilityMissing,
];

/// A migration that fails, and its error.
async fn failed(fleet: &mut Fleet) -> (Migration, v1::MigrationError) {
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(failed.vm_location(), VmLocation::Source);
    let error = failed.error.clone().unwrap();
    assert_eq!(error.metadata["vm_location"], "SOURCE");
    assert!(!error.advice.is_empty(), "{error:?}");
    assert_eq!(error.phase(), Phase::Preparing);
    (failed, error)
}

fn asked(fleet: &Fleet, call: &str) -> bool {
    let calls = [fleet.a.fake.calls(), fleet.b.fake.calls()].concat();
    calls.iter().any(|made| made.starts_with(call))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mismatch_reaches_the_user_as_the_destination_says_it() {
    let mut fleet = Fleet::start().await;
    for mismatch in MISMATCHES {
        let refusal = ApiError::new(mismatch, "they differ").with("differs", "x86.tsc_khz");
        fleet.b.fake.refuse_prepare(refusal);
        let (failed, error) = failed(&mut fleet).await;
        assert_eq!(reason(&failed), mismatch.as_str());
        assert_eq!(error.message, "they differ");
        assert_eq!(error.side, "destination");
        assert_eq!(error.metadata["differs"], "x86.tsc_khz");
    }
    assert!(!asked(&fleet, "start"));

    // Its own advice is better than ours.
    let refusal = ApiError::new(Reason::CpuIncompatible, "x").with("advice", "buy another");
    fleet.b.fake.refuse_prepare(refusal);
    let (_, error) = failed(&mut fleet).await;
    assert_eq!(error.advice, "buy another");

    // Nothing of them is left.
    fleet.precopy().await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_compares_and_reserves_nothing() {
    let mut fleet = Fleet::start().await;
    let differs = ApiError::new(Reason::CpuIncompatible, "the CPU lacks avx512f")
        .with("differs", "x86.cpuid.7.0.ebx");
    fleet.b.fake.refuse_prepare(differs);
    let request = || v1::CreateMigrationRequest {
        migration: Some(Migration {
            vm: VM.into(),
            destination: "hosts/b".into(),
            ..Default::default()
        }),
        validate_only: true,
        ..Default::default()
    };
    let refused = fleet.clients.migrations.create_migration(request()).await;
    let refused = ApiError::from(refused.unwrap_err());
    assert_eq!(refused.reason, Reason::CpuIncompatible);
    assert_eq!(refused.metadata["differs"], "x86.cpuid.7.0.ebx");
    let fits = fleet.clients.migrations.create_migration(request()).await;
    fits.unwrap();
    assert!(asked(&fleet, "describe"), "{:?}", fleet.a.fake.calls());
    assert!(fleet.b.fake.vm(VM).is_none(), "nothing is reserved");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_too_old_to_describe_itself_is_named() {
    let mut fleet = Fleet::start().await;
    let unknown = Status::unimplemented("unknown method");
    fleet.a.fake.refuse_describe(unknown);
    let (failed, error) = failed(&mut fleet).await;
    assert_eq!(reason(&failed), "STATE_VERSION_UNSUPPORTED");
    assert_eq!(
        (error.side.as_str(), error.metadata["host"].as_str()),
        ("source", "hosts/a")
    );
    assert!(!asked(&fleet, "prepare"));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_too_old_to_compare_is_named_and_cleaned_up() {
    let mut fleet = Fleet::start().await;
    fleet.b.fake.forget_versions();
    let (failed, error) = failed(&mut fleet).await;
    assert_eq!(reason(&failed), "STATE_VERSION_UNSUPPORTED");
    assert_eq!(
        (error.side.as_str(), error.metadata["host"].as_str()),
        ("destination", "hosts/b")
    );
    let released = format!("release TRANSFER_ROLE_DESTINATION {}", failed.name);
    fleet.b.fake.wait_call(&released).await;
    assert!(fleet.b.fake.vm(VM).is_none());
    assert!(!asked(&fleet, "start"));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_does_not_answer_ends_it_before_the_destination_is_asked() {
    let mut fleet = Fleet::start().await;
    fleet.a.fake.refuse_describe(Status::unavailable("gone"));
    let (failed, error) = failed(&mut fleet).await;
    assert_eq!(reason(&failed), "HOST_UNREACHABLE");
    assert_eq!(error.metadata["host"], "hosts/a");
    assert_eq!(error.side, "source");
    assert!(!asked(&fleet, "prepare"));
    fleet.stop().await;
}
