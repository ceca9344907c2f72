//! Where the CA is, and what its library's errors are to a command.

use std::path::{Path, PathBuf};

use crate::{
    failure::Failure,
    roles::{Ca, PkiError},
    term::units::Span,
};

/// Where the CA is.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct CaArgs {
    /// Directory of the CA, as /srv/pki [default: slat/pki in the XDG configuration directory,
    /// which is ~/.config]
    #[arg(long, env = "SLAT_PKI_DIR", value_name = "CA_DIR")]
    dir: Option<PathBuf>,
}

impl CaArgs {
    pub(super) fn dir(&self) -> Result<PathBuf, Failure> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let dir = choose(
            self.dir.clone(),
            variable("XDG_CONFIG_HOME"),
            variable("HOME"),
        );
        dir.ok_or_else(|| {
            Failure::advised(
                "there is no home directory to keep a CA in",
                "say where with --dir",
            )
        })
    }

    pub(super) fn open(&self) -> Result<Ca, Failure> {
        let dir = self.dir()?;
        Ca::open(&dir).map_err(|error| failed(&format!("open the CA in {}", dir.display()), &error))
    }
}

fn choose(given: Option<PathBuf>, xdg: Option<PathBuf>, home: Option<PathBuf>) -> Option<PathBuf> {
    if given.is_some() {
        return given;
    }
    // The XDG specification has relative paths ignored.
    let base = xdg
        .filter(|path| path.is_absolute())
        .or_else(|| Some(home?.join(".config")))?;
    Some(base.join("slat/pki"))
}

/// An error of the library while `doing`.
pub(super) fn failed(doing: &str, error: &PkiError) -> Failure {
    let message = format!("cannot {doing}: {error}");
    let advice = error.advice().unwrap_or_default();
    match error {
        PkiError::Identity(_) | PkiError::Time(_) => Failure::value(message, advice),
        _ => Failure::advised(message, advice),
    }
}

/// A lifetime that was asked for.
pub(super) fn lifetime(asked: Option<Span>) -> Result<Option<std::time::Duration>, Failure> {
    match asked {
        Some(Span(lifetime)) if lifetime.as_secs() < 60 => Err(Failure::value(
            format!("--lifetime {} is too short", Span(lifetime)),
            "give a minute or more, as 90d",
        )),
        asked => Ok(asked.map(|asked| asked.0)),
    }
}

/// A path as it is typed in a command that is shown.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_is_where_configuration_is() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(choose(path("x"), path("/c"), path("/h")), path("x"));
        assert_eq!(choose(None, path("/c"), path("/h")), path("/c/slat/pki"));
        assert_eq!(
            choose(None, path("c"), path("/h")),
            path("/h/.config/slat/pki")
        );
        assert_eq!(choose(None, None, None), None);
    }
}
