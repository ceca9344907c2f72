//! plotly.js out of the `plotly` crate, whose public function wraps it and MathJax in script
//! elements: the first element's text is the library. Cut out once, at the first request.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::OnceLock,
};

/// The library as it is served.
pub(super) struct Library {
    pub(super) source: String,
    pub(super) etag: String,
}

const OPEN: &str = "<script type=\"text/javascript\">";
const CLOSE: &str = "</script>";

/// The text of the first of two script elements. The text itself may hold a closing tag in a
/// string, so its end is the last one before the second element.
fn first_script(html: &str) -> Option<&str> {
    let body = html.strip_prefix(OPEN)?;
    let second = body.rfind(OPEN)?;
    let end = body[..second].rfind(CLOSE)?;
    Some(&body[..end])
}

/// `None` when the crate's function changed its form: the page then says that it has no charts.
pub(super) fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            let html = plotly::Plot::offline_js_sources();
            let source = first_script(html.trim_start())?.to_owned();
            let mut hasher = DefaultHasher::new();
            source.hash(&mut hasher);
            Some(Library {
                etag: format!("\"{:016x}\"", hasher.finish()),
                source,
            })
        })
        .as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_plotly_and_only_plotly() {
        let library = library().unwrap();
        assert!(
            library
                .source
                .trim_start()
                .starts_with("/**\n* plotly.js v")
        );
        assert!(!library.source.contains("MathJax.loader"));
        assert!(library.source.len() > 1 << 20);
        assert!(library.source.trim_end().ends_with([';', ')', '}']));
    }
}
