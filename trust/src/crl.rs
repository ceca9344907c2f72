//! Revocation lists, checked when they are read. A list that a CA did not sign would otherwise be
//! found out at the first handshake that asks it, and stop every one: it had better not come into
//! force.

use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, SignatureVerificationAlgorithm,
};
use webpki::{CertRevocationList, EndEntityCert, OwnedCertRevocationList};
use x509_parser::{prelude::FromDer, revocation_list::CertificateRevocationList, x509::X509Name};

use crate::identity::shown;

/// Reads lists. One that has the name of one of the `known` certificates has to be signed by one of
/// that name; a list of anybody else counts for nothing, and is kept. The error says why not.
pub(crate) fn read(
    lists: &[CertificateRevocationListDer<'_>],
    known: &[&CertificateDer<'_>],
    algorithms: &[&dyn SignatureVerificationAlgorithm],
) -> Result<Vec<CertRevocationList<'static>>, String> {
    lists
        .iter()
        .map(|der| {
            let list = OwnedCertRevocationList::from_der(der).map_err(|it| it.to_string())?;
            check(der, known, algorithms)?;
            Ok(list.into())
        })
        .collect()
}

fn check(
    der: &[u8],
    known: &[&CertificateDer<'_>],
    algorithms: &[&dyn SignatureVerificationAlgorithm],
) -> Result<(), String> {
    let (_, list) = CertificateRevocationList::from_der(der)
        .map_err(|_| "it is no X.509 revocation list".to_owned())?;
    let issuer: &X509Name<'_> = list.issuer();
    let (message, signature) = (list.tbs_cert_list.as_ref(), &list.signature_value.data);
    let mut is_known = false;
    for certificate in known {
        let Ok((_, facts)) = x509_parser::parse_x509_certificate(certificate) else {
            continue;
        };
        if facts.subject().as_raw() != issuer.as_raw() {
            continue;
        }
        is_known = true;
        let Ok(certificate) = EndEntityCert::try_from(*certificate) else {
            continue;
        };
        let is_good = algorithms.iter().any(|it| {
            certificate
                .verify_signature(*it, message, signature)
                .is_ok()
        });
        if is_good {
            return Ok(());
        }
    }
    if is_known {
        Err(format!(
            "it is not signed by {}",
            shown(&issuer.to_string())
        ))
    } else {
        Ok(())
    }
}
