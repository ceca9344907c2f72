//! How a migration's page streams are protected, in words.

use slat_proto::v1::{MigrationProgress, page_path::Protection};

/// As `TLS 1.3, AES_128_GCM, by the VMs' processes (the kernel has no TLS)`; empty before they are
/// open, and for agents that do not say.
pub(crate) fn page_path(progress: &MigrationProgress) -> String {
    let Some(path) = &progress.path else {
        return String::new();
    };
    let words = match path.protection() {
        Protection::Unspecified => return String::new(),
        Protection::None => "in the clear".to_owned(),
        Protection::Tls => format!("TLS 1.3, {}, by the VMs' processes", path.cipher),
        Protection::KernelTls => format!("TLS 1.3, {}, by the kernel", path.cipher),
    };
    if path.message.is_empty() {
        words
    } else {
        format!("{words} ({})", crate::escape::one_line(&path.message))
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::v1;

    use super::*;

    #[test]
    fn the_path_is_told_as_it_is() {
        let told = |protection: Protection, cipher: &str, message: &str| {
            page_path(&MigrationProgress {
                path: Some(v1::PagePath {
                    protection: protection.into(),
                    cipher: cipher.into(),
                    message: message.into(),
                }),
                ..Default::default()
            })
        };
        assert_eq!(page_path(&MigrationProgress::default()), "");
        assert_eq!(told(Protection::None, "", ""), "in the clear");
        assert_eq!(
            told(Protection::Tls, "AES_128_GCM", "the kernel has no TLS"),
            "TLS 1.3, AES_128_GCM, by the VMs' processes (the kernel has no TLS)"
        );
        assert_eq!(
            told(Protection::KernelTls, "AES_256_GCM", ""),
            "TLS 1.3, AES_256_GCM, by the kernel"
        );
    }
}
