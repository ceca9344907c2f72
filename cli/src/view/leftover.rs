//! What lies on a host and is no VM: its columns, its page, and what an order about it gives up.

use slat_proto::v1;

use super::words::{count, fields, id, short, size_cell};
use crate::{
    output::{Column, Resource, cells, heads},
    term::{
        table::{Cell, Table, Tone},
        units::Size,
    },
};

fn kind(leftover: &v1::Leftover) -> &'static str {
    short(leftover.kind().as_str_name(), "KIND_")
}

/// What can be done with it, and whether that gives something up.
fn orders(leftover: &v1::Leftover) -> Cell {
    let order = |word: &str, gives_up: &str| {
        if gives_up.is_empty() {
            word.to_owned()
        } else {
            format!("{word} --give-up")
        }
    };
    let mut orders = Vec::new();
    if leftover.adoptable {
        orders.push(order("adopt", &leftover.adopt_gives_up));
    }
    orders.push(order("delete", &leftover.delete_gives_up));
    orders.join(", ").into()
}

impl Resource for v1::Leftover {
    const COLLECTION: &'static str = "leftovers";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("UID", |one| one.uid.as_str().into()),
        Column::new("HOST", |one| id(&one.host).into()),
        Column::new("VM", |one| id(&one.vm).into()),
        Column::new("KIND", |one| Cell::toned(kind(one), Tone::Warn)),
        Column::new("MIGRATION", |one| id(&one.migration).into()),
        Column::new("EPOCH", |one| count(one.epoch)),
        Column::wide("PID", |one| count(one.pid)),
        Column::new("MEMORY", |one| size_cell(one.memory_bytes)),
        Column::new("ORDERS", orders),
        Column::wide("WHAT", |one| one.message.as_str().into()),
    ];

    fn name(&self) -> String {
        format!("{}/leftovers/{}", self.host, self.uid)
    }

    fn key(&self) -> String {
        self.name()
    }

    fn page(&self, colours: bool) -> String {
        let table = Table::new(&heads::<Self>(false), colours).render(&[cells(self, false)]);
        let more = fields(&[
            ("what", self.message.clone()),
            ("adopting gives up", self.adopt_gives_up.clone()),
            ("deleting gives up", self.delete_gives_up.clone()),
        ]);
        format!("{table}\n{more}").trim_end().to_owned()
    }
}

/// What it is, in a sentence for the beginning of an order.
pub(crate) fn leftover_words(leftover: &v1::Leftover) -> String {
    let vm = match leftover.vm.as_str() {
        "" => "a VM that is not known".to_owned(),
        vm => vm.to_owned(),
    };
    let process = match leftover.pid {
        0 => String::new(),
        pid => format!(", process {pid}"),
    };
    let message = match leftover.message.as_str() {
        "" => String::new(),
        message => format!(": {message}"),
    };
    format!(
        "{} of {vm} on {}, epoch {}, {}{process}{message}",
        kind(leftover),
        id(&leftover.host),
        leftover.epoch,
        Size(leftover.memory_bytes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_say_when_they_give_something_up() {
        let one = v1::Leftover {
            host: "hosts/a".into(),
            uid: "u-1".into(),
            vm: "vms/web".into(),
            kind: v1::leftover::Kind::RelinquishedSource.into(),
            adoptable: true,
            adopt_gives_up: "what ran elsewhere".into(),
            memory_bytes: 8 << 20,
            ..Default::default()
        };
        assert_eq!(orders(&one).text(), "adopt --give-up, delete");
        let page = one.page(false);
        assert!(
            page.contains("adopting gives up  what ran elsewhere"),
            "{page}"
        );
        assert!(page.contains("RELINQUISHED_SOURCE"), "{page}");
        assert_eq!(
            leftover_words(&one),
            "RELINQUISHED_SOURCE of vms/web on a, epoch 0, 8 MiB"
        );
    }
}
