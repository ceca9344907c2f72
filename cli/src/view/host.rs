//! One host: its row in a table, its page.

use slat_proto::v1;

use super::words::{age, fields, id, short};
use crate::term::{
    table::{Cell, Table, Tone},
    units::Size,
};

/// Headings of [`host_row`].
pub(crate) const HOST_HEADS: [&str; 8] = [
    "NAME", "STATE", "ARCH", "BACKENDS", "VMS", "MEMORY", "ADDRESS", "SEEN",
];

/// One host in a table.
pub(crate) fn host_row(host: &v1::Host) -> Vec<Cell> {
    let state = short(host.state().as_str_name(), "STATE_");
    let tone = match host.state() {
        v1::host::State::Ready => Tone::Good,
        v1::host::State::Unreachable => Tone::Bad,
        v1::host::State::Unspecified => Tone::Plain,
    };
    let backends: Vec<String> = host
        .backends()
        .map(|backend| short(backend.as_str_name(), "BACKEND_").to_lowercase())
        .collect();
    let memory = format!(
        "{} of {}",
        Size(host.memory_used_bytes),
        Size(host.memory_bytes)
    );
    vec![
        id(&host.name).into(),
        Cell::toned(state, tone),
        host.arch.as_str().into(),
        backends.join(",").into(),
        host.vms.to_string().into(),
        memory.into(),
        host.address.as_str().into(),
        age(host.last_seen_time.as_ref()).into(),
    ]
}

/// One host's page.
pub(crate) fn host_page(host: &v1::Host, colours: bool) -> String {
    let table = Table::new(&HOST_HEADS, colours).render(&[host_row(host)]);
    let more = fields(&[
        ("version", host.version.clone()),
        ("incarnation", host.incarnation.clone()),
        ("backends", host.backend_message.clone()),
    ]);
    format!("{table}\n{more}").trim_end().to_owned()
}
