//! Which save a command is about, and a save followed to its end.

use std::{fmt, str::FromStr};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, SaveName},
    v1::{self, save::State},
};
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::patience::Patience;
use crate::{client::Client, failure::Failure};

/// Most entries that one page may have.
const PAGE: i32 = 1000;

/// A save as it is typed: `hosts/host-a/saves/web-1`, or `web-1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SaveRef {
    /// With its host.
    Full(SaveName),
    /// The bare id.
    Id(String),
}

impl FromStr for SaveRef {
    type Err = ApiError;

    fn from_str(text: &str) -> Result<Self, ApiError> {
        if text.contains('/') {
            return SaveName::parse(text).map(Self::Full);
        }
        // Checked by the name that it would make.
        let any = HostName::from_id("any")?;
        SaveName::new(any, text)?;
        Ok(Self::Id(text.to_owned()))
    }
}

impl fmt::Display for SaveRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(name) => write!(f, "{name}"),
            Self::Id(id) => f.write_str(id),
        }
    }
}

/// One save on the command line.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SaveTarget {
    /// The save, as web-1 or hosts/host-a/saves/web-1
    #[arg(value_name = "SAVE")]
    pub(crate) save: SaveRef,
    /// Of several saves of that name the one on this host, as host-a
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<HostName>,
}

impl fmt::Display for SaveTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "save {}", self.save)?;
        match &self.host {
            Some(host) => write!(f, " on {}", host.id()),
            None => Ok(()),
        }
    }
}

impl SaveTarget {
    /// Its full name; hosts are asked when nothing says which it is on.
    ///
    /// # Errors
    /// NO_SUCH_SAVE; NAME_CONFLICT when several hosts have it.
    pub(crate) async fn resolve(&self, client: &Client) -> Result<SaveName, Failure> {
        let id = match (&self.save, &self.host) {
            (SaveRef::Full(name), None) => return Ok(name.clone()),
            (SaveRef::Full(name), Some(host)) if name.host() == host => return Ok(name.clone()),
            (SaveRef::Full(name), Some(host)) => {
                let words = format!("{name} is not on {host}: leave --host away");
                return Err(Failure::Usage(words));
            }
            (SaveRef::Id(id), Some(host)) => return Ok(SaveName::new(host.clone(), id)?),
            (SaveRef::Id(id), None) => id,
        };
        let doing = || format!("find {self}");
        let found = all(client, None).await;
        let (saves, unreachable) = found.map_err(|status| Failure::call(doing(), status))?;
        let names = saves.iter().map(|save| save.name.as_str());
        let names: Result<Vec<SaveName>, ApiError> = names.map(SaveName::parse).collect();
        let names: Vec<SaveName> = names?.into_iter().filter(|name| name.id() == id).collect();
        match names.as_slice() {
            [one] => Ok(one.clone()),
            [] => Err(Failure::api(doing(), none(id, &unreachable))),
            several => {
                let hosts: Vec<&str> = several.iter().map(|name| name.host().id()).collect();
                let hosts = hosts.join(",");
                let words = format!("{} hosts have a save {id}: {hosts}", several.len());
                let error = ApiError::new(Reason::NameConflict, words)
                    .with("save", id)
                    .with("hosts", hosts)
                    .with("advice", "say which one with --host HOST");
                Err(Failure::api(doing(), error))
            }
        }
    }
}

/// All saves, or those of one host; and hosts that do not answer.
pub(crate) async fn all(
    client: &Client,
    host: Option<&HostName>,
) -> Result<(Vec<v1::Save>, Vec<String>), Status> {
    let (mut saves, mut unreachable) = (Vec::new(), Vec::new());
    let mut request = v1::ListSavesRequest {
        parent: host.map(HostName::to_string).unwrap_or_default(),
        page_size: PAGE,
        ..Default::default()
    };
    loop {
        let answer = client.snapshots().list_saves(request.clone()).await?;
        let page = answer.into_inner();
        saves.extend(page.saves);
        for name in page.unreachable {
            if !unreachable.contains(&name) {
                unreachable.push(name);
            }
        }
        if page.next_page_token.is_empty() {
            return Ok((saves, unreachable));
        }
        request.page_token = page.next_page_token;
    }
}

/// No host that was heard has it.
fn none(id: &str, unreachable: &[String]) -> ApiError {
    let error = ApiError::new(Reason::NoSuchSave, format!("no save {id}")).with("save", id);
    if unreachable.is_empty() {
        return error;
    }
    let hosts = unreachable.join(",");
    ApiError {
        reason: Reason::HostUnreachable,
        message: format!("no save {id} on the hosts that answer; {hosts} did not"),
        ..error
            .with("unreachable", hosts)
            .with("advice", "slat get hosts; ask again when they answer")
    }
}

/// Calls `seen` with each state of a save until it has ended, through restarts of the server.
///
/// # Errors
/// When patience is over, or the save was deleted meanwhile.
pub(crate) async fn follow(
    client: &Client,
    name: &str,
    mut patience: Patience,
    mut seen: impl FnMut(&v1::Save),
) -> Result<v1::Save, Failure> {
    let doing = format!("watch {name}");
    loop {
        let request = v1::WatchSaveRequest {
            name: name.to_owned(),
        };
        let error = match client.snapshots().watch_save(request).await {
            Err(status) => status.into(),
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.next().await {
                        Some(Ok(save)) => {
                            patience.heard();
                            seen(&save);
                            if save.state() != State::Writing {
                                return Ok(save);
                            }
                        }
                        Some(Err(status)) => break ApiError::from(status),
                        None => {
                            let words = "the stream ended before the save";
                            break ApiError::new(Reason::ConnectionLost, words);
                        }
                    }
                }
            }
        };
        patience.lost(&doing, error).await?;
    }
}

/// A save that failed, as the command's failure.
pub(crate) fn outcome(doing: String, save: &v1::Save) -> Result<(), Failure> {
    if save.state() != State::Failed {
        return Ok(());
    }
    let reason = Reason::parse(&save.reason).unwrap_or(Reason::Internal);
    let error = ApiError::new(reason, save.state_message.clone())
        .with("save", &save.name)
        .with("vm", &save.vm);
    Err(Failure::api(doing, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_is_typed_with_or_without_its_host() {
        let full: SaveRef = "hosts/a/saves/web-1".parse().unwrap();
        assert_eq!(full.to_string(), "hosts/a/saves/web-1");
        assert_eq!("web-1".parse(), Ok(SaveRef::Id("web-1".into())));
        for wrong in ["", "Web", "saves/web-1", "hosts/a", "-x"] {
            assert!(wrong.parse::<SaveRef>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_failed_save_fails_its_command_with_its_reason() {
        let mut save = v1::Save {
            name: "hosts/a/saves/s".into(),
            state: State::Failed.into(),
            reason: "DISK_FULL".into(),
            state_message: "/s has no room".into(),
            ..Default::default()
        };
        let failure = outcome("save vms/web".into(), &save).unwrap_err();
        assert!(
            failure.render().contains("DISK_FULL"),
            "{}",
            failure.render()
        );
        save.set_state(State::Written);
        outcome(String::new(), &save).unwrap();
    }

    #[test]
    fn a_save_that_no_host_shows_may_be_on_a_silent_one() {
        assert_eq!(none("s", &[]).reason, Reason::NoSuchSave);
        assert_eq!(
            none("s", &["hosts/b".into()]).reason,
            Reason::HostUnreachable
        );
    }
}
