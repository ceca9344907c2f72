//! Certificates of a CA of the test's own, an endpoint on a thread of its own with what it audits,
//! and callers that speak TLS by hand.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use slat_proto::{
    ApiError, Reason,
    transport::{Address, Endpoint, Health, Link, connect_by},
};
use slat_test_dir::TestDir;
use slat_trust::{
    Credentials, Expects, Kind,
    pki::{Ca, Issued, Validity},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        self, ClientConfig, DigitallySignedStruct, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    },
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, Registry, layer::SubscriberExt as _};

use crate::rig::LONG;

/// A CA and what it issued, in a directory that goes with it.
pub(crate) struct Pki {
    dir: TestDir,
    pub(crate) ca: Ca,
    issued: AtomicUsize,
}

impl Pki {
    pub(crate) fn new(domain: &str) -> Self {
        let dir = TestDir::new();
        let ca = Ca::init(&dir.path().join("ca"), domain).unwrap();
        Self {
            dir,
            ca,
            issued: AtomicUsize::new(0),
        }
    }

    pub(crate) fn issue_for(
        &self,
        kind: Kind,
        name: &str,
        validity: Option<Validity>,
    ) -> (Credentials, Issued) {
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let out = self.dir.path().join(format!("{name}-{number}"));
        let issued = self.ca.issue(kind, name, validity, &out).unwrap();
        (Credentials::load(&out).unwrap(), issued)
    }

    pub(crate) fn issue(&self, kind: Kind, name: &str) -> Credentials {
        self.issue_for(kind, name, None).0
    }

    /// Of an agent, valid for this time around now.
    pub(crate) fn agent_within(&self, begins: i64, ends: i64) -> Credentials {
        let now = SystemTime::now();
        let at = |seconds: i64| {
            let distance = Duration::from_secs(seconds.unsigned_abs());
            if seconds < 0 {
                now - distance
            } else {
                now + distance
            }
        };
        let validity = Validity {
            not_before: at(begins),
            not_after: at(ends),
        };
        self.issue_for(Kind::Agent, "host-a", Some(validity)).0
    }

    /// Revokes, and lets these ends know.
    pub(crate) fn revoke(&self, which: &str, told: &[&Credentials]) {
        self.ca.revoke(which).unwrap();
        for credentials in told {
            self.ca.publish(credentials.dir()).unwrap();
            assert!(credentials.refresh().unwrap(), "the list counts");
        }
    }
}

/// A link of an end that accepts anybody it may.
pub(crate) fn open_to_all(credentials: &Credentials) -> Link {
    Link::new(Some(credentials), Expects::Anyone)
}

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

type Line = BTreeMap<String, String>;

/// What an end audits.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<Line>>>);

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if event.metadata().target() == "audit" {
            let mut fields = Fields::default();
            event.record(&mut fields);
            self.0.lock().unwrap().push(fields.0);
        }
    }
}

/// An endpoint on a thread of its own, so that both ends of a handshake really run at once.
pub(crate) struct End {
    pub(crate) address: Address,
    pub(crate) health: Health,
    lines: Lines,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl End {
    pub(crate) fn serve(endpoint: Endpoint) -> Self {
        let lines = Lines::default();
        let kept = lines.clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let _kept = tracing::subscriber::set_default(Registry::default().with(kept));
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let served = crate::rig::serve(endpoint).await;
                let address = crate::rig::address(&served);
                tell.send((address, served.health())).unwrap();
                drop(stopped.await);
                served.stop().await;
            });
        });
        let (address, health) = told.recv_timeout(LONG).unwrap();
        Self {
            address,
            health,
            lines,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// What was audited until now.
    pub(crate) fn audited(&self) -> Vec<Line> {
        self.lines.0.lock().unwrap().clone()
    }

    /// Waits for a line.
    pub(crate) async fn audits(&self, is_it: impl Fn(&Line) -> bool) {
        let until = Instant::now() + LONG;
        while !self.audited().iter().any(&is_it) {
            assert!(Instant::now() < until, "{:#?}", self.audited());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits for as many lines.
    pub(crate) async fn audits_so_many(&self, lines: usize) {
        let until = Instant::now() + LONG;
        while self.audited().len() < lines {
            assert!(Instant::now() < until, "{:#?}", self.audited());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends it, and says what it audited in all.
    pub(crate) fn stop(mut self) -> Vec<Line> {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
        self.audited()
    }

    pub(crate) fn host(&self) -> String {
        match &self.address {
            Address::Tcp(host) => host.clone(),
            Address::Unix(path) => panic!("{}", path.display()),
        }
    }

    pub(crate) async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.host()).await.unwrap()
    }
}

/// A health check over a new connection: the least that a caller can ask.
pub(crate) async fn check(end: &End, link: &Link) -> Result<(), ApiError> {
    let channel = connect_by(&end.address, link).unwrap();
    let asked = HealthClient::new(channel);
    let answer = asked
        .clone()
        .check(HealthCheckRequest::default())
        .await
        .map(drop);
    answer.map_err(ApiError::from)
}

/// Calls so often that no race stays unseen, each time over a new connection.
pub(crate) async fn refused(end: &End, link: &Link, reason: Reason) -> ApiError {
    let mut last = None;
    for attempt in 0..TIMES {
        let error = check(end, link).await.unwrap_err();
        assert_eq!(error.reason, reason, "attempt {attempt}: {error:?}");
        last = Some(error);
    }
    last.unwrap()
}

/// How often each refusal is looked at.
pub(crate) const TIMES: usize = 20;

/// Takes every server.
#[derive(Debug)]
struct Anybody(CryptoProvider);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects by hand, with the certificate of a directory or without any, and asks for `protocol`.
pub(crate) async fn by_hand(
    end: &End,
    own: Option<&Path>,
    protocol: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = ring::default_provider();
    let config = ClientConfig::builder_with_provider(Arc::new(provider.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)));
    let mut config = match own {
        None => config.with_no_client_auth(),
        Some(dir) => {
            let read = CertificateDer::pem_file_iter(dir.join("tls.crt")).unwrap();
            let chain: Vec<_> = read.map(Result::unwrap).collect();
            let key = PrivateKeyDer::from_pem_file(dir.join("tls.key")).unwrap();
            config.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let name = ServerName::try_from("slat.invalid").unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(name, end.tcp().await).await
}

/// The status line of a page.
pub(crate) async fn page(end: &End, own: &Path, path: &str) -> String {
    let mut stream = by_hand(end, Some(own), b"http/1.1").await.unwrap();
    let ask = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(LONG, stream.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let answer = String::from_utf8_lossy(&answer);
    answer.lines().next().unwrap_or_default().to_owned()
}

/// Adds the CAs of another directory to those that are trusted in one.
pub(crate) fn trust_also(credentials: &Credentials, other: &Credentials) {
    let file = |credentials: &Credentials| -> PathBuf { credentials.dir().join("ca.crt") };
    let mut both = std::fs::read(file(credentials)).unwrap();
    both.extend(std::fs::read(file(other)).unwrap());
    std::fs::write(file(credentials), both).unwrap();
    assert!(credentials.refresh().unwrap(), "another CA is trusted");
}
