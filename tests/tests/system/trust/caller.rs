//! Calls any method with an empty message, and connects without a certificate.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use prost_reflect::{DescriptorPool, MethodDescriptor};
use slat_proto::{
    ApiError,
    transport::{Address, TracedChannel},
    v1,
};
use slat_trust::{Credentials, Expects, Refusal};
use tokio::{io::AsyncReadExt as _, net::TcpStream, time::timeout};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        SignatureScheme, client::ResolvesClientCert, pki_types::ServerName, sign::CertifiedKey,
    },
};
use tonic::{Request, Status, client::Grpc, codegen::http::uri::PathAndQuery};
use tonic_prost::ProstCodec;

use slat_tests::wait::PATIENCE;

/// Every method that an endpoint may be asked for.
pub(super) fn methods() -> anyhow::Result<Vec<MethodDescriptor>> {
    let mut methods = Vec::new();
    for set in [
        v1::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ] {
        let pool = DescriptorPool::decode(set)?;
        methods.extend(pool.services().flat_map(|service| {
            let methods: Vec<_> = service.methods().collect();
            methods
        }));
    }
    Ok(methods)
}

/// As `slat.v1.VmService/GetVm`.
pub(super) fn name(method: &MethodDescriptor) -> String {
    format!("{}/{}", method.parent_service().full_name(), method.name())
}

/// Calls a method with an empty message; what became of it, as the audit log calls it.
pub(super) async fn call(
    channel: &TracedChannel,
    method: &MethodDescriptor,
) -> anyhow::Result<Result<(), ApiError>> {
    let path = PathAndQuery::try_from(format!("/{}", name(method)))?;
    let asked = async {
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await?;
        // A message that has no fields is any message with none set; of an answer nothing is read.
        let codec = ProstCodec::<(), ()>::default();
        let answer = grpc.server_streaming(Request::new(()), path, codec).await?;
        let mut answers = answer.into_inner();
        while answers.message().await?.is_some() {
            // A watch goes on for ever.
            if method.is_server_streaming() && !method.is_client_streaming() {
                break;
            }
        }
        Ok::<_, Status>(())
    };
    let answer = timeout(PATIENCE, asked).await;
    let answer = answer.with_context(|| format!("{} does not answer", name(method)))?;
    Ok(answer.map_err(ApiError::from))
}

/// Shows no certificate.
#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// What the one who shows no certificate is refused for. `trusts`: whose CAs it trusts.
pub(super) async fn without_certificate(
    address: &Address,
    trusts: &Credentials,
) -> anyhow::Result<Refusal> {
    let Address::Tcp(host) = address else {
        bail!("{address} is no TCP address");
    };
    let mut config = (*trusts.connector(Expects::Anyone)).clone();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let stream = TcpStream::connect(host).await?;
    let connector = TlsConnector::from(Arc::new(config));
    let greeted = connector.connect(ServerName::try_from("slat.invalid")?, stream);
    let said = async {
        let mut stream = greeted.await?;
        stream.read_u8().await
    };
    match timeout(PATIENCE, said).await? {
        Ok(_) => bail!("{address} speaks with one who shows no certificate"),
        Err(error) => Refusal::of_io(&error).with_context(|| format!("no refusal: {error}")),
    }
}
