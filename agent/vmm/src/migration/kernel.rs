//! TLS by the kernel (kTLS): after a handshake the socket gets the keys, and what is written to it
//! leaves encrypted, straight from guest memory.
//!
//! # Keys
//! A key of AES-GCM protects a bounded number of records, and the kernel counts none of them: a
//! stream that has sent [`MOST_RECORDS`] ends with an error, and one that could come near that is
//! never given to the kernel ([`MOST_BYTES`]). rustls changes the key instead.

use std::{io, net::TcpStream, os::fd::AsRawFd as _};

use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

use super::tls::RECORD;

/// Records that one key may protect here: half of what is safe.
const MOST_RECORDS: u64 = 1 << 23;
/// Memory a stream for which the kernel is asked to encrypt: half of what so many records carry,
/// for pages are sent more than once.
pub(super) const MOST_BYTES: u64 = 64 << 30;

// linux/tls.h
const SOL_TLS: libc::c_int = 282;
const TCP_ULP: libc::c_int = 31;
const TLS_TX: libc::c_int = 1;
const TLS_RX: libc::c_int = 2;
const TLS_1_3: u16 = 0x0304;
const AES_GCM_128: u16 = 51;
const AES_GCM_256: u16 = 52;
/// The longest of the structures: version and cipher, nonce, key, salt, sequence number.
const LONGEST: usize = 2 + 2 + 8 + 32 + 4 + 8;

/// Puts the kernel's TLS on a connected socket. Until it has keys the socket is as before.
///
/// # Errors
/// When the kernel has none.
pub(super) fn attach(socket: &TcpStream) -> io::Result<()> {
    set(socket, libc::IPPROTO_TCP, TCP_ULP, b"tls")
}

/// Gives the keys of both directions to the kernel.
///
/// # Errors
/// When it does not take them, or not for this cipher; the connection is then of no use.
pub(super) fn give(socket: &TcpStream, secrets: &ExtractedSecrets) -> io::Result<()> {
    for (direction, (sequence, keys)) in [(TLS_TX, &secrets.tx), (TLS_RX, &secrets.rx)] {
        let info = CryptoInfo::new(*sequence, keys).ok_or(io::ErrorKind::Unsupported)?;
        set(socket, SOL_TLS, direction, info.bytes())?;
    }
    Ok(())
}

fn set(
    socket: &TcpStream,
    level: libc::c_int,
    option: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes at `value` and keeps no pointer to them.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            length,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `struct tls12_crypto_info_aes_gcm_128` or `_256`, as bytes, which are wiped at its end.
struct CryptoInfo {
    bytes: zeroize::Zeroizing<[u8; LONGEST]>,
    length: usize,
}

impl CryptoInfo {
    /// `None`: not a cipher that the kernel is given.
    fn new(sequence: u64, keys: &ConnectionTrafficSecrets) -> Option<Self> {
        let (cipher, key, iv) = match keys {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (AES_GCM_128, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (AES_GCM_256, key, iv),
            _ => return None,
        };
        let (salt, nonce) = iv.as_ref().split_at_checked(4)?;
        let mut info = Self {
            bytes: zeroize::Zeroizing::new([0; LONGEST]),
            length: 0,
        };
        info.put(&TLS_1_3.to_ne_bytes());
        info.put(&cipher.to_ne_bytes());
        info.put(nonce);
        info.put(key.as_ref());
        info.put(salt);
        info.put(&sequence.to_be_bytes());
        Some(info)
    }

    fn put(&mut self, part: &[u8]) {
        let end = self.length + part.len();
        self.bytes[self.length..end].copy_from_slice(part);
        self.length = end;
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Counts what a key that the kernel has protects.
#[derive(Debug, Default)]
pub(super) struct Records(u64);

impl Records {
    /// A write of `bytes` by one call.
    ///
    /// # Errors
    /// When the key may protect no more.
    pub(super) fn count(&mut self, bytes: usize) -> io::Result<()> {
        // The last one is short, and so may be the one that a full socket buffer cut.
        self.0 += (bytes / RECORD) as u64 + 2;
        if self.0 > MOST_RECORDS {
            return Err(io::Error::other(format!(
                "the stream's key has protected {MOST_RECORDS} records and may protect no more; migrate with more streams"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustls::crypto::cipher::{AeadKey, Iv};

    use super::*;

    fn secrets() -> ExtractedSecrets {
        let keys = || ConnectionTrafficSecrets::Aes256Gcm {
            key: AeadKey::from([7; 32]),
            iv: Iv::from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        };
        ExtractedSecrets {
            tx: (3, keys()),
            rx: (0, keys()),
        }
    }

    #[test]
    fn keys_have_the_kernels_layout() {
        let secrets = secrets();
        let info = CryptoInfo::new(secrets.tx.0, &secrets.tx.1).unwrap();
        let mut expected = Vec::new();
        expected.extend_from_slice(&0x0304_u16.to_ne_bytes());
        expected.extend_from_slice(&52_u16.to_ne_bytes());
        expected.extend_from_slice(&[5, 6, 7, 8, 9, 10, 11, 12]);
        expected.extend_from_slice(&[7; 32]);
        expected.extend_from_slice(&[1, 2, 3, 4]);
        expected.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(info.bytes(), expected);
        assert_eq!(
            expected.len(),
            size_of::<libc::tls12_crypto_info_aes_gcm_256>()
        );
        let chacha = ConnectionTrafficSecrets::Chacha20Poly1305 {
            key: AeadKey::from([7; 32]),
            iv: Iv::from([0; 12]),
        };
        assert!(CryptoInfo::new(0, &chacha).is_none());
    }

    #[test]
    fn a_key_protects_no_more_than_it_may() {
        let mut records = Records(MOST_RECORDS - 3);
        records.count(RECORD).unwrap();
        let over = records.count(1).unwrap_err().to_string();
        assert!(over.contains("more streams"), "{over}");
    }

    #[test]
    fn the_kernel_takes_keys_where_it_has_tls() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_peer, _) = listener.accept().unwrap();
        if let Err(error) = attach(&socket) {
            println!("SKIPPED: the kernel has no TLS for sockets: {error}");
            return;
        }
        give(&socket, &secrets()).unwrap();
    }
}
