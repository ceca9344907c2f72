//! Tables as operators know them from kubectl: a heading in capitals, two spaces between columns,
//! no lines drawn.
//!
//! Widths only grow, so that rows printed later by a watch stand under the first ones. Colour is
//! added after the padding and never counts as width.

use crate::escape::one_line;

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

/// One cell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// With a colour. What a terminal would obey is escaped.
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self {
            text: one_line(&text.into()).into_owned(),
            tone,
        }
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
        std::iter::once(&heads)
            .chain(rows)
            .map(|row| self.draw(row))
            .collect::<Vec<_>>()
            .join("\n")
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
    fn a_name_from_outside_draws_nothing_and_keeps_its_row() {
        let mut table = Table::new(&["NAME"], false);
        let text = table.render(&[vec!["a\x1b[2J\nb".into()]]);
        assert_eq!(text, "NAME\na\\u{1b}[2J\\u{a}b");
    }

    #[test]
    fn colour_does_not_count_as_width() {
        let mut table = Table::new(&["S", "T"], true);
        let text = table.render(&[vec![Cell::toned("ok", Tone::Good), "x".into()]]);
        assert_eq!(text, "S   T\n\x1b[32mok\x1b[0m  x");
    }
}
