//! W3C trace context across endpoints: injected into the metadata of calls, read by the server
//! layer.

use opentelemetry::propagation::{Extractor, Injector};
use tonic::{
    Request, Status,
    metadata::{KeyRef, MetadataKey, MetadataMap},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Adds the current span's `traceparent` to each call.
#[derive(Clone, Copy, Debug, Default)]
pub struct TraceInterceptor;

/// A channel whose calls carry the trace context.
pub type TracedChannel = InterceptedService<Channel, TraceInterceptor>;

/// `channel` with the trace context on every call.
#[must_use]
pub fn traced(channel: Channel) -> TracedChannel {
    InterceptedService::new(channel, TraceInterceptor)
}

struct MetadataInjector<'a>(&'a mut MetadataMap);

impl Injector for MetadataInjector<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (MetadataKey::from_bytes(key.as_bytes()), value.parse()) {
            self.0.insert(key, value);
        }
    }
}

struct HeaderExtractor<'a>(&'a MetadataMap);

impl Extractor for HeaderExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0
            .keys()
            .filter_map(|key| match key {
                KeyRef::Ascii(key) => Some(key.as_str()),
                KeyRef::Binary(_) => None,
            })
            .collect()
    }
}

impl Interceptor for TraceInterceptor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let context = tracing::Span::current().context();
        opentelemetry::global::get_text_map_propagator(|propagator| {
            propagator.inject_context(&context, &mut MetadataInjector(request.metadata_mut()));
        });
        Ok(request)
    }
}

/// The caller's trace context, from the headers of its request.
pub(super) fn remote_context(headers: &http::HeaderMap) -> opentelemetry::Context {
    let metadata = MetadataMap::from_headers(headers.clone());
    opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.extract(&HeaderExtractor(&metadata))
    })
}
