//! Migration halves.
