//! A fleet on one machine: its certificates ([`ca`]) and its daemons ([`child`]). `slat demo` and
//! `slat up` are made of it.

mod ca;
mod child;

pub(crate) use ca::LocalCa;
pub(crate) use child::Daemon;
