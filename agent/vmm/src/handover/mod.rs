//! What source and destination of a migration share about giving a VM away.
//!
//! `side` is one side as seen from outside its threads, with the gate that makes cancel and commit exclude each other;
//! `payload` is what the control frames around the switchover carry. Who owns the VM is decided by [`slat_record::journal`]
//! alone; the order of its entries is described there.

pub(crate) mod payload;
pub(crate) mod side;
