//! Bad input through the API: a typed error with its gRPC code, reason and metadata, and nothing
//! left behind.

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    v1::{self, Backend, MigrationPhase, slot_change::Change},
};
use slat_tests::{
    Fleet, Layout,
    guest::{MIB, busy, crawling, fast, usual},
    scene,
};
use tonic::{Response, Status};

/// The answer is this refusal, in its gRPC code, with this metadata.
fn refused<T: std::fmt::Debug>(
    answer: Result<Response<T>, Status>,
    reason: Reason,
    metadata: &[(&str, &str)],
) -> anyhow::Result<()> {
    let status = match answer {
        Ok(response) => anyhow::bail!("{} expected, not {response:?}", reason.as_str()),
        Err(status) => status,
    };
    let code = status.code();
    ensure!(!status.message().is_empty(), "{status:?}");
    let error = ApiError::from(status);
    ensure!(
        error.reason == reason,
        "{} expected: {error:?}",
        reason.as_str()
    );
    ensure!(code == reason.code(), "{code:?}: {error:?}");
    for (key, value) in metadata {
        ensure!(
            error.metadata.get(*key).map(String::as_str) == Some(value),
            "{key}: {error:?}"
        );
    }
    Ok(())
}

#[test]
fn vm_specs_and_names() {
    scene::run(Layout::two(Backend::Software), async |fleet: &mut Fleet| {
        let good = || usual(fleet.backend());
        let create = |id: &str, host: &str, spec: v1::VmSpec| {
            let request = v1::CreateVmRequest {
                vm_id: id.into(),
                spec: Some(spec),
                host: host.into(),
                validate_only: false,
            };
            let mut vms = fleet.vms(&fleet.server());
            async move { vms.create_vm(request).await }
        };
        let long = "a".repeat(64);
        for id in [
            "", "UPPER", "a_b", "-a", "a-", "a.b", "../x", "a/b", "ü", "a b", &long,
        ] {
            refused(
                create(id, "hosts/host-a", good()).await,
                Reason::BadParameter,
                &[],
            )
            .with_context(|| format!("{id:?}"))?;
        }
        let bad = |change: &dyn Fn(&mut v1::VmSpec)| {
            let mut spec = good();
            change(&mut spec);
            spec
        };
        let specs = [
            (bad(&|spec| spec.vcpus = 0), "spec.vcpus"),
            (bad(&|spec| spec.vcpus = 65), "spec.vcpus"),
            (bad(&|spec| spec.memory_bytes = 0), "spec.memory_bytes"),
            (
                bad(&|spec| spec.memory_bytes = 64 * MIB + 4096),
                "spec.memory_bytes",
            ),
            (
                bad(&|spec| spec.memory_bytes = u64::MAX),
                "spec.memory_bytes",
            ),
            (bad(&|spec| spec.backend = 99), "spec.backend"),
            (bad(&|spec| spec.format = 99), "spec.format"),
        ];
        for (spec, field) in specs {
            let answer = create("x", "hosts/host-a", spec).await;
            refused(answer, Reason::BadParameter, &[("field", field)]).context(field)?;
        }
        let nowhere = create("x", "hosts/nowhere", good()).await;
        refused(nowhere, Reason::NoSuchHost, &[("host", "hosts/nowhere")])?;
        let huge = create("x", "hosts/host-a", busy(fleet.backend(), 4096, 1, None)).await;
        refused(
            huge,
            Reason::NoMemory,
            &[("needed_bytes", &(4096 * MIB).to_string())],
        )?;
        create("x", "hosts/host-a", good()).await?;
        // On the other host too: names are the fleet's.
        refused(
            create("x", "hosts/host-b", good()).await,
            Reason::VmExists,
            &[("vm", "vms/x")],
        )?;

        let server = fleet.server();
        for endpoint in [&server, &fleet.agent("host-a")] {
            let name = || "vms/nobody".to_owned();
            let vm = [("vm", "vms/nobody")];
            let mut vms = fleet.vms(endpoint);
            refused(
                vms.get_vm(v1::GetVmRequest {
                    name: name(),
                    ..Default::default()
                })
                .await,
                Reason::NoSuchVm,
                &vm,
            )?;
            refused(
                vms.start_vm(v1::StartVmRequest {
                    name: name(),
                    ..Default::default()
                })
                .await,
                Reason::NoSuchVm,
                &vm,
            )?;
            refused(
                vms.pause_vm(v1::PauseVmRequest {
                    name: name(),
                    ..Default::default()
                })
                .await,
                Reason::NoSuchVm,
                &vm,
            )?;
            refused(
                vms.resume_vm(v1::ResumeVmRequest {
                    name: name(),
                    ..Default::default()
                })
                .await,
                Reason::NoSuchVm,
                &vm,
            )?;
            refused(
                vms.delete_vm(v1::DeleteVmRequest {
                    name: name(),
                    ..Default::default()
                })
                .await,
                Reason::NoSuchVm,
                &vm,
            )?;
            let mut memory = fleet.memory(endpoint);
            refused(
                memory
                    .list_slots(v1::ListSlotsRequest {
                        vm: name(),
                        ..Default::default()
                    })
                    .await,
                Reason::NoSuchVm,
                &vm,
            )?;
            refused(
                memory
                    .digest_memory(v1::DigestMemoryRequest {
                        vm: name(),
                        ..Default::default()
                    })
                    .await,
                Reason::NoSuchVm,
                &vm,
            )?;
            let get = vms
                .get_vm(v1::GetVmRequest {
                    name: "nobody/x".into(),
                    ..Default::default()
                })
                .await;
            refused(get, Reason::BadParameter, &[])?;
        }
        let watch = fleet
            .vms(&server)
            .watch_vm(v1::WatchVmRequest {
                name: "vms/nobody".into(),
                ..Default::default()
            })
            .await;
        refused(watch.map(|_| Response::new(())), Reason::NoSuchVm, &[])?;
        let get = fleet
            .hosts(&server)
            .get_host(v1::GetHostRequest {
                name: "hosts/nowhere".into(),
            })
            .await;
        refused(get, Reason::NoSuchHost, &[("host", "hosts/nowhere")])?;
        // Only what was made is there.
        let vms = fleet
            .vms(&server)
            .list_vms(v1::ListVmsRequest::default())
            .await?
            .into_inner()
            .vms;
        ensure!(vms.len() == 1 && vms[0].name == "vms/x", "{vms:#?}");
        fleet.memory_used("host-a", 64 * MIB).await?;
        fleet.memory_used("host-b", 0).await
    });
}

#[test]
fn migrations() {
    let layout = Layout {
        backend: scene::best_backend(),
        hosts: vec![("host-a", 512), ("host-b", 512), ("small", 32)],
        own_clocks: false,
    };
    scene::run(layout, async |fleet: &mut Fleet| {
        let vm = fleet
            .run_vm("web", "host-a", usual(fleet.backend()))
            .await?;
        let create = |vm: &str, destination: &str, params: v1::MigrationParams| {
            let request = v1::CreateMigrationRequest {
                migration: Some(v1::Migration {
                    vm: vm.into(),
                    destination: destination.into(),
                    params: Some(params),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let mut migrations = fleet.migrations();
            async move { migrations.create_migration(request).await }
        };
        let to_b = "hosts/host-b";
        refused(
            create("vms/nobody", to_b, fast()).await,
            Reason::NoSuchVm,
            &[("vm", "vms/nobody")],
        )?;
        for (vm, destination) in [
            ("vms/Web", to_b),
            ("hosts/web", to_b),
            ("", to_b),
            (&vm.name, ""),
        ] {
            let answer = create(vm, destination, fast()).await;
            refused(answer, Reason::BadParameter, &[]).with_context(|| format!("{vm:?}"))?;
        }
        let nowhere = create(&vm.name, "hosts/nowhere", fast()).await;
        refused(nowhere, Reason::NoSuchHost, &[("host", "hosts/nowhere")])?;
        refused(
            create(&vm.name, "hosts/host-a", fast()).await,
            Reason::SameHost,
            &[],
        )?;
        let small = create(&vm.name, "hosts/small", fast()).await;
        let needed = (64 * MIB).to_string();
        let free = (32 * MIB).to_string();
        refused(
            small,
            Reason::DstNoMemory,
            &[("needed_bytes", &needed), ("free_bytes", &free)],
        )?;
        let zero = prost_types::Duration::default();
        let bad = [
            (
                v1::MigrationParams {
                    streams: 17,
                    ..fast()
                },
                "params.streams",
            ),
            (
                v1::MigrationParams {
                    max_downtime: Some(zero),
                    ..fast()
                },
                "params.max_downtime",
            ),
            (
                v1::MigrationParams {
                    max_total_time: Some(zero),
                    ..fast()
                },
                "params.max_total_time",
            ),
            (
                v1::MigrationParams {
                    verify: 9,
                    ..fast()
                },
                "params.verify",
            ),
            (
                v1::MigrationParams {
                    on_timeout: 9,
                    ..fast()
                },
                "params.on_timeout",
            ),
        ];
        for (params, field) in bad {
            let answer = create(&vm.name, to_b, params).await;
            refused(answer, Reason::BadParameter, &[("field", field)]).context(field)?;
        }
        let mut client = fleet.migrations();
        let unknown = || "migrations/none".to_owned();
        let named = [("migration", "migrations/none")];
        let get = client
            .get_migration(v1::GetMigrationRequest { name: unknown() })
            .await;
        refused(get, Reason::NoSuchMigration, &named)?;
        let cancel = client
            .cancel_migration(v1::CancelMigrationRequest { name: unknown() })
            .await;
        refused(cancel, Reason::NoSuchMigration, &named)?;
        let watch = client
            .watch_migration(v1::WatchMigrationRequest { name: unknown() })
            .await;
        refused(
            watch.map(|_| Response::new(())),
            Reason::NoSuchMigration,
            &named,
        )?;
        let none = client
            .list_migrations(v1::ListMigrationsRequest::default())
            .await?
            .into_inner();
        ensure!(none.migrations.is_empty(), "{none:#?}");

        // While one runs: no second one, no deletion, no change of slots.
        let running = fleet
            .migrate_until_precopy(&vm.name, "host-b", crawling())
            .await?;
        let busy = [("migration", running.name.as_str())];
        refused(
            create(&vm.name, to_b, fast()).await,
            Reason::MigrationInProgress,
            &busy,
        )?;
        let delete = v1::DeleteVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        for endpoint in [fleet.server(), fleet.agent("host-a")] {
            let answer = fleet.vms(&endpoint).delete_vm(delete.clone()).await;
            refused(answer, Reason::MigrationInProgress, &busy)?;
        }
        let request = v1::UpdateSlotsRequest {
            vm: vm.name.clone(),
            changes: vec![create_slot(9, 1 << 20, 16)],
            expected_generation: 0,
            ..Default::default()
        };
        let answer = fleet.memory(&fleet.server()).update_slots(request).await;
        refused(answer, Reason::MigrationInProgress, &busy)?;
        let cancel = v1::CancelMigrationRequest {
            name: running.name.clone(),
        };
        fleet.migrations().cancel_migration(cancel).await?;
        fleet
            .migration_ends(&running.name, MigrationPhase::Cancelled)
            .await?;
        fleet.runs_soundly_on(&vm.name, "host-a").await?;
        fleet.memory_used("host-b", 0).await?;
        fleet.memory_used("small", 0).await
    });
}

fn create_slot(slot: u32, base_gfn: u64, pages: u64) -> v1::SlotChange {
    v1::SlotChange {
        change: Some(Change::Create(v1::slot_change::Create {
            slot: Some(v1::Slot {
                slot,
                base_gfn,
                pages,
                ..Default::default()
            }),
        })),
    }
}

#[test]
fn slots() {
    scene::run(
        Layout::two(scene::best_backend()),
        async |fleet: &mut Fleet| {
            let vm = fleet
                .run_vm("web", "host-a", usual(fleet.backend()))
                .await?;
            let server = fleet.server();
            let list = || async {
                let request = v1::ListSlotsRequest {
                    vm: vm.name.clone(),
                    ..Default::default()
                };
                anyhow::Ok(
                    fleet
                        .memory(&server)
                        .list_slots(request)
                        .await?
                        .into_inner(),
                )
            };
            let before = list().await?;
            let update = |changes: Vec<v1::SlotChange>, generation: u64| {
                let request = v1::UpdateSlotsRequest {
                    vm: vm.name.clone(),
                    changes,
                    expected_generation: generation,
                    ..Default::default()
                };
                let mut memory = fleet.memory(&server);
                async move { memory.update_slots(request).await }
            };
            let moved = |slot: u32, base_gfn: u64| v1::SlotChange {
                change: Some(Change::Move(v1::slot_change::Move { slot, base_gfn })),
            };
            let deleted = |slot: u32| v1::SlotChange {
                change: Some(Change::Delete(v1::slot_change::Delete { slot })),
            };
            let table = Reason::BadSlotTable;
            let bad = [
                ("overlap below", create_slot(5, 16_000, 1000), table, "5"),
                ("overlap within", create_slot(5, 100, 10), table, "5"),
                (
                    "the number is taken",
                    create_slot(0, 1 << 20, 16),
                    table,
                    "0",
                ),
                (
                    "a wrapping end",
                    create_slot(5, u64::MAX - 4, 16),
                    table,
                    "5",
                ),
                (
                    "past guest-physical space",
                    create_slot(5, 1 << 40, 16),
                    table,
                    "5",
                ),
                (
                    "too many pages",
                    create_slot(5, 1 << 20, 1 << 31),
                    table,
                    "5",
                ),
                ("no page", create_slot(5, 1 << 20, 0), table, "5"),
                (
                    "a number out of range",
                    create_slot(32_767, 1 << 20, 16),
                    table,
                    "32767",
                ),
                ("a move that wraps", moved(0, u64::MAX), table, "0"),
                (
                    "an unknown slot deleted",
                    deleted(33),
                    Reason::NoSuchSlot,
                    "33",
                ),
                (
                    "an unknown slot moved",
                    moved(33, 1 << 20),
                    Reason::NoSuchSlot,
                    "33",
                ),
            ];
            for (what, change, reason, slot) in bad {
                // All or none: a good change before the bad one is not made either.
                for changes in [vec![change], vec![create_slot(77, 2 << 20, 16), change]] {
                    refused(update(changes, 0).await, reason, &[("slot", slot)]).context(what)?;
                    ensure!(list().await? == before, "{what} changed the table");
                }
            }
            let empty = v1::SlotChange { change: None };
            refused(update(vec![empty], 0).await, Reason::BadParameter, &[])?;
            refused(update(Vec::new(), 0).await, Reason::BadParameter, &[])?;
            let many = (0..1025)
                .map(|i| create_slot(100 + i, (1 << 20) + u64::from(i), 1))
                .collect();
            refused(update(many, 0).await, Reason::BadParameter, &[])?;
            let stale = update(vec![create_slot(5, 1 << 20, 16)], before.generation + 5).await;
            refused(stale, Reason::StaleGeneration, &[])?;
            let flags = v1::SlotChange {
                change: Some(Change::SetFlags(v1::slot_change::SetFlags {
                    slot: 0,
                    read_only: true,
                })),
            };
            refused(update(vec![flags], 0).await, table, &[("slot", "0")])?;
            // More than the host has left.
            let large = update(vec![create_slot(5, 1 << 20, 1 << 20)], 0).await;
            refused(large, Reason::NoMemory, &[])?;
            ensure!(list().await? == before, "a refused change was made");

            for (gfn, pages) in [(16_384, 1), (0, 16_385), (u64::MAX, 2), (100, 0)] {
                let request = v1::InvalidateMemoryRequest {
                    vm: vm.name.clone(),
                    range: Some(v1::GfnRange { gfn, pages }),
                    ..Default::default()
                };
                let answer = fleet.memory(&server).invalidate_memory(request).await;
                refused(answer, Reason::BadParameter, &[])
                    .with_context(|| format!("{gfn} + {pages}"))?;
            }
            let good = v1::GfnRange { gfn: 100, pages: 1 };
            for (ranges, at) in [
                (Vec::new(), None),
                (vec![good; 1025], None),
                (
                    vec![
                        good,
                        v1::GfnRange {
                            gfn: 16_384,
                            pages: 1,
                        },
                    ],
                    Some("1"),
                ),
                (vec![v1::GfnRange { gfn: 5, pages: 0 }], Some("0")),
            ] {
                let request = v1::DiscardMemoryRequest {
                    vm: vm.name.clone(),
                    ranges,
                    ..Default::default()
                };
                let answer = fleet.memory(&server).discard_memory(request).await;
                let at: Vec<_> = at.map(|at| ("range", at)).into_iter().collect();
                refused(answer, Reason::BadParameter, &at)?;
            }
            let request = v1::HarvestDirtyPagesRequest {
                vm: vm.name.clone(),
                cursor: "Not_A_Name".into(),
                acknowledge_batch: 0,
                ..Default::default()
            };
            let answer = fleet.memory(&server).harvest_dirty_pages(request).await;
            refused(answer, Reason::BadParameter, &[])?;
            fleet.memory_used("host-a", 64 * MIB).await?;
            fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
        },
    );
}
