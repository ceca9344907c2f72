//! One host: its columns, its page.

use slat_proto::v1;

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
    if !host.state_message.is_empty() {
        remarks.push(host.state_message.clone());
    }
    if !host.contender.is_empty() {
        remarks.push(format!("its name is claimed by {} too", host.contender));
    }
    if host.leftovers > 0 {
        remarks.push(format!("{} leftovers: slat get leftovers", host.leftovers));
    }
    remarks
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
        let more = fields(&[
            ("note", remarks(self).join("; ")),
            ("version", self.version.clone()),
            ("uid", self.uid.clone()),
            ("incarnation", self.incarnation.clone()),
            ("backends", self.backend_message.clone()),
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
    fn a_cordon_a_rival_and_leftovers_are_seen_in_the_table() {
        let host = v1::Host {
            name: "hosts/a".into(),
            state: v1::host::State::Ready.into(),
            cordoned: true,
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
        assert!(note.contains("claimed by 10.0.0.9:7401 (h-2)"), "{note}");
        assert!(note.contains("2 leftovers"), "{note}");
    }
}
