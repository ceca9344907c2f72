//! What came from outside, made harmless for a terminal: names, messages and advice of endpoints
//! and guests may hold anything, and a terminal obeys control characters.
//!
//! Shown as `\u{1b}` instead: control characters (C0, DEL, C1), those that turn the direction of
//! text, and those that nobody sees. [`one_line`] is for a piece of text that goes into a line of
//! ours: line ends too, or a message could forge lines. [`lines`] is for a whole output, in which
//! our own line ends and colours stand; [`json`] for one that must stay JSON.

use std::borrow::Cow;

/// The escape sequences that our own output has.
const OURS: [&str; 4] = ["\x1b[0m", "\x1b[31m", "\x1b[32m", "\x1b[33m"];

/// Whether a terminal would do something else with it than show it.
fn is_active(letter: char) -> bool {
    letter.is_control()
        || matches!(letter,
            // Soft hyphen, Arabic letter mark, Mongolian vowel separator.
            '\u{ad}' | '\u{61c}' | '\u{180e}'
            // Zero width, marks of direction, ends of line and paragraph, embeddings, overrides.
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            // Word joiner, invisible operators, isolates, deprecated controls.
            | '\u{2060}'..='\u{206f}'
            // Byte order mark, interlinear annotations, tags.
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// A piece of text from outside, on one line.
pub(crate) fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(is_active) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        if is_active(letter) {
            shown.extend(letter.escape_unicode());
        } else {
            shown.push(letter);
        }
    }
    Cow::Owned(shown)
}

/// A whole output: our line ends and colours stay.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    if !text.contains(|letter| is_active(letter) && letter != '\n') {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        if let Some(ours) = OURS.iter().find(|ours| rest.starts_with(**ours)) {
            shown.push_str(ours);
            rest = &rest[ours.len()..];
            continue;
        }
        if is_active(letter) && letter != '\n' {
            shown.extend(letter.escape_unicode());
        } else {
            shown.push(letter);
        }
        rest = &rest[letter.len_utf8()..];
    }
    Cow::Owned(shown)
}

/// JSON text, which means the same afterwards: such characters stand in its strings only.
pub(crate) fn json(text: &str) -> Cow<'_, str> {
    let active = |letter| is_active(letter) && letter != '\n';
    if !text.contains(active) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        if active(letter) {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                shown.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            shown.push(letter);
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(one_line("a web \u{fc} \u{4e2d}"), "a web \u{fc} \u{4e2d}");
        assert_eq!(
            one_line("\x1b[2J\x1b]0;title\x07\r\n"),
            r"\u{1b}[2J\u{1b}]0;title\u{7}\u{d}\u{a}"
        );
        assert_eq!(one_line("\u{9b}31m"), r"\u{9b}31m");
        assert_eq!(
            one_line("a\u{202e}b\u{2066}c\u{200b}"),
            r"a\u{202e}b\u{2066}c\u{200b}"
        );
    }

    #[test]
    fn our_own_lines_and_colours_stay() {
        let ours = "NAME\n\x1b[32mok\x1b[0m";
        assert_eq!(lines(ours), ours);
        assert_eq!(
            lines("\x1b[32mok\x1b[0m\x1b[2J\t"),
            "\x1b[32mok\x1b[0m\\u{1b}[2J\\u{9}"
        );
    }

    #[test]
    fn json_means_the_same() {
        let value = serde_json::json!({"a\u{202e}": "b\u{9b}\u{e0041}\x1b"});
        let text = value.to_string();
        let shown = json(&text);
        assert!(!shown.contains(is_active), "{shown}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
            value
        );
    }

    proptest! {
        #[test]
        fn nothing_active_is_left(text in any::<String>()) {
            prop_assert!(!one_line(&text).contains(is_active));
            let lines = lines(&text).replace('\n', "");
            let without = OURS.iter().fold(lines, |text, ours| text.replace(ours, ""));
            prop_assert!(!without.contains(is_active));
        }
    }
}
