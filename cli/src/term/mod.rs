//! The terminal: the two output streams, tables, and units as operators read and type them.

pub(crate) mod out;
pub(crate) mod table;
pub(crate) mod units;
