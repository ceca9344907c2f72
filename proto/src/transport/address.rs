//! Addresses of endpoints.

use std::{fmt, path::PathBuf, str::FromStr};

use crate::ApiError;

/// Where an endpoint is: `ip:port`, `host:port` or `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = ApiError;

    fn from_str(text: &str) -> Result<Self, ApiError> {
        // No file and no host is called so, and who prints it or hands it on would be misled.
        if text.chars().any(char::is_control) {
            return Err(ApiError::bad_parameter(
                "address",
                format_args!("\"{}\" has a control character", text.escape_default()),
            ));
        }
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(ApiError::bad_parameter("address", "unix: needs a path"));
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let text = text
            .strip_prefix("http://")
            .unwrap_or(text)
            .trim_end_matches('/');
        let port = text.rsplit_once(':').and_then(|(host, port)| {
            (!host.is_empty())
                .then(|| port.parse::<u16>().ok())
                .flatten()
        });
        if port.is_none() || text.contains(['/', ' ', '?', '#', '@']) {
            return Err(ApiError::bad_parameter(
                "address",
                format_args!(
                    "\"{}\" is neither host:port nor unix:/path",
                    text.escape_default()
                ),
            ));
        }
        Ok(Self::Tcp(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_print() {
        for text in [
            "127.0.0.1:7400",
            "[::1]:7400",
            "server.example:7400",
            "unix:/run/slat/vm.sock",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!(
            "http://127.0.0.1:7400/"
                .parse::<Address>()
                .unwrap()
                .to_string(),
            "127.0.0.1:7400"
        );
        for text in [
            "",
            "localhost",
            ":80",
            "host:99999",
            "host:80/path",
            "unix:",
            "a b:80",
            "a\0b:80",
            "a\u{85}b:80",
            "unix:/a\0b",
            "unix:/a\nb",
            "unix:/a\u{7f}",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
