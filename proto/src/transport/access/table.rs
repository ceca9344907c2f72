//! Which role may call which method: the one table. What is not in it is denied.
//!
//! `docs/access.md` is made of it; a test compares them, and another fails for a method of the
//! `.proto` files without a row.

use std::fmt::Write as _;

use super::role::Role;

/// What a method needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Right {
    /// A good certificate, whoever's.
    Anyone,
    /// To look.
    Look,
    /// To work with VMs and their memory.
    Operate,
    /// To work with hosts.
    Administer,
    /// To speak for a host.
    Report,
    /// To carry a migration out.
    Transfer,
    /// To ask how a side of a migration stands.
    Ask,
    /// To be on the same machine, at a Unix socket.
    Local,
}

impl Right {
    pub(in super::super) const fn allows(self, role: Role) -> bool {
        // Who may open a VM's socket, or an endpoint that asks for no certificate, is in control.
        if matches!(role, Role::Local | Role::Open) {
            return !matches!((self, role), (Self::Local, Role::Open));
        }
        match self {
            Self::Anyone => true,
            Self::Look => matches!(
                role,
                Role::Viewer | Role::Operator | Role::Admin | Role::Server
            ),
            Self::Operate => matches!(role, Role::Operator | Role::Admin | Role::Server),
            Self::Administer => matches!(role, Role::Admin | Role::Server),
            Self::Report => matches!(role, Role::Agent),
            Self::Transfer => matches!(role, Role::Server),
            Self::Ask => matches!(role, Role::Server | Role::Agent),
            Self::Local => false,
        }
    }
}

/// Every method, by service.
const TABLE: &[(&str, Right, &[&str])] = &[
    (
        "slat.v1.VmService",
        Right::Look,
        &["GetVm", "ListVms", "WatchVm"],
    ),
    (
        "slat.v1.VmService",
        Right::Operate,
        &["CreateVm", "StartVm", "PauseVm", "ResumeVm", "DeleteVm"],
    ),
    (
        "slat.v1.MemoryService",
        Right::Look,
        &["ListSlots", "ListDirtyCursors"],
    ),
    (
        "slat.v1.MemoryService",
        Right::Operate,
        &[
            "UpdateSlots",
            "HarvestDirtyPages",
            "DeleteDirtyCursor",
            "MeasureDirtyRate",
            "InvalidateMemory",
            "DiscardMemory",
            "DigestMemory",
        ],
    ),
    ("slat.v1.PagingService", Right::Look, &["ListMappings"]),
    (
        "slat.v1.PagingService",
        Right::Operate,
        &["RetryPageSource", "HarvestWorkingSet", "PrefaultMemory"],
    ),
    (
        "slat.v1.SnapshotService",
        Right::Look,
        &["GetSave", "ListSaves", "WatchSave"],
    ),
    (
        "slat.v1.SnapshotService",
        Right::Operate,
        &[
            "CreateSave",
            "VerifySave",
            "DeleteSave",
            "RestoreVm",
            "ForkVm",
        ],
    ),
    (
        "slat.v1.MigrationService",
        Right::Look,
        &["GetMigration", "ListMigrations", "WatchMigration"],
    ),
    (
        "slat.v1.MigrationService",
        Right::Operate,
        &["CreateMigration", "CancelMigration"],
    ),
    (
        "slat.v1.HostService",
        Right::Look,
        &["GetHost", "ListHosts", "ListLeftovers"],
    ),
    (
        "slat.v1.HostService",
        Right::Administer,
        &[
            "CordonHost",
            "UncordonHost",
            "DeleteHost",
            "AdoptLeftover",
            "DeleteLeftover",
            "FenceHost",
        ],
    ),
    (
        "slat.v1.FleetService",
        Right::Report,
        &["RegisterHost", "ReportHost"],
    ),
    ("slat.v1.TransferService", Right::Ask, &["GetTransfer"]),
    (
        "slat.v1.TransferService",
        Right::Transfer,
        &[
            "DescribeOutgoing",
            "PrepareIncoming",
            "StartOutgoing",
            "WatchTransfer",
            "CancelTransfer",
            "ResolveTransfer",
            "ReleaseTransfer",
        ],
    ),
    ("slat.v1.TransferService", Right::Local, &["AdoptTransfer"]),
    (
        "slat.v1.CopyService",
        Right::Local,
        &["TakeSnapshot", "BuildCopy"],
    ),
    ("grpc.health.v1.Health", Right::Anyone, &["Check", "Watch"]),
    (
        "grpc.reflection.v1.ServerReflection",
        Right::Anyone,
        &["ServerReflectionInfo"],
    ),
    (
        "grpc.reflection.v1alpha.ServerReflection",
        Right::Anyone,
        &["ServerReflectionInfo"],
    ),
];

/// What a method needs, by `service/method`; `None`: nobody may call it.
pub(in super::super) fn right(method: &str) -> Option<Right> {
    let (service, method) = method.split_once('/')?;
    TABLE
        .iter()
        .find(|(of, _, methods)| *of == service && methods.contains(&method))
        .map(|(_, right, _)| *right)
}

/// What a plain HTTP path needs.
pub(in super::super) fn right_of_path(path: &str) -> Right {
    match path {
        "/healthz" | "/readyz" | "/livez" => Right::Anyone,
        _ => Right::Look,
    }
}

/// Whether `role` may call `method` (as `slat.v1.VmService/GetVm`).
#[must_use]
pub fn role_may(role: Role, method: &str) -> bool {
    right(method).is_some_and(|right| right.allows(role))
}

/// The table as `docs/access.md` has it.
#[must_use]
pub fn access_table() -> String {
    let mut text = String::from("| method |");
    for role in Role::ALL {
        let _ = write!(text, " {role} |");
    }
    text.push_str("\n|---|");
    text.push_str(&"---|".repeat(Role::ALL.len()));
    text.push('\n');
    let mut rows: Vec<(String, Right)> = Vec::new();
    for (service, right, methods) in TABLE {
        for method in *methods {
            let service = service.strip_prefix("slat.v1.").unwrap_or(service);
            rows.push((format!("{service}/{method}"), *right));
        }
    }
    for path in ["/healthz", "/readyz", "/livez", "/metrics", "/"] {
        rows.push((format!("HTTP {path}"), right_of_path(path)));
    }
    for (method, right) in rows {
        let _ = write!(text, "| `{method}` |");
        for role in Role::ALL {
            text.push_str(if right.allows(role) { " yes |" } else { " |" });
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use prost_reflect::DescriptorPool;

    use super::{super::super::methods::DESCRIPTORS, *};

    #[test]
    fn every_method_has_one_row_and_every_row_a_method() {
        let mut methods = BTreeSet::new();
        for set in DESCRIPTORS {
            let pool = DescriptorPool::decode(set).unwrap();
            for service in pool.services() {
                for method in service.methods() {
                    methods.insert(format!("{}/{}", service.full_name(), method.name()));
                }
            }
        }
        let mut rows = BTreeSet::new();
        for (service, _, of) in TABLE {
            for method in *of {
                let row = format!("{service}/{method}");
                assert!(rows.insert(row.clone()), "{row} has two rows");
            }
        }
        let missing: Vec<_> = methods.difference(&rows).collect();
        assert!(
            missing.is_empty(),
            "nobody may call, for want of a row: {missing:?}"
        );
        let gone: Vec<_> = rows.difference(&methods).collect();
        assert!(gone.is_empty(), "rows without a method: {gone:?}");
    }

    #[test]
    fn a_method_that_is_not_in_the_table_is_nobodys() {
        for role in Role::ALL {
            assert!(!role_may(role, "slat.v1.VmService/StealVm"), "{role}");
        }
    }

    /// `SLAT_UPDATE_DOCS=1` writes the page anew.
    #[test]
    fn the_docs_have_this_table() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/access.md");
        let text = std::fs::read_to_string(&page).unwrap();
        let begin = "<!-- begin: made of proto/src/transport/access/table.rs -->\n";
        let (head, rest) = text
            .split_once(begin)
            .expect("the page has a place for the table");
        let (found, tail) = rest
            .split_once("<!-- end -->")
            .expect("the table's place ends");
        let table = access_table();
        if std::env::var_os("SLAT_UPDATE_DOCS").is_some() {
            std::fs::write(&page, format!("{head}{begin}{table}<!-- end -->{tail}")).unwrap();
            return;
        }
        assert_eq!(
            found, table,
            "SLAT_UPDATE_DOCS=1 cargo test -p slat-proto the_docs writes it"
        );
    }
}
