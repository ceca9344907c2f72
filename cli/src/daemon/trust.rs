//! By what a role knows its callers: the certificates of a directory, and the file of users.
//!
//! Both are looked at every second and count without a restart; a set of files that cannot be used
//! leaves the old one in force, and says so. Without certificates a role starts only when it is
//! told to by name, on loopback too: whoever reaches it is in control of every VM.
//!
//! Metrics: `slat_tls_certificate_not_after_seconds`, `slat_tls_ca_not_after_seconds`,
//! `slat_tls_reloads_total{result}`, `slat_endpoint_plaintext`, `slat_access_file_ok`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use metrics::{counter, describe_counter, describe_gauge, gauge};
use serde::Deserialize;
use slat_proto::{
    model::{Labels, timestamp},
    transport::{Access, Permit, Scope, Users},
    v1,
};
use slat_trust::{Credentials, Kind, TrustError};

use crate::failure::Failure;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A file of users is no larger.
const LARGEST: u64 = 1 << 20;
/// From here on an end that comes is said.
const SOON: Duration = Duration::from_secs(7 * 86_400);

/// How a role knows its callers.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TrustArgs {
    /// Directory with the certificate of this process (tls.crt, tls.key, ca.crt, crl.pem), as
    /// /etc/slat/tls; slat pki issue makes one
    #[arg(long, env = "SLAT_TLS_DIR", value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// File that says which users may do what, as /etc/slat/access.yaml; without it the user admin
    /// may do everything
    #[arg(long, env = "SLAT_ACCESS", value_name = "FILE")]
    access: Option<PathBuf>,
    /// Serve without TLS and certificates: anyone who reaches the address is in control
    #[arg(long, env = "SLAT_INSECURE_PLAINTEXT")]
    insecure_plaintext: bool,
}

/// How a role knows its callers, in force.
#[derive(Clone, Debug)]
pub(crate) struct Trust {
    /// `None`: in the clear.
    pub(crate) credentials: Option<Credentials>,
    /// What callers may do.
    pub(crate) access: Access,
    file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccessFile {
    #[serde(default)]
    users: BTreeMap<String, User>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    role: String,
    #[serde(default)]
    vms: BTreeMap<String, String>,
    #[serde(default)]
    hosts: BTreeMap<String, String>,
}

/// Reads a file of users.
fn users(path: &Path) -> Result<Users, String> {
    let length = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if length.len() > LARGEST {
        return Err(format!("it has {} bytes, more than 1 MiB", length.len()));
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let file: AccessFile = serde_saphyr::from_str(&text).map_err(|error| error.to_string())?;
    let labels = |field: &str, labels: BTreeMap<String, String>| {
        Labels::from_field(field, &labels.into_iter().collect()).map_err(|error| error.message)
    };
    let permit = |(name, user): (String, User)| -> Result<(String, Permit), String> {
        let role = user
            .role
            .parse()
            .map_err(|error: slat_proto::ApiError| format!("{name}: {}", error.message))?;
        let scope = Scope {
            vms: labels("vms", user.vms)?,
            hosts: labels("hosts", user.hosts)?,
        };
        let role = Some(role);
        Ok((name, Permit { role, scope }))
    };
    file.users.into_iter().map(permit).collect()
}

/// A directory of certificates that cannot be used.
pub(crate) fn unusable(error: &TrustError) -> Failure {
    Failure::advised(error.to_string(), error.advice())
}

impl Trust {
    /// As the options say, for a role of this kind.
    pub(crate) fn open(args: TrustArgs, kind: Kind) -> Result<Self, Failure> {
        let credentials = match args.tls_dir {
            Some(dir) => Some(Credentials::load(&dir).map_err(|error| unusable(&error))?),
            None if args.insecure_plaintext => None,
            None => {
                return Err(Failure::value(
                    "there is no certificate by which others know this process, and by which it \
                     knows them",
                    "say where one is with --tls-dir (slat pki issue makes one), start with slat \
                     up, or serve anyone who reaches it with --insecure-plaintext",
                ));
            }
        };
        if let Some(credentials) = &credentials {
            if args.insecure_plaintext {
                return Err(Failure::Usage(
                    "--tls-dir and --insecure-plaintext exclude each other".to_owned(),
                ));
            }
            let identity = credentials.identity();
            if identity.kind() != kind {
                let word = kind.word();
                return Err(Failure::value(
                    format!(
                        "the certificate in {} is of {identity}, which is no {word}",
                        credentials.dir().display()
                    ),
                    format!("issue one for it: slat pki issue {word} NAME"),
                ));
            }
        }
        let access = Access::default();
        if let Some(file) = &args.access {
            let users = users(file).map_err(|why| {
                Failure::value(
                    format!("{} says not which users may do what: {why}", file.display()),
                    "docs/access.md has an example",
                )
            })?;
            access.set_users(users);
        }
        Ok(Self {
            credentials,
            access,
            file: args.access,
        })
    }

    /// Keeps both in force as their files change, until the process ends.
    pub(crate) fn keep(&self) {
        describe(self);
        let mut keeper = Keeper {
            trust: self.clone(),
            said: None,
            text: None,
        };
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(LOOK);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                // Files may be on a disk that hangs.
                let looked = tokio::task::spawn_blocking(move || {
                    keeper.look();
                    keeper
                });
                match looked.await {
                    Ok(back) => keeper = back,
                    Err(error) => {
                        tracing::error!(%error, "certificates are not looked at any more");
                        return;
                    }
                }
            }
        });
    }
}

/// How an agent with these certificates is protected.
pub(crate) fn host_trust(credentials: Option<&Credentials>, pages_tls: bool) -> v1::HostTrust {
    let Some(credentials) = credentials else {
        return v1::HostTrust {
            pages_tls,
            ..Default::default()
        };
    };
    v1::HostTrust {
        tls: true,
        pages_tls,
        identity: credentials.identity().to_string(),
        certificate_not_after: Some(timestamp(credentials.not_after())),
        message: wrong(credentials).unwrap_or_default(),
    }
}

fn wrong(credentials: &Credentials) -> Option<String> {
    credentials.trouble().or_else(|| {
        let left = credentials.not_after().duration_since(SystemTime::now());
        let left = left.unwrap_or_default();
        (left < SOON).then(|| format!("its certificate ends in {} h", left.as_secs() / 3600))
    })
}

fn describe(trust: &Trust) {
    describe_gauge!(
        "slat_endpoint_plaintext",
        "1: this endpoint asks for no certificate; whoever reaches it is in control."
    );
    gauge!("slat_endpoint_plaintext").set(if trust.credentials.is_none() {
        1.0
    } else {
        0.0
    });
    if trust.credentials.is_none() {
        tracing::warn!(
            "this endpoint asks for no certificate: whoever reaches it is in control of every VM"
        );
        return;
    }
    describe_gauge!(
        "slat_tls_certificate_not_after_seconds",
        "When the first certificate of the own chain ends, seconds since 1970."
    );
    describe_gauge!(
        "slat_tls_ca_not_after_seconds",
        "When the first of the trusted CAs ends, seconds since 1970."
    );
    describe_counter!(
        "slat_tls_reloads_total",
        "Changes of the files of the own certificate, by whether they are in force."
    );
    for result in ["ok", "failed"] {
        counter!("slat_tls_reloads_total", "result" => result).increment(0);
    }
    if trust.file.is_some() {
        describe_gauge!(
            "slat_access_file_ok",
            "1: the file of users is in force as it is; 0: it cannot be used, an older one is."
        );
    }
}

/// What looks at the files.
struct Keeper {
    trust: Trust,
    /// What was said to be wrong.
    said: Option<String>,
    /// The file of users as it was read last, or why it was not.
    text: Option<Result<Users, String>>,
}

impl Keeper {
    fn look(&mut self) {
        if let Some(credentials) = self.trust.credentials.clone() {
            self.certificates(&credentials);
        }
        let Some(file) = &self.trust.file else {
            return;
        };
        let read = users(file);
        if self.text.as_ref() == Some(&read) {
            return;
        }
        gauge!("slat_access_file_ok").set(if read.is_ok() { 1.0 } else { 0.0 });
        match &read {
            Ok(users) => {
                self.trust.access.set_users(users.clone());
                tracing::info!(file = %file.display(), "which users may do what was read");
            }
            Err(why) => {
                tracing::error!(file = %file.display(), %why, "the file of users cannot be used; what it said before holds");
            }
        }
        self.text = Some(read);
    }

    fn certificates(&mut self, credentials: &Credentials) {
        match credentials.refresh() {
            Ok(false) => {}
            Ok(true) => {
                counter!("slat_tls_reloads_total", "result" => "ok").increment(1);
                tracing::info!(identity = %credentials.identity(), "another certificate is in force");
            }
            Err(_) if self.said.is_some() => {}
            Err(_) => counter!("slat_tls_reloads_total", "result" => "failed").increment(1),
        }
        let trouble = wrong(credentials);
        if trouble != self.said {
            match &trouble {
                Some(why) => {
                    tracing::error!(dir = %credentials.dir().display(), %why, "the own certificate");
                }
                None => tracing::info!("nothing is wrong with the own certificate any more"),
            }
            self.said = trouble;
        }
        let seconds = |time: SystemTime| {
            time.duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs_f64()
        };
        gauge!("slat_tls_certificate_not_after_seconds").set(seconds(credentials.not_after()));
        gauge!("slat_tls_ca_not_after_seconds").set(seconds(credentials.ca_not_after()));
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::transport::Role;

    use super::*;

    fn written(text: &str) -> Result<Users, String> {
        let dir = slat_test_dir::TestDir::new();
        let file = dir.path().join("access.yaml");
        std::fs::write(&file, text).unwrap();
        users(&file)
    }

    #[test]
    fn a_file_of_users_says_who_may_do_what() {
        let text = "users:\n  alice: {role: admin}\n  bob: {role: operator, vms: {team: web}}\n";
        let scope = Scope {
            vms: "team=web".parse().unwrap(),
            ..Default::default()
        };
        let bob = Permit {
            role: Some(Role::Operator),
            scope,
        };
        let expected: Users = [
            ("alice".to_owned(), Permit::of(Role::Admin)),
            ("bob".to_owned(), bob),
        ]
        .into_iter()
        .collect();
        assert_eq!(written(text).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_understood_is_refused_whole() {
        for text in [
            "users: {a: {role: king}}",
            "users: {a: {role: agent}}",
            "users: {a: {}}",
            "users: {a: {role: admin, vm: {team: web}}}",
            "user: {a: {role: admin}}",
            "users: {a: {role: viewer, vms: {Team: web}}}",
            "[",
        ] {
            assert!(written(text).is_err(), "{text}");
        }
        assert!(users(Path::new("/nonexistent")).is_err());
    }
}
