//! Tables as operators know them from kubectl: a heading in capitals, two spaces between columns,
//! no lines drawn.
//!
//! Widths only grow, so that rows printed later by a watch stand under the first ones. Colour is
//! added after the padding and never counts as width.

use std::{borrow::Cow, cmp::Ordering};

use crate::escape;

/// Colour of a cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As it is.
    #[default]
    Plain,
    /// Well.
    Good,
    /// Worth a look.
    Warn,
    /// Broken.
    Bad,
}

/// What a cell shows when there is nothing to show.
pub(crate) const NONE: &str = "-";

/// One cell: what it shows, and what it is sorted by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
    number: Option<u128>,
}

impl Cell {
    /// With a colour.
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        let mut text = text.into();
        if text.is_empty() {
            NONE.clone_into(&mut text);
        }
        Self {
            text: match escape::one_line(&text) {
                Cow::Borrowed(_) => text,
                Cow::Owned(clean) => clean,
            },
            tone,
            number: None,
        }
    }

    /// A figure, sorted by its value and not by how it is written.
    pub(crate) fn number(value: impl Into<u128>, text: impl Into<String>) -> Self {
        Self {
            number: Some(value.into()),
            ..Self::from(text)
        }
    }

    /// Nothing to show.
    pub(crate) fn none() -> Self {
        Self::from(NONE)
    }

    /// The same with a colour.
    pub(crate) fn tone(self, tone: Tone) -> Self {
        Self { tone, ..self }
    }

    /// What it shows.
    #[cfg(test)]
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Order among cells of one column; cells that show nothing come last, whatever the direction.
    pub(crate) fn order(&self, other: &Self, descending: bool) -> Ordering {
        let nothing = |cell: &Self| cell.number.is_none() && cell.text == NONE;
        let order = match (self.number, other.number) {
            _ if nothing(self) || nothing(other) => {
                return nothing(self).cmp(&nothing(other));
            }
            (Some(one), Some(other)) => one.cmp(&other),
            _ => self.text.cmp(&other.text),
        };
        if descending { order.reverse() } else { order }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

/// Column headings and the widths seen so far.
#[derive(Debug)]
pub(crate) struct Table {
    heads: Vec<&'static str>,
    widths: Vec<usize>,
    colours: bool,
}

impl Table {
    /// With these headings.
    pub(crate) fn new(heads: &[&'static str], colours: bool) -> Self {
        Self {
            heads: heads.to_vec(),
            widths: heads.iter().map(|head| head.len()).collect(),
            colours,
        }
    }

    /// The heading and `rows`, without a last line end.
    pub(crate) fn render(&mut self, rows: &[Vec<Cell>]) -> String {
        self.widen(rows);
        let heads: Vec<Cell> = self.heads.iter().map(|head| Cell::from(*head)).collect();
        self.lines(std::iter::once(&heads).chain(rows))
    }

    /// `rows` without the heading, and no wider than they need.
    pub(crate) fn bare(&mut self, rows: &[Vec<Cell>]) -> String {
        self.widths.fill(0);
        self.widen(rows);
        self.lines(rows)
    }

    fn lines<'a>(&self, rows: impl IntoIterator<Item = &'a Vec<Cell>>) -> String {
        let rows = rows.into_iter().map(|row| self.draw(row));
        rows.collect::<Vec<_>>().join("\n")
    }

    /// One further row under what was rendered before.
    pub(crate) fn row(&mut self, row: &[Cell]) -> String {
        self.widen(std::slice::from_ref(&row.to_vec()));
        self.draw(row)
    }

    fn widen(&mut self, rows: &[Vec<Cell>]) {
        for row in rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
    }

    fn draw(&self, row: &[Cell]) -> String {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&self.widths).enumerate() {
            if column > 0 {
                line.push_str("  ");
            }
            let code = match cell.tone {
                _ if !self.colours => None,
                Tone::Plain => None,
                Tone::Good => Some("32"),
                Tone::Warn => Some("33"),
                Tone::Bad => Some("31"),
            };
            match code {
                Some(code) => line.push_str(&format!("\x1b[{code}m{}\x1b[0m", cell.text)),
                None => line.push_str(&cell.text),
            }
            let pad = width.saturating_sub(cell.text.chars().count());
            line.extend(std::iter::repeat_n(' ', pad));
        }
        line.truncate(line.trim_end().len());
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_their_heads() {
        let mut table = Table::new(&["NAME", "STATE"], false);
        let text = table.render(&[
            vec!["a-long-name".into(), Cell::toned("RUNNING", Tone::Good)],
            vec!["b".into(), "LOST".into()],
        ]);
        assert_eq!(
            text,
            "NAME         STATE\na-long-name  RUNNING\nb            LOST"
        );
        assert_eq!(table.row(&["c".into(), "X".into()]), "c            X");
    }

    #[test]
    fn figures_sort_by_value_and_nothing_comes_last() {
        let mut cells = [
            Cell::none(),
            Cell::number(1u64 << 30, "1 GiB"),
            Cell::number(512u64 << 20, "512 MiB"),
        ];
        cells.sort_by(|a, b| a.order(b, false));
        let texts: Vec<&str> = cells.iter().map(Cell::text).collect();
        assert_eq!(texts, ["512 MiB", "1 GiB", "-"]);
        cells.sort_by(|a, b| a.order(b, true));
        let texts: Vec<&str> = cells.iter().map(Cell::text).collect();
        assert_eq!(texts, ["1 GiB", "512 MiB", "-"]);
    }

    #[test]
    fn a_cell_is_one_line_and_commands_no_terminal() {
        assert_eq!(Cell::from("").text(), NONE);
        assert_eq!(Cell::from("a\n\x1b[2J").text(), "a\\u{a}\\u{1b}[2J");
    }

    #[test]
    fn colour_does_not_count_as_width() {
        let mut table = Table::new(&["S", "T"], true);
        let text = table.render(&[vec![Cell::toned("ok", Tone::Good), "x".into()]]);
        assert_eq!(text, "S   T\n\x1b[32mok\x1b[0m  x");
    }
}
