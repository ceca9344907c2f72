//! What an operator sees and types: units, tables, the two output streams, the live progress line.

pub(crate) mod out;
pub(crate) mod progress;
pub(crate) mod table;
pub(crate) mod units;
