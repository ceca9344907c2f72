//! By what a role knows its callers: the certificates of a directory, and the file of users.
//!
//! Both are looked at every second, each by itself, and count without a restart; files that cannot
//! be used leave the old ones in force, and that is said. A look that a disk keeps is said, too,
//! and keeps no other one. Without certificates a role starts only when it is told to by name, on
//! loopback too: whoever reaches it is in control of every VM.
//!
//! Metrics: `slat_tls_certificate_not_after_seconds`, `slat_tls_ca_not_after_seconds`,
//! `slat_tls_reloads_total{result}`, `slat_tls_files_ok`, `slat_endpoint_plaintext`,
//! `slat_access_file_ok`.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use metrics::{counter, describe_counter, describe_gauge, gauge};
use slat_proto::{model::timestamp, transport::Access, v1};
use slat_trust::{Credentials, Kind, TrustError};

use super::access::{self, AccessFile};
use crate::failure::Failure;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A look that takes longer is kept by a disk that hangs.
const LONG: Duration = Duration::from_secs(10);
/// Whether the newest files of the own certificate are in force.
const FILES_OK: &str = "slat_tls_files_ok";
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
    file: Option<AccessFile>,
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
        let file = args.access.map(|path| {
            let shown = path.display().to_string();
            AccessFile::open(path, access.clone()).map_err(|why| {
                Failure::value(
                    format!("{shown} says not which users may do what: {why}"),
                    "docs/access.md has an example",
                )
            })
        });
        Ok(Self {
            credentials,
            access,
            file: file.transpose()?,
        })
    }

    /// Keeps both in force as their files change, until the process ends.
    pub(crate) fn keep(&self) {
        describe(self);
        if let Some(credentials) = &self.credentials {
            let own = Own::new(credentials.clone());
            tokio::spawn(tend(own, "the own certificate", FILES_OK, Own::look));
        }
        if let Some(file) = self.file.clone() {
            tokio::spawn(tend(
                file,
                "the file of users",
                access::OK,
                AccessFile::look,
            ));
        }
    }
}

/// Looks at files again and again. `ok` is the gauge that each look sets.
async fn tend<T: Send + 'static>(mut of: T, what: &str, ok: &'static str, look: fn(&mut T)) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        // Files may be on a disk that hangs.
        let mut looking = tokio::task::spawn_blocking(move || {
            look(&mut of);
            of
        });
        let looked = match tokio::time::timeout(LONG, &mut looking).await {
            Ok(looked) => looked,
            Err(_) => {
                gauge!(ok).set(0.0);
                let seconds = LONG.as_secs();
                tracing::error!(
                    what,
                    seconds,
                    "a look at files takes long; what they said before holds"
                );
                let looked = looking.await;
                tracing::info!(what, "the look at files has ended");
                looked
            }
        };
        match looked {
            Ok(back) => of = back,
            Err(error) => {
                gauge!(ok).set(0.0);
                tracing::error!(what, %error, "files are not looked at any more");
                return;
            }
        }
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
    if trust.file.is_some() {
        describe_gauge!(
            access::OK,
            "1: the file of users is in force as it is; 0: it cannot be used, an older one is."
        );
        gauge!(access::OK).set(1.0);
    }
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
    describe_gauge!(
        FILES_OK,
        "1: the files of the own certificate are in force as they are; 0: they cannot be used, older ones are."
    );
    gauge!(FILES_OK).set(1.0);
}

/// What looks at the files of the own certificate.
struct Own {
    credentials: Credentials,
    /// Why the newest files are not in force.
    failed: Option<String>,
    /// What was said to be wrong.
    said: Option<String>,
}

impl Own {
    fn new(credentials: Credentials) -> Self {
        Self {
            credentials,
            failed: None,
            said: None,
        }
    }

    fn look(&mut self) {
        let credentials = &self.credentials;
        match credentials.refresh() {
            Ok(is_new) => {
                self.failed = None;
                if is_new {
                    counter!("slat_tls_reloads_total", "result" => "ok").increment(1);
                    tracing::info!(identity = %credentials.identity(), "another certificate is in force");
                }
            }
            Err(error) => {
                let why = error.to_string();
                // Whatever else is wrong, as an end that comes: each failure counts once.
                if self.failed.as_ref() != Some(&why) {
                    counter!("slat_tls_reloads_total", "result" => "failed").increment(1);
                    self.failed = Some(why);
                }
            }
        }
        gauge!(FILES_OK).set(if self.failed.is_none() { 1.0 } else { 0.0 });
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
    use metrics_exporter_prometheus::PrometheusBuilder;
    use slat_trust::pki::{Ca, Validity};

    use super::*;

    /// An end that comes is said all the time; a failure meanwhile is one all the same.
    #[test]
    fn a_failed_reload_counts_whatever_else_is_wrong() {
        let dir = slat_test_dir::TestDir::new();
        let own = dir.path().join("own");
        let ca = Ca::init(&dir.path().join("ca"), "example.org").unwrap();
        let soon = Validity::from_now(SOON / 2).unwrap();
        ca.issue(Kind::Agent, "host-a", Some(soon), &own).unwrap();
        let mut keeper = Own::new(Credentials::load(&own).unwrap());
        let recorder = PrometheusBuilder::new().build_recorder();
        let shown = recorder.handle();
        let mut look = || {
            metrics::with_local_recorder(&recorder, || keeper.look());
            let text = shown.render();
            let value = |name: &str| {
                let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
                lines.next().map(|value| value.trim().to_owned())
            };
            (
                value("slat_tls_reloads_total{result=\"failed\"}"),
                value(FILES_OK),
            )
        };
        let are = |failed: &str, ok: &str| (Some(failed.to_owned()), Some(ok.to_owned()));
        assert_eq!(look(), (None, Some("1".to_owned())));
        let good = std::fs::read(own.join("tls.crt")).unwrap();
        std::fs::write(own.join("tls.crt"), "").unwrap();
        assert_eq!(look(), are("1", "0"));
        assert_eq!(look(), are("1", "0"), "once");
        std::fs::write(own.join("tls.crt"), "-----BEGIN CERTIFICATE-----\n").unwrap();
        assert_eq!(look(), are("2", "0"), "another failure");
        std::fs::write(own.join("tls.crt"), good).unwrap();
        assert_eq!(look(), are("2", "1"));
        std::fs::write(own.join("tls.crt"), "").unwrap();
        assert_eq!(look(), are("3", "0"), "it begins anew");
    }

    /// As on a mount that hangs.
    #[tokio::test]
    async fn a_look_that_is_kept_keeps_no_other() {
        let (goes_on, kept) = std::sync::mpsc::channel::<()>();
        let (says, mut looked) = tokio::sync::mpsc::unbounded_channel();
        let keeping = tokio::spawn(tend(kept, "a hung disk", "slat_test_hung", |kept| {
            kept.recv().unwrap_err();
        }));
        let other = tokio::spawn(tend(says, "another", "slat_test_other", |says| {
            says.send(()).unwrap();
        }));
        for _ in 0..3 {
            let look = tokio::time::timeout(60 * LOOK, looked.recv());
            assert!(look.await.unwrap().is_some());
        }
        assert!(!keeping.is_finished());
        drop(goes_on);
        keeping.abort();
        // The look that is under way has somebody to tell until it has ended.
        other.abort();
        assert!(other.await.unwrap_err().is_cancelled());
        while looked.recv().await.is_some() {}
    }
}
