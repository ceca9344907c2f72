//! When a chain ends.

use std::time::SystemTime;

use rustls::pki_types::CertificateDer;

use crate::x509::Facts;

/// When the first certificate of a chain ends; `None` when there is none, or one cannot be read.
#[must_use]
pub fn ends(chain: &[CertificateDer<'_>]) -> Option<SystemTime> {
    let ends: Result<Vec<SystemTime>, String> = chain
        .iter()
        .map(|certificate| Ok(Facts::read(certificate)?.not_after))
        .collect();
    ends.ok()?.into_iter().min()
}
