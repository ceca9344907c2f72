//! Revocation lists, checked when they are read, and asked along the path that a chain was verified
//! by.
//!
//! A list counts for the certificates of the key that signed it. A name says too little: a CA that
//! got a new key has the lists of two keys under one name. Of several lists of one key and one
//! scope (its issuing distribution point) the newest counts. webpki would ask the first list of a
//! name and no other, so it is given none.
//!
//! A list that has the name of a known CA and that none of that name signed is refused when it is
//! read: what it revokes would be let in unnoticed. Those of CAs that are not known, as of an
//! intermediate that only peers show, are kept, and compared with the key of that CA when it comes.

use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, SignatureVerificationAlgorithm,
};
use webpki::{Cert, CertRevocationList, EndEntityCert, OwnedCertRevocationList, VerifiedPath};
use x509_parser::{prelude::FromDer, revocation_list::CertificateRevocationList};

use crate::identity::shown;

/// Whose a list is.
#[derive(Debug)]
enum By {
    /// Of this key (SubjectPublicKeyInfo), which has signed it.
    Key(Vec<u8>),
    /// Of nobody who is known; what was signed, and the signature.
    Unknown {
        message: Vec<u8>,
        signature: Vec<u8>,
    },
}

#[derive(Debug)]
struct List {
    list: CertRevocationList<'static>,
    by: By,
    /// When it was made; its number's length and digits. What is larger is newer.
    age: (i64, usize, Vec<u8>),
}

/// Every list, the newest first.
#[derive(Debug, Default)]
pub(crate) struct Lists(Vec<List>);

/// Algorithms that signatures are verified by.
pub(crate) type Algorithms<'a> = &'a [&'a dyn SignatureVerificationAlgorithm];

impl Lists {
    /// Reads lists; `known` are the certificates that may have signed them. The error says why not.
    pub(crate) fn read(
        lists: &[CertificateRevocationListDer<'_>],
        known: &[&CertificateDer<'_>],
        algorithms: Algorithms<'_>,
    ) -> Result<Self, String> {
        let read = lists.iter().map(|der| List::read(der, known, algorithms));
        let mut lists = read.collect::<Result<Vec<_>, _>>()?;
        lists.sort_by(|a, b| b.age.cmp(&a.age));
        Ok(Self(lists))
    }

    /// Whether nothing is revoked on a path, whose root has the key `root`.
    pub(crate) fn check(
        &self,
        path: &VerifiedPath<'_>,
        root: &[u8],
        algorithms: Algorithms<'_>,
    ) -> Result<(), webpki::Error> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut certificate: &Cert<'_> = path.end_entity();
        for issuer in path.intermediate_certificates() {
            let key = issuer.subject_public_key_info();
            self.check_one(certificate, key.as_ref(), Some(issuer), algorithms)?;
            certificate = issuer;
        }
        self.check_one(certificate, root, None, algorithms)
    }

    fn check_one(
        &self,
        certificate: &Cert<'_>,
        key: &[u8],
        issuer: Option<&Cert<'_>>,
        algorithms: Algorithms<'_>,
    ) -> Result<(), webpki::Error> {
        let mut asked = Vec::new();
        for list in &self.0 {
            if list.list.issuer() != certificate.issuer() {
                continue;
            }
            let scope = list.list.issuing_distribution_point();
            if asked.contains(&scope) || !list.is_of(key, issuer, algorithms) {
                continue;
            }
            asked.push(scope);
            if list.list.find_serial(certificate.serial())?.is_some() {
                return Err(webpki::Error::CertRevoked);
            }
        }
        Ok(())
    }
}

impl List {
    fn read(
        der: &[u8],
        known: &[&CertificateDer<'_>],
        algorithms: Algorithms<'_>,
    ) -> Result<Self, String> {
        let list = OwnedCertRevocationList::from_der(der).map_err(|it| it.to_string())?;
        let (_, facts) = CertificateRevocationList::from_der(der)
            .map_err(|_| "it is no X.509 revocation list".to_owned())?;
        let number = facts.crl_number().map(|it| it.to_bytes_be());
        let number = number.unwrap_or_default();
        Ok(Self {
            list: list.into(),
            by: By::read(&facts, known, algorithms)?,
            age: (facts.last_update().timestamp(), number.len(), number),
        })
    }

    /// Whether the issuer that has this key signed it.
    fn is_of(&self, key: &[u8], issuer: Option<&Cert<'_>>, algorithms: Algorithms<'_>) -> bool {
        match (&self.by, issuer) {
            (By::Key(by), _) => by == key,
            (By::Unknown { message, signature }, Some(issuer)) => {
                has_signed(&issuer.der(), message, signature, algorithms)
            }
            // Roots are known.
            (By::Unknown { .. }, None) => false,
        }
    }
}

impl By {
    fn read(
        list: &CertificateRevocationList<'_>,
        known: &[&CertificateDer<'_>],
        algorithms: Algorithms<'_>,
    ) -> Result<Self, String> {
        let issuer = list.issuer();
        let (message, signature) = (list.tbs_cert_list.as_ref(), &*list.signature_value.data);
        let mut is_known = false;
        for certificate in known {
            let Ok((_, facts)) = x509_parser::parse_x509_certificate(certificate) else {
                continue;
            };
            if facts.subject().as_raw() != issuer.as_raw() {
                continue;
            }
            is_known = true;
            if has_signed(certificate, message, signature, algorithms) {
                return Ok(Self::Key(facts.public_key().raw.to_owned()));
            }
        }
        if is_known {
            return Err(format!(
                "it is not signed by {}",
                shown(&issuer.to_string())
            ));
        }
        Ok(Self::Unknown {
            message: message.to_owned(),
            signature: signature.to_owned(),
        })
    }
}

fn has_signed(
    certificate: &CertificateDer<'_>,
    message: &[u8],
    signature: &[u8],
    algorithms: Algorithms<'_>,
) -> bool {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else {
        return false;
    };
    algorithms.iter().any(|it| {
        certificate
            .verify_signature(*it, message, signature)
            .is_ok()
    })
}
