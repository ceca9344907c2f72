//! A table as a list of columns, each a heading and a function from the message to a cell.

use std::{cmp::Ordering, convert::Infallible, str::FromStr};

use crate::{failure::Failure, term::table::Cell};

/// One column of a table of `T`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column<T: 'static> {
    /// Heading; in lower case the name that `--sort-by` knows.
    pub(crate) head: &'static str,
    /// Shown by `-o wide` alone.
    pub(crate) wide: bool,
    /// Changes by itself, as an age does: no reason for a watch to print the row again.
    pub(crate) drifts: bool,
    /// What it shows.
    pub(crate) cell: fn(&T) -> Cell,
}

impl<T> Column<T> {
    /// Shown in every table.
    pub(crate) const fn new(head: &'static str, cell: fn(&T) -> Cell) -> Self {
        Self {
            head,
            wide: false,
            drifts: false,
            cell,
        }
    }

    /// Shown by `-o wide` alone.
    pub(crate) const fn wide(head: &'static str, cell: fn(&T) -> Cell) -> Self {
        Self {
            wide: true,
            ..Self::new(head, cell)
        }
    }

    /// Changes by itself.
    pub(crate) const fn drifting(head: &'static str, cell: fn(&T) -> Cell) -> Self {
        Self {
            drifts: true,
            ..Self::new(head, cell)
        }
    }

    /// Both.
    pub(crate) const fn wide_drifting(head: &'static str, cell: fn(&T) -> Cell) -> Self {
        Self {
            wide: true,
            ..Self::drifting(head, cell)
        }
    }
}

/// A column to sort by; `-` before it turns the order round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SortBy {
    field: String,
    descending: bool,
}

impl FromStr for SortBy {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let field = text.strip_prefix('-');
        Ok(Self {
            field: field.unwrap_or(text).to_ascii_lowercase(),
            descending: field.is_some(),
        })
    }
}

impl SortBy {
    /// The order among messages with these columns.
    ///
    /// # Errors
    /// A usage error with the names there are.
    pub(super) fn order<T>(
        &self,
        columns: &[Column<T>],
    ) -> Result<impl Fn(&T, &T) -> Ordering + use<T>, Failure> {
        let found = columns
            .iter()
            .find(|column| column.head.eq_ignore_ascii_case(&self.field));
        let Some(column) = found else {
            let names: Vec<String> = columns
                .iter()
                .map(|column| column.head.to_ascii_lowercase())
                .collect();
            return Err(Failure::Usage(format!(
                "--sort-by {} is none of {}",
                self.field,
                names.join(", ")
            )));
        };
        let (cell, descending) = (column.cell, self.descending);
        Ok(move |one: &T, other: &T| cell(one).order(&cell(other), descending))
    }
}
