//! Damaged certificates, chains, lists and keys: refused by name, without a panic, whatever byte is
//! wrong.

mod common;

use std::{fs, sync::LazyLock};

use common::{Ca, Wanted, uri};
use proptest::prelude::*;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use slat_test_dir::TestDir;
use slat_trust::{Credentials, Expects};

const NAMES: [&str; 4] = ["ca.crt", "tls.crt", "tls.key", "crl.pem"];

/// What a directory of good files held, which is gone.
struct Good {
    files: [Vec<u8>; 4],
    credentials: Credentials,
    chain: Vec<CertificateDer<'static>>,
}

static GOOD: LazyLock<Good> = LazyLock::new(|| {
    let dir = TestDir::new();
    let ca = Ca::new("root");
    let middle = ca.intermediate("middle");
    let (certificate, key) = middle.issue(&Wanted::new(&uri("agent", "host-a")));
    common::write_set(dir.path(), &ca.pem, &(certificate + &middle.pem), &key);
    fs::write(
        dir.path().join("crl.pem"),
        ca.revoke(&[9]) + &middle.revoke(&[9]),
    )
    .expect("lists");
    let credentials = Credentials::load(dir.path()).expect("credentials");
    let pem = fs::read(dir.path().join("tls.crt")).expect("tls.crt");
    let chain = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .expect("PEM");
    Good {
        files: NAMES.map(|name| fs::read(dir.path().join(name)).expect("read")),
        credentials,
        chain,
    }
});

/// One byte of `bytes` is another.
fn damage(bytes: &[u8], at: prop::sample::Index, by: u8) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let at = at.index(bytes.len());
    bytes[at] ^= by;
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_byte_of_a_chain_can_be_another(
        nth in 0..2_usize,
        at: prop::sample::Index,
        by in 1..=255_u8,
    ) {
        let good = &*GOOD;
        let mut chain = good.chain.clone();
        chain[nth] = CertificateDer::from(damage(&chain[nth], at, by));
        prop_assert!(good.credentials.judge(&chain, &Expects::Anyone).is_err());
    }

    #[test]
    fn a_chain_that_is_cut_is_refused(nth in 0..2_usize, at: prop::sample::Index) {
        let good = &*GOOD;
        let mut chain = good.chain.clone();
        let length = at.index(chain[nth].len());
        chain[nth] = CertificateDer::from(chain[nth][..length].to_vec());
        prop_assert!(good.credentials.judge(&chain, &Expects::Anyone).is_err());
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let chain = [CertificateDer::from(bytes)];
        prop_assert!(GOOD.credentials.judge(&chain, &Expects::Anyone).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A damaged file may still be read, where the damage is beside what is read at first. Nobody
    /// becomes somebody else by that without being told so.
    #[test]
    fn a_damaged_file_makes_nobody_else(
        damaged in 0..NAMES.len(),
        at: prop::sample::Index,
        by in 1..=255_u8,
    ) {
        let good = &*GOOD;
        let dir = TestDir::new();
        for (nth, name) in NAMES.iter().enumerate() {
            let bytes = &good.files[nth];
            let path = dir.path().join(name);
            if nth == damaged {
                fs::write(&path, damage(bytes, at, by)).expect("written");
            } else {
                fs::write(&path, bytes).expect("written");
            }
            common::chmod(&path, 0o600);
        }
        if let Ok(credentials) = Credentials::load(dir.path()) {
            let is_same = credentials.identity() == good.credentials.identity();
            prop_assert!(is_same || credentials.trouble().is_some());
        }
    }
}

#[test]
fn the_good_chain_is_taken() {
    let good = &*GOOD;
    let judged = good.credentials.judge(&good.chain, &Expects::Anyone);
    assert_eq!(judged, Ok(good.credentials.identity()));
    assert_eq!(good.credentials.trouble(), None);
}
