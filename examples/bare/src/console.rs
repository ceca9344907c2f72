//! Lines of text: `say!` formats, [`platform::print`](crate::platform::print) shows.

use core::fmt;

/// The console as a formatter's target.
#[derive(Debug)]
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        crate::platform::print(text);
        Ok(())
    }
}

/// Prints a line.
macro_rules! say {
    ($($text:tt)*) => {{
        use core::fmt::Write as _;
        // The console does not fail.
        let _ = writeln!($crate::console::Console, $($text)*);
    }};
}

pub(crate) use say;
