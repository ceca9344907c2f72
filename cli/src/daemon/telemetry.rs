//! Logs and traces of one process.
//!
//! Logs go to standard error: text on a terminal, JSON elsewhere, filtered by `--log-filter` or
//! RUST_LOG. Traces are exported over OTLP/gRPC only when OTEL_EXPORTER_OTLP_ENDPOINT (or its
//! `_TRACES_` form) is set; the other `OTEL_*` variables have their standard meaning. The W3C
//! propagator is always set, so a caller's trace goes on through a process that exports nothing.
//! Logs and traces have separate filters: quiet logs do not leave spans out.
//!
//! The audit (target `audit`: who called what, and how it ended) goes to the file of `--audit-log`,
//! and as OpenTelemetry logs to the endpoint of OTEL_EXPORTER_OTLP_ENDPOINT or its `_LOGS_` form.

use std::{io, path::PathBuf, time::Duration};

use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{LogExporter, SpanExporter};
use opentelemetry_sdk::{
    Resource, logs::SdkLoggerProvider, propagation::TraceContextPropagator,
    trace::SdkTracerProvider,
};
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry, fmt::writer::BoxMakeWriter, layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use super::audit_log::AuditLog;
use crate::{failure::Failure, term::units::Size};

/// Least size of a file of the audit log, bytes.
const LEAST_AUDIT: u64 = 64 << 10;
/// The last spans have this long to leave the process.
const FLUSH: Duration = Duration::from_secs(3);
/// Spans worth exporting: ours in detail, others when they matter.
const TRACED: &str = "warn,slat=debug,slat_server=debug,slat_daemon=debug,slat_vmm=debug,slat_record=debug,slat_proto=debug";

/// What of a process's events is its audit, looks included.
const AUDITED: &str = "off,audit=debug";

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// Text on a terminal, JSON elsewhere
    #[default]
    Auto,
    /// One readable line an event
    Text,
    /// One JSON object an event
    Json,
}

/// Options of logging.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct LogArgs {
    /// How to write logs to standard error
    #[arg(
        long,
        env = "SLAT_LOG_FORMAT",
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    pub(crate) log_format: LogFormat,
    /// What to log, as `info` or `warn,slat_vmm=debug` (else RUST_LOG, else info)
    #[arg(long, env = "SLAT_LOG_FILTER", value_name = "FILTER")]
    pub(crate) log_filter: Option<String>,
    /// Write each call as a line of JSON to this file, too, as /var/log/slat/audit.log: who called
    /// what, and how it ended
    #[arg(long, env = "SLAT_AUDIT_LOG", value_name = "FILE")]
    pub(crate) audit_log: Option<PathBuf>,
    /// Begin a new file at this size, as 64MiB; one older file is kept
    #[arg(
        long,
        env = "SLAT_AUDIT_LOG_SIZE",
        default_value = "64MiB",
        value_name = "SIZE"
    )]
    pub(crate) audit_log_size: Size,
}

/// Owns the export of traces; [`Telemetry::shutdown`] sends what is left.
#[derive(Debug)]
pub(crate) struct Telemetry {
    provider: Option<SdkTracerProvider>,
    audit: Option<SdkLoggerProvider>,
}

/// Installs logs and traces of a process that plays `role`; `default_filter` holds where nobody
/// chose. Call it once, on a runtime.
pub(crate) fn install(
    role: &str,
    log: &LogArgs,
    default_filter: &str,
) -> Result<Telemetry, Failure> {
    install_to(BoxMakeWriter::new(io::stderr), role, log, default_filter)
}

/// As [`install`], with the logs going to `writer`.
pub(crate) fn install_to(
    writer: BoxMakeWriter,
    role: &str,
    log: &LogArgs,
    default_filter: &str,
) -> Result<Telemetry, Failure> {
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    let chosen = log
        .log_filter
        .clone()
        .or_else(|| std::env::var("RUST_LOG").ok())
        .filter(|text| !text.trim().is_empty());
    let filter = match &chosen {
        Some(text) => EnvFilter::try_new(text)
            .map_err(|error| Failure::Usage(format!("\"{text}\" is no log filter: {error}")))?,
        None => EnvFilter::new(default_filter),
    };
    let terminal = io::IsTerminal::is_terminal(&io::stderr());
    let json = match log.log_format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = if json {
        lines.json().flatten_event(true).with_filter(filter).boxed()
    } else {
        let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        lines.with_ansi(colours).with_filter(filter).boxed()
    };
    let audit = match &log.audit_log {
        Some(path) => {
            let file = AuditLog::open(path, log.audit_log_size.0.max(LEAST_AUDIT))?;
            let lines = tracing_subscriber::fmt::layer().with_writer(file);
            let audited = EnvFilter::new(AUDITED);
            Some(lines.json().flatten_event(true).with_filter(audited))
        }
        None => None,
    };
    let provider = exports_traces().then(|| provider(role)).transpose()?;
    let exported = exports_logs().then(|| audit_provider(role)).transpose()?;
    let audit_export = exported.as_ref().map(|exported| {
        OpenTelemetryTracingBridge::new(exported).with_filter(EnvFilter::new(AUDITED))
    });
    let traces = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("slat"))
            .with_filter(EnvFilter::new(TRACED))
    });
    Registry::default()
        .with(lines)
        .with(audit)
        .with(audit_export)
        .with(traces)
        .try_init()
        .map_err(|error| Failure::local(format!("cannot install logging: {error}")))?;
    Ok(Telemetry {
        provider,
        audit: exported,
    })
}

/// Whether this process exports traces.
pub(crate) fn exports_traces() -> bool {
    is_set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
}

/// Whether it exports its audit.
fn exports_logs() -> bool {
    is_set("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT")
}

/// Whether there is an endpoint for all signals, or for this one.
fn is_set(own: &str) -> bool {
    ["OTEL_EXPORTER_OTLP_ENDPOINT", own]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// An exporter that cannot be made.
fn no_export(what: &str, error: &dyn std::error::Error) -> Failure {
    Failure::advised(
        format!("cannot export {what}: {error}"),
        "correct or unset OTEL_EXPORTER_OTLP_ENDPOINT",
    )
}

fn audit_provider(role: &str) -> Result<SdkLoggerProvider, Failure> {
    let exporter = LogExporter::builder()
        .with_tonic()
        .build()
        .map_err(|error| no_export("the audit", &error))?;
    Ok(SdkLoggerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource(role))
        .build())
}

fn provider(role: &str) -> Result<SdkTracerProvider, Failure> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .build()
        .map_err(|error| no_export("traces", &error))?;
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource(role))
        .build())
}

/// What is said of this process beside everything that it exports.
fn resource(role: &str) -> Resource {
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let mut resource = Resource::builder().with_attributes([
        KeyValue::new("service.namespace", "slat"),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", uuid::Uuid::now_v7().to_string()),
        KeyValue::new("host.name", host),
        KeyValue::new("process.pid", i64::from(std::process::id())),
    ]);
    // An operator's own name for the service goes before ours.
    if std::env::var_os("OTEL_SERVICE_NAME").is_none_or(|name| name.is_empty()) {
        resource = resource.with_service_name(format!("slat-{role}"));
    }
    resource.build()
}

impl Telemetry {
    /// Sends the last spans, for a bounded time: a collector that hangs does not keep the process.
    pub(crate) async fn shutdown(self) {
        // It blocks, and on a runtime with one worker it would block the exporter it waits for.
        let flush = tokio::task::spawn_blocking(move || {
            let traces = self.provider.map(|it| it.shutdown_with_timeout(FLUSH));
            let audit = self.audit.map(|it| it.shutdown_with_timeout(FLUSH));
            (traces.unwrap_or(Ok(())), audit.unwrap_or(Ok(())))
        });
        match tokio::time::timeout(FLUSH * 2, flush).await {
            Ok(Ok((Ok(()), Ok(())))) => {}
            other => tracing::debug!(?other, "the last traces or audit lines were not sent"),
        }
    }
}
