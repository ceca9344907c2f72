//! Refusals as errors of the API: which of the five it was, whose certificate, and what to do.

use slat_trust::Refusal;

use crate::{ApiError, Reason, error::GRPC_CODE};

/// The reason that stands for a refusal, at the end that refuses.
pub(crate) fn reason(refusal: &Refusal) -> Reason {
    match refusal {
        Refusal::NoCertificate => Reason::CertificateRequired,
        Refusal::UnknownCa => Reason::CertificateUnknownCa,
        Refusal::Expired => Reason::CertificateExpired,
        Refusal::NotYetValid => Reason::CertificateNotYetValid,
        Refusal::Revoked => Reason::CertificateRevoked,
        Refusal::WrongIdentity { .. } => Reason::IdentityWrong,
        Refusal::NotTls => Reason::TlsRequired,
        Refusal::Version => Reason::TlsUnexpected,
        _ => Reason::CertificateBad,
    }
}

/// What the calling end of a connection to `address` is told. `by_peer`: the other end refused this
/// one's certificate; else this end refused the other's.
pub(crate) fn told(refusal: &Refusal, address: &str, by_peer: bool) -> ApiError {
    let (ours, theirs) = if by_peer {
        ("the certificate of this caller", "its")
    } else {
        ("the certificate shown there", "this end's")
    };
    let (reason, words, advice) = match refusal {
        Refusal::NoCertificate => (
            Reason::CertificateRequired,
            "it asks for a certificate and was shown none".to_owned(),
            "say with --tls-dir where a certificate is; slat pki issue makes one",
        ),
        Refusal::UnknownCa => (
            Reason::CertificateUnknownCa,
            format!("{ours} is by a CA that is not in {theirs} ca.crt"),
            "give both ends a ca.crt that has the CA of the other one",
        ),
        Refusal::Expired => (
            Reason::CertificateExpired,
            format!("{ours} has ended"),
            "renew it: slat pki renew; it counts without a restart",
        ),
        Refusal::NotYetValid => (
            Reason::CertificateNotYetValid,
            format!("{ours} does not begin yet"),
            "compare the clocks of both machines",
        ),
        Refusal::Revoked => (
            Reason::CertificateRevoked,
            format!("{ours} was revoked"),
            "issue another one if that was not meant: slat pki issue",
        ),
        Refusal::WrongIdentity { found, wanted } => {
            let error = ApiError::new(
                Reason::IdentityWrong,
                format!("{address} refuses: {ours} is another's: {found}, not {wanted}"),
            )
            .with("found", found)
            .with("wanted", wanted)
            .with(
                "advice",
                "see that the address is the right one, and that its certificate was issued for it",
            );
            return at(error, address);
        }
        Refusal::NotTls | Refusal::Version => (
            Reason::TlsUnexpected,
            "it does not speak TLS 1.3".to_owned(),
            "it was started without --tls-dir, or something else listens there",
        ),
        other => (
            Reason::CertificateBad,
            format!("{ours} cannot be used: {other}"),
            "issue another one: slat pki issue",
        ),
    };
    let verb = if by_peer { "refuses" } else { "is not taken" };
    at(
        ApiError::new(reason, format!("{address} {verb}: {words}")).with("advice", advice),
        address,
    )
}

/// An endpoint that speaks TLS was spoken to in the clear.
pub(crate) fn speaks_tls(address: &str) -> ApiError {
    at(
        ApiError::new(
            Reason::TlsRequired,
            format!("{address} speaks TLS alone, and was spoken to in the clear"),
        )
        .with(
            "advice",
            "say with --tls-dir where a certificate is; slat pki issue makes one",
        ),
        address,
    )
}

fn at(error: ApiError, address: &str) -> ApiError {
    let code = format!("{:?}", error.reason.code());
    error.with("address", address).with(GRPC_CODE, code)
}
