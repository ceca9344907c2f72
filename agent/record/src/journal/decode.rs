//! The one decoder of journals, for the process that writes one and for everybody who reads it.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Entry, JournalError, JournalState};

/// The version that is written.
pub(super) const VERSION: u32 = 2;

/// A journal as its bytes have it.
#[derive(Debug)]
pub(super) struct Decoded {
    /// 1 when there is no header.
    pub(super) version: u32,
    pub(super) entries: Vec<Entry>,
    pub(super) state: Option<JournalState>,
    /// Bytes of the whole lines; what is beyond was cut off by a crash.
    pub(super) whole: usize,
    /// The last whole line lacks its newline: everything else of it arrived.
    pub(super) unterminated: bool,
}

/// The text of a line, header included, with its checksum and newline.
pub(super) fn line(json: &str) -> String {
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
}

/// The header's line.
pub(super) fn header() -> String {
    line(&format!(r#"{{"journal":"slat","version":{VERSION}}}"#))
}

/// Reads a journal's bytes. `path` is for messages only.
pub(super) fn decode(path: &Path, bytes: &[u8]) -> Result<Decoded, JournalError> {
    let mut decoded = Decoded {
        version: if bytes.is_empty() { VERSION } else { 1 },
        entries: Vec::new(),
        state: None,
        whole: 0,
        unterminated: false,
    };
    for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let last = decoded.whole + line.len() == bytes.len();
        let json = match checked(line) {
            Ok(json) => json,
            // The header itself may have been cut off: nothing was ever said.
            Err(_) if last => {
                if index == 0 {
                    decoded.version = VERSION;
                }
                break;
            }
            Err(message) => {
                return Err(JournalError::Corrupt {
                    path: path.to_owned(),
                    line: index + 1,
                    message,
                });
            }
        };
        decoded
            .take(path, index, json)
            .map_err(|error| match error {
                Refused::Unknown(message) => JournalError::Unknown {
                    path: path.to_owned(),
                    line: index + 1,
                    message,
                },
                Refused::Journal(error) => error,
            })?;
        decoded.whole += line.len();
        decoded.unterminated = !line.ends_with(b"\n");
    }
    Ok(decoded)
}

/// The JSON of a line whose checksum is right.
fn checked(line: &[u8]) -> Result<&str, String> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let (sum, json) = line
        .split_at_checked(9)
        .filter(|(sum, _)| sum[8] == b' ')
        .ok_or("no checksum")?;
    let sum = std::str::from_utf8(&sum[..8]).map_err(|error| error.to_string())?;
    let sum = u32::from_str_radix(sum, 16).map_err(|error| error.to_string())?;
    if sum != crc32fast::hash(json) {
        return Err("wrong checksum".to_owned());
    }
    std::str::from_utf8(json).map_err(|error| error.to_string())
}

enum Refused {
    Unknown(String),
    Journal(JournalError),
}

impl Decoded {
    fn take(&mut self, path: &Path, index: usize, json: &str) -> Result<(), Refused> {
        let unknown = |message: String| Refused::Unknown(message);
        let mut object: Map<String, Value> =
            serde_json::from_str(json).map_err(|error| unknown(error.to_string()))?;
        if index == 0 && object.contains_key("journal") {
            self.version = version(path, &object)?;
            return Ok(());
        }
        if self.version == 1 && !object.contains_key("uid") {
            // Version 1 named the VM in its first entry alone.
            if let Some(state) = &self.state {
                object.insert("uid".to_owned(), Value::String(state.uid.clone()));
            }
        }
        let entry: Entry = serde_json::from_value(Value::Object(object))
            .map_err(|error| unknown(error.to_string()))?;
        let next = JournalState::after(self.state.as_ref(), &entry).map_err(Refused::Journal)?;
        self.state = Some(next);
        self.entries.push(entry);
        Ok(())
    }
}

fn version(path: &Path, header: &Map<String, Value>) -> Result<u32, Refused> {
    let known = |key: &str| matches!(key, "journal" | "version");
    if let Some(key) = header.keys().find(|key| !known(key)) {
        return Err(Refused::Unknown(format!("header field {key:?}")));
    }
    if header.get("journal") != Some(&Value::from("slat")) {
        return Err(Refused::Unknown("not a journal of slat".to_owned()));
    }
    let found = header.get("version").and_then(Value::as_u64);
    match found.and_then(|found| u32::try_from(found).ok()) {
        Some(VERSION) => Ok(VERSION),
        Some(found) if found > VERSION => Err(Refused::Journal(JournalError::Version {
            path: path.to_owned(),
            found,
            known: VERSION,
        })),
        _ => Err(Refused::Unknown(format!("version {found:?}"))),
    }
}
