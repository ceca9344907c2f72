//! What came from outside (names on disk, messages of hosts, logs) is shown on terminals, and must
//! not command them: control characters and marks that turn the direction of writing are shown as
//! Rust writes them, `\u{1b}`.

use std::borrow::Cow;

/// `text` with nothing left that a terminal obeys; line ends stay.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && commands(c))
}

/// As [`lines`], on one line.
pub(crate) fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, commands)
}

fn commands(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &str, bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(&bad) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if bad(c) {
            clean.extend(c.escape_default());
        } else {
            clean.push(c);
        }
    }
    Cow::Owned(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        assert_eq!(one_line("ünï ok"), "ünï ok");
        assert_eq!(one_line("a\x1b[2Jb\r\n"), "a\\u{1b}[2Jb\\r\\n");
        assert_eq!(lines("a\nb\u{9b}c\u{202e}"), "a\nb\\u{9b}c\\u{202e}");
    }
}
