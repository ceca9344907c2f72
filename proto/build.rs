//! Compiles `slat/v1/*.proto` with protox: no protoc needed. The descriptor set is kept for
//! reflection and JSON. The generated clients and servers get our codec and our message limit,
//! which the generator has no options for: nobody who makes one can forget them.

use std::{env, error::Error, fs, path::PathBuf};

/// What the generator writes, and what stands there afterwards.
const OURS: [(&str, &str); 3] = [
    (
        "tonic_prost::ProstCodec::default()",
        "crate::codec::SlatCodec::default()",
    ),
    (
        "tonic::client::Grpc::new(inner)",
        "tonic::client::Grpc::new(inner).max_decoding_message_size(crate::codec::MAX_MESSAGE)",
    ),
    (
        "max_decoding_message_size: None",
        "max_decoding_message_size: Some(crate::codec::MAX_MESSAGE)",
    ),
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let mut files: Vec<PathBuf> = fs::read_dir(root.join("slat/v1"))?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    println!("cargo:rerun-if-changed=slat/v1");
    let descriptors = protox::compile(&files, [&root])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("slat_v1.pb"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    let mut config = tonic_prost_build::Config::new();
    // Every message knows its full name, so that JSON needs no name beside the type.
    config.enable_type_names();
    // Pieces of a bitmap are parts of one buffer, and are not copied on their way out or in.
    config.bytes(["slat.v1.DirtyBits.bits"]);
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    let generated = out.join("slat.v1.rs");
    let mut code = fs::read_to_string(&generated)?;
    for (theirs, ours) in OURS {
        if !code.contains(theirs) {
            return Err(format!("the generator no longer writes `{theirs}`").into());
        }
        code = code.replace(theirs, ours);
    }
    fs::write(generated, code)?;
    Ok(())
}
