//! What every resource of the API says of itself, and how lists, single ones and streams of changes
//! of it are printed.

use std::collections::HashMap;

use serde_json::{Map, Value};
use slat_proto::json::to_json;

use super::{Column, Format, SortBy, answer, element};
use crate::{
    failure::Failure,
    term::{
        out,
        table::{Cell, Table},
    },
};

/// A message that is shown as a row of a table and as a page.
pub(crate) trait Resource: prost::Message + prost::Name + Default + 'static {
    /// What a list of it is called, in JSON too.
    const COLLECTION: &'static str;
    /// Its table.
    const COLUMNS: &'static [Column<Self>];

    /// Its full name, as `vms/web`.
    fn name(&self) -> String;

    /// What tells it from every other one; names may collide.
    fn key(&self) -> String;

    /// What is known of it, on a page.
    fn page(&self, colours: bool) -> String;
}

/// How a list is printed.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListStyle {
    /// Its format.
    pub(crate) format: Format,
    /// Order of its rows; as they came when `None`.
    pub(crate) sort_by: Option<SortBy>,
    /// Leave the headings away.
    pub(crate) no_headers: bool,
}

impl ListStyle {
    fn wide(&self) -> bool {
        self.format == Format::Wide
    }

    /// Refuses what no list of `T` can be, before anything is asked.
    pub(crate) fn check<T: Resource>(&self) -> Result<(), Failure> {
        let sorted = self.sort_by.as_ref().map(|by| by.order(T::COLUMNS));
        sorted.transpose().map(drop)
    }
}

/// Headings of `T`'s table.
pub(crate) fn heads<T: Resource>(wide: bool) -> Vec<&'static str> {
    columns::<T>(wide).map(|column| column.head).collect()
}

/// One row of it.
pub(crate) fn cells<T: Resource>(item: &T, wide: bool) -> Vec<Cell> {
    columns::<T>(wide)
        .map(|column| (column.cell)(item))
        .collect()
}

fn columns<T: Resource>(wide: bool) -> impl Iterator<Item = &'static Column<T>> {
    T::COLUMNS.iter().filter(move |column| wide || !column.wide)
}

/// Prints a list. `beside` stands beside it in JSON: what an answer says of the list itself.
pub(crate) fn list<T: Resource>(
    style: &ListStyle,
    mut items: Vec<T>,
    beside: &[(&str, &[String])],
) -> Result<(), Failure> {
    if let Some(by) = &style.sort_by {
        let order = by.order(T::COLUMNS)?;
        items.sort_by(order);
    }
    match style.format {
        Format::Json | Format::Yaml => {
            let mut document = Map::new();
            let values = items.iter().map(to_json).collect();
            document.insert(T::COLLECTION.to_owned(), Value::Array(values));
            for (key, names) in beside {
                document.insert((*key).to_owned(), Value::from(names.to_vec()));
            }
            answer(style.format, || document.into(), "", String::new)
        }
        Format::Name => items.iter().try_for_each(|item| out::line(item.name())),
        Format::Table | Format::Wide if items.is_empty() => {
            out::say(format!("no {}", T::COLLECTION));
            Ok(())
        }
        Format::Table | Format::Wide => {
            let wide = style.wide();
            let rows: Vec<Vec<Cell>> = items.iter().map(|item| cells(item, wide)).collect();
            let mut table = Table::new(&heads::<T>(wide), out::stdout_colours());
            out::line(if style.no_headers {
                table.bare(&rows)
            } else {
                table.render(&rows)
            })
        }
    }
}

/// Prints a single one.
pub(crate) fn one<T: Resource>(format: Format, item: &T) -> Result<(), Failure> {
    answer(
        format,
        || to_json(item),
        &item.name(),
        || item.page(out::stdout_colours()),
    )
}

/// Prints what changes, as it changes.
#[derive(Debug)]
pub(crate) struct Changes {
    style: ListStyle,
    table: Option<Table>,
    seen: HashMap<String, (String, Vec<Cell>)>,
}

impl Changes {
    /// Nothing seen yet.
    pub(crate) fn new(style: ListStyle) -> Self {
        Self {
            style,
            table: None,
            seen: HashMap::new(),
        }
    }

    /// Prints those of `items` that are new or have changed.
    pub(crate) fn show<T: Resource>(&mut self, items: &[T]) -> Result<(), Failure> {
        let changed: Vec<&T> = items.iter().filter(|item| self.is_news(*item)).collect();
        match self.style.format {
            Format::Json | Format::Yaml => changed
                .iter()
                .try_for_each(|item| element(self.style.format, &to_json(*item))),
            Format::Name => changed.iter().try_for_each(|item| out::line(item.name())),
            Format::Table | Format::Wide if changed.is_empty() => Ok(()),
            Format::Table | Format::Wide => {
                let wide = self.style.wide();
                let rows: Vec<Vec<Cell>> = changed.iter().map(|item| cells(*item, wide)).collect();
                match &mut self.table {
                    Some(table) => rows.iter().try_for_each(|row| out::line(table.row(row))),
                    None => {
                        let heads = heads::<T>(wide);
                        let table = self.table.insert(Table::new(&heads, out::stdout_colours()));
                        out::line(if self.style.no_headers {
                            table.bare(&rows)
                        } else {
                            table.render(&rows)
                        })
                    }
                }
            }
        }
    }

    /// As [`Changes::show`], where `items` are all there are: those that went away are returned, by
    /// name, once.
    pub(crate) fn show_all<T: Resource>(&mut self, items: &[T]) -> Result<Vec<String>, Failure> {
        self.show(items)?;
        let here: std::collections::HashSet<String> = items.iter().map(Resource::key).collect();
        let mut gone = Vec::new();
        self.seen.retain(|key, (name, _)| {
            let stays = here.contains(key);
            if !stays {
                gone.push(name.clone());
            }
            stays
        });
        gone.sort();
        Ok(gone)
    }

    /// Whether anything was printed.
    pub(crate) fn has_seen_any(&self) -> bool {
        !self.seen.is_empty()
    }

    /// Whether `item` is new, or has changed by more than what changes by itself.
    pub(crate) fn is_news<T: Resource>(&mut self, item: &T) -> bool {
        // Programs get all of it; people what they can see to have changed.
        let wide = self.style.format != Format::Table;
        let row: Vec<Cell> = columns::<T>(wide)
            .filter(|column| !column.drifts)
            .map(|column| (column.cell)(item))
            .collect();
        let now = (item.name(), row);
        let before = self.seen.get(&item.key());
        if before == Some(&now) {
            return false;
        }
        self.seen.insert(item.key(), now);
        true
    }
}
