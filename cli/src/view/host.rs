//! One host: its columns, its page.

use std::time::SystemTime;

use slat_proto::{
    model::{Labels, system_time},
    v1,
};

use super::words::{age, count, fields, id, notes, short, signed_span};
use crate::{
    output::{Column, Resource, cells, heads},
    term::{
        table::{Cell, Table, Tone},
        units::Size,
    },
};

fn state(host: &v1::Host) -> Cell {
    let tone = match host.state() {
        v1::host::State::Ready => Tone::Good,
        v1::host::State::Unreachable => Tone::Bad,
        v1::host::State::Unspecified => Tone::Plain,
    };
    let word = short(host.state().as_str_name(), "STATE_");
    let cordon = if host.cordoned { ",CORDONED" } else { "" };
    Cell::toned(format!("{word}{cordon}"), tone)
}

fn backends(host: &v1::Host) -> Cell {
    let backends: Vec<String> = host
        .backends()
        .map(|backend| short(backend.as_str_name(), "BACKEND_").to_lowercase())
        .collect();
    backends.join(",").into()
}

fn memory(host: &v1::Host) -> Cell {
    let text = format!(
        "{} of {}",
        Size(host.memory_used_bytes),
        Size(host.memory_bytes)
    );
    Cell::number(host.memory_used_bytes, text)
}

/// What an operator must know beside the state.
fn remarks(host: &v1::Host) -> Vec<String> {
    let mut remarks = Vec::new();
    // It names another agent of this name, too.
    if !host.state_message.is_empty() {
        remarks.push(host.state_message.clone());
    }
    if let Some(trust) = host
        .trust
        .as_ref()
        .filter(|trust| !trust.message.is_empty())
    {
        remarks.push(trust.message.clone());
    }
    match host.leftovers {
        0 => {}
        1 => remarks.push("1 leftover: slat get leftovers".to_owned()),
        several => remarks.push(format!("{several} leftovers: slat get leftovers")),
    }
    remarks
}

/// How VM processes are confined; empty for agents that do not say.
fn confinement(host: &v1::Host) -> (String, String) {
    let Some(confinement) = &host.vm_confinement else {
        return Default::default();
    };
    let seccomp = short(confinement.seccomp().as_str_name(), "SECCOMP_").to_lowercase();
    let landlock = confinement
        .landlock
        .map_or_else(|| "none".to_owned(), |version| version.to_string());
    let dumps = if confinement.core_dumps {
        ", core dumps"
    } else {
        ""
    };
    let cgroup = match (
        confinement.cgroup.as_str(),
        confinement.cgroup_message.as_str(),
    ) {
        ("", why) => format!("the agent's ({why})"),
        (cgroup, "") => cgroup.to_owned(),
        (cgroup, lacks) => format!("{cgroup} ({lacks})"),
    };
    let processes = format!("seccomp {seccomp}, landlock {landlock}, no capabilities{dumps}");
    (processes, cgroup)
}

/// How its endpoint and its pages are protected, in a word; empty for agents that do not say.
fn protection(host: &v1::Host) -> Cell {
    let Some(trust) = &host.trust else {
        return "".into();
    };
    match (trust.tls, trust.pages_tls) {
        (true, true) if trust.message.is_empty() => Cell::toned("tls".to_owned(), Tone::Good),
        (true, true) => Cell::toned("tls!".to_owned(), Tone::Bad),
        (true, false) => Cell::toned("tls,PLAIN-PAGES".to_owned(), Tone::Bad),
        (false, true) => Cell::toned("PLAIN".to_owned(), Tone::Bad),
        (false, false) => Cell::toned("PLAIN,PLAIN-PAGES".to_owned(), Tone::Bad),
    }
}

/// The same at length.
fn protection_page(host: &v1::Host) -> String {
    let Some(trust) = &host.trust else {
        return String::new();
    };
    let endpoint = if trust.tls {
        let ends = trust.certificate_not_after.as_ref().and_then(system_time);
        let left = ends.and_then(|ends| ends.duration_since(SystemTime::now()).ok());
        let left = left.map_or_else(
            || "its certificate has ended".to_owned(),
            |left| format!("certificate for {} days more", left.as_secs() / 86_400),
        );
        format!("TLS as {}, {left}", trust.identity)
    } else {
        "PLAIN: whoever reaches its agent is in control".to_owned()
    };
    let pages = if trust.pages_tls {
        "pages by TLS"
    } else {
        "pages in the clear"
    };
    format!("{endpoint}; {pages}")
}

/// What it is called by.
fn labels(host: &v1::Host) -> String {
    let labels = host.labels.clone().into_iter().collect::<Labels>();
    labels.to_string()
}

/// The last fence of it, with its proof; empty when there was none.
fn fence(host: &v1::Host) -> String {
    let Some(fence) = &host.fence else {
        return String::new();
    };
    let took = fence.duration.as_ref().map_or(0.0, |took| {
        took.seconds as f64 + f64::from(took.nanos) / 1e9
    });
    let proof = match fence.proof.lines().next() {
        Some(line) if line.len() < fence.proof.len() => format!("{line} ..."),
        Some(line) => line.to_owned(),
        None => "none".to_owned(),
    };
    format!(
        "at {} by {}, {} in {took:.1} s, proof: {proof} ({})",
        fence.time.map_or_else(String::new, |time| time.to_string()),
        fence.ordered_by,
        fence.hook,
        fence.id
    )
}

/// Whether VMs can be watched there; empty when its agent does not say.
fn paging(host: &v1::Host) -> String {
    let Some(paging) = &host.paging else {
        return String::new();
    };
    match (paging.can_watch, paging.can_protect) {
        (true, true) => "VMs can be watched".to_owned(),
        (true, false) => format!(
            "VMs can be watched, without write-protection: {}",
            paging.message
        ),
        (false, _) => format!("VMs cannot be watched: {}", paging.message),
    }
}

/// The pages that it set aside: `2 MiB: 12 of 20 free; node 0: 2 MiB: ...`. Empty when its agent
/// does not say; pools of nodes are left out where there is one node.
fn huge_pages(host: &v1::Host) -> String {
    let Some(huge) = &host.huge_pages else {
        return String::new();
    };
    let nodes = huge.pools.iter().filter_map(|pool| pool.node);
    let several = nodes.clone().min() != nodes.max();
    let told: Vec<String> = huge
        .pools
        .iter()
        .filter(|pool| pool.node.is_none() || several)
        .map(|pool| {
            let node = pool
                .node
                .map_or_else(String::new, |node| format!("node {node}, "));
            format!(
                "{node}{}: {} of {} free",
                Size(pool.page_bytes),
                pool.free_pages,
                pool.total_pages
            )
        })
        .collect();
    if told.is_empty() {
        return "its kernel has none to set aside".to_owned();
    }
    told.join("; ")
}

impl Resource for v1::Host {
    const COLLECTION: &'static str = "hosts";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("NAME", |host| id(&host.name).into()),
        Column::new("STATE", state),
        Column::new("ARCH", |host| host.arch.as_str().into()),
        Column::new("BACKENDS", backends),
        Column::new("VMS", |host| count(host.vms)),
        Column::new("MEMORY", memory),
        Column::new("ADDRESS", |host| host.address.as_str().into()),
        Column::new("TLS", protection),
        Column::wide("LABELS", |host| labels(host).into()),
        Column::wide("PAGING", |host| {
            let paging = host.paging.as_ref();
            let word = paging.map(|paging| match (paging.can_watch, paging.can_protect) {
                (true, true) => "yes",
                (true, false) => "no protection",
                (false, _) => "no",
            });
            word.unwrap_or_default().into()
        }),
        Column::wide("VERSION", |host| host.version.as_str().into()),
        Column::wide("UID", |host| host.uid.as_str().into()),
        Column::wide_drifting("CLOCK", |host| {
            signed_span(host.clock_offset.as_ref()).into()
        }),
        Column::drifting("SEEN", |host| age(host.last_seen_time.as_ref())),
        Column::new("NOTE", |host| notes(remarks(host))),
    ];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn key(&self) -> String {
        self.name.clone()
    }

    fn page(&self, colours: bool) -> String {
        let table = Table::new(&heads::<Self>(false), colours).render(&[cells(self, false)]);
        let (processes, cgroup) = confinement(self);
        let more = fields(&[
            ("note", remarks(self).join("; ")),
            ("version", self.version.clone()),
            ("uid", self.uid.clone()),
            ("incarnation", self.incarnation.clone()),
            ("backends", self.backend_message.clone()),
            ("VM processes", processes),
            ("VM cgroups", cgroup),
            (
                "dirty rings",
                if self.dirty_rings { "yes" } else { "no" }.to_owned(),
            ),
            ("protection", protection_page(self)),
            ("labels", labels(self)),
            ("fence", fence(self)),
            ("paging", paging(self)),
            ("pages set aside", huge_pages(self)),
            (
                "cordoned",
                if self.cordoned {
                    "yes: slat uncordon host ends it".to_owned()
                } else {
                    String::new()
                },
            ),
            (
                "clock",
                self.clock_offset
                    .as_ref()
                    .map_or_else(String::new, |offset| {
                        format!("{} against the server's", signed_span(Some(offset)))
                    }),
            ),
        ]);
        format!("{table}\n{more}").trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_vm_processes_may_do_is_told_as_it_is() {
        use v1::vm_confinement::Seccomp;
        let mut host = v1::Host {
            name: "hosts/a".into(),
            ..Default::default()
        };
        assert!(!host.page(false).contains("VM processes"), "an older agent");
        host.vm_confinement = Some(v1::VmConfinement {
            seccomp: Seccomp::Refuse.into(),
            cgroup_message: "not delegated".into(),
            ..Default::default()
        });
        let page = host.page(false);
        assert!(
            page.contains("seccomp refuse, landlock none, no capabilities"),
            "{page}"
        );
        assert!(page.contains("the agent's (not delegated)"), "{page}");
        host.vm_confinement = Some(v1::VmConfinement {
            seccomp: Seccomp::Off.into(),
            landlock: Some(6),
            core_dumps: true,
            cgroup: "/sys/fs/cgroup/slat".into(),
            cgroup_message: String::new(),
        });
        let page = host.page(false);
        assert!(
            page.contains("seccomp off, landlock 6, no capabilities, core dumps"),
            "{page}"
        );
        assert!(page.contains("/sys/fs/cgroup/slat\n"), "{page}");
    }

    #[test]
    fn what_is_in_the_clear_is_seen_in_the_table_and_why_on_the_page() {
        let mut host = v1::Host {
            name: "hosts/a".into(),
            ..Default::default()
        };
        assert!(!host.page(false).contains("protection"), "an older agent");
        let mut told = |tls, pages_tls, message: &str| {
            host.trust = Some(v1::HostTrust {
                tls,
                pages_tls,
                identity: "spiffe://d/slat/agent/a".into(),
                message: message.into(),
                ..Default::default()
            });
            (protection(&host).text().to_owned(), host.page(false))
        };
        assert_eq!(told(true, true, "").0, "tls");
        assert_eq!(told(true, true, "its certificate ends in 5 h").0, "tls!");
        assert!(told(true, true, "ends in 5 h").1.contains("ends in 5 h"));
        let (word, page) = told(false, true, "");
        assert_eq!(word, "PLAIN");
        assert!(
            page.contains("whoever reaches its agent is in control"),
            "{page}"
        );
        assert_eq!(told(false, false, "").0, "PLAIN,PLAIN-PAGES");
        assert!(told(true, false, "").1.contains("pages in the clear"));
    }

    #[test]
    fn whether_vms_can_be_watched_is_told_with_the_reason() {
        let mut host = v1::Host {
            name: "hosts/a".into(),
            ..Default::default()
        };
        assert!(!host.page(false).contains("paging"), "an older agent");
        let mut page = |can_watch, can_protect, why: &str| {
            host.paging = Some(v1::HostPaging {
                can_watch,
                can_protect,
                message: why.into(),
            });
            host.page(false)
        };
        assert!(page(true, true, "").ends_with("VMs can be watched"));
        let some = page(true, false, "an old kernel");
        assert!(
            some.contains("without write-protection: an old kernel"),
            "{some}"
        );
        let none = page(false, false, "no /dev/userfaultfd");
        assert!(
            none.contains("cannot be watched: no /dev/userfaultfd"),
            "{none}"
        );
    }

    #[test]
    fn the_pages_set_aside_are_told_by_size_and_by_node_where_there_are_several() {
        let pool = |page_bytes, node, free_pages| v1::HugePagePool {
            page_bytes,
            node,
            total_pages: 20,
            free_pages,
        };
        let mut host = v1::Host {
            name: "hosts/a".into(),
            ..Default::default()
        };
        assert!(!host.page(false).contains("pages set aside"));
        host.huge_pages = Some(v1::HugePages::default());
        assert!(host.page(false).contains("its kernel has none"));
        let mut pools = vec![
            pool(2 << 20, None, 12),
            pool(1 << 30, None, 0),
            pool(2 << 20, Some(0), 5),
        ];
        host.huge_pages = Some(v1::HugePages {
            pools: pools.clone(),
        });
        let page = host.page(false);
        assert!(
            page.ends_with("2 MiB: 12 of 20 free; 1 GiB: 0 of 20 free"),
            "{page}"
        );
        pools.push(pool(2 << 20, Some(1), 7));
        host.huge_pages = Some(v1::HugePages { pools });
        let page = host.page(false);
        assert!(page.contains("node 1, 2 MiB: 7 of 20 free"), "{page}");
    }

    #[test]
    fn a_cordon_a_rival_and_leftovers_are_seen_in_the_table() {
        let host = v1::Host {
            name: "hosts/a".into(),
            state: v1::host::State::Ready.into(),
            cordoned: true,
            state_message: "another agent, 10.0.0.9:7401 (h-2), registers too".into(),
            contender: "10.0.0.9:7401 (h-2)".into(),
            leftovers: 2,
            ..Default::default()
        };
        let row: Vec<String> = cells(&host, false)
            .iter()
            .map(|cell| cell.text().to_owned())
            .collect();
        assert_eq!(row[1], "READY,CORDONED");
        let note = row.last().unwrap();
        assert_eq!(note.matches("10.0.0.9:7401 (h-2)").count(), 1, "{note}");
        assert!(note.contains("2 leftovers"), "{note}");
    }
}
