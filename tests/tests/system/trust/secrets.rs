//! What may be known to nobody else: private keys, a migration's ticket, a guest's memory. After a
//! migration, and after calls that failed, no file, log, answer, metric or process's arguments has
//! any of it, in whatever form it might have been printed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use slat_proto::{
    model::proto_duration,
    transport::connect_by,
    v1::{self, migration_params::Verify, transfer_service_client::TransferServiceClient},
};
use slat_tests::{
    Fleet, Layout,
    fleet::{
        Protection,
        certificates::{ADMIN, SERVER},
    },
    guest::{MIB, busy, paced, verified},
    memory_file::MemoryFile,
    process::command_lines,
    scene,
};
use slat_trust::grant::{Grant, Party, Purpose, Signer};

use super::super::cli::slat;

/// What is looked for: a name, and the bytes.
type Needles = Vec<(String, Vec<u8>)>;
/// What it is looked for in.
type Haystacks = BTreeMap<String, Vec<u8>>;

/// Bytes of a sample of guest memory, and how many samples there are.
const SAMPLE: usize = 24;
const SAMPLES: u64 = 64;

/// One secret as bytes, as hexadecimal, as base64, and as a list of numbers.
fn forms(name: &str, secret: &[u8]) -> Needles {
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let numbers: Vec<String> = secret.iter().take(8).map(ToString::to_string).collect();
    let mut needles = vec![
        (
            format!("{name} in upper hexadecimal"),
            hex.to_uppercase().into(),
        ),
        (format!("{name} in hexadecimal"), hex.into()),
        (format!("{name} in numbers"), numbers.join(", ").into()),
        (
            format!("{name} in numbers, short"),
            numbers.join(",").into(),
        ),
        (name.to_owned(), secret.to_vec()),
    ];
    // As base64 has it wherever it begins: without the ends, which have bits of its neighbours.
    for skipped in 0..3 {
        let whole = secret[skipped..].chunks_exact(3);
        let text: Vec<u8> = whole.flat_map(base64).collect();
        needles.push((format!("{name} in base64, from {skipped}"), text));
    }
    needles
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(three: &[u8]) -> [u8; 4] {
    let bits = three
        .iter()
        .fold(0, |all, byte| all << 8 | usize::from(*byte));
    [18, 12, 6, 0].map(|by| BASE64[bits >> by & 63])
}

fn from_base64(text: &str) -> Vec<u8> {
    let digits = text
        .bytes()
        .filter_map(|byte| BASE64.iter().position(|it| *it == byte));
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0_usize, 0);
    for digit in digits {
        (bits, held) = (bits << 6 | digit, held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff).unwrap_or_default());
        }
    }
    bytes
}

/// The 32 bytes in a PKCS#8 key that are secret, behind the mark of their string.
fn scalar(der: &[u8]) -> anyhow::Result<&[u8]> {
    let mark = [4, 32];
    // Random bytes may look so, too: the first is the string's.
    let at = der.windows(2).position(|two| two == mark);
    let at = at.context("no string of 32 bytes")? + 2;
    der.get(at..at + 32).context("a short key")
}

fn pem_key(name: &str, file: &Path) -> anyhow::Result<Needles> {
    let text = fs::read_to_string(file)?;
    let lines: Vec<&str> = text.lines().filter(|it| !it.starts_with("--")).collect();
    ensure!(text.contains("PRIVATE KEY") && lines.len() > 1, "no PEM");
    let mut needles = forms(name, scalar(&from_base64(&lines.concat()))?);
    let full = lines.iter().filter(|line| line.len() == 64);
    needles.extend(full.map(|line| (format!("{name} in PEM"), line.as_bytes().to_vec())));
    Ok(needles)
}

/// The private keys of a fleet.
fn keys(fleet: &Fleet) -> anyhow::Result<Needles> {
    let mut needles = pem_key("the CA's key", &fleet.root().join("pki/ca.key"))?;
    for holder in ["host-a", "host-b", SERVER, ADMIN] {
        let file = fleet.certificates().dir(holder).join("tls.key");
        needles.extend(pem_key(&format!("the key of {holder}"), &file)?);
    }
    let mut signing = 0;
    for path in files_below(&fleet.root().join("server/grant-keys")) {
        if path.extension().is_some_and(|it| it == "key") {
            needles.extend(forms("a grant key", scalar(&fs::read(&path)?)?));
            signing += 1;
        }
    }
    ensure!(signing > 0, "the server has no key for grants");
    Ok(needles)
}

/// Bytes of a guest, from pages all over its memory.
fn guest(pid: u32, bytes: u64) -> anyhow::Result<Needles> {
    let memory = MemoryFile::of(pid, 0)?;
    let mut needles = Needles::new();
    for number in 0..SAMPLES {
        let page = bytes / 4096 * number / SAMPLES;
        let mut sample = [0; SAMPLE];
        memory.read(page * 4096 + 2048, &mut sample)?;
        let distinct: std::collections::HashSet<_> = sample.iter().collect();
        // Zeroes and counters are everywhere.
        if distinct.len() >= SAMPLE / 2 {
            needles.extend(forms(&format!("page {page} of the guest"), &sample));
        }
    }
    ensure!(needles.len() as u64 > SAMPLES, "the guest is not filled");
    Ok(needles)
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(files_below(&entry.path())),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// Where a secret may be: its own file.
fn is_its_place(root: &Path, file: &Path) -> bool {
    let is_key = file.extension().is_some_and(|it| it == "key");
    let places = ["pki", "tls", "server/grant-keys"];
    is_key
        && places
            .iter()
            .any(|place| file.starts_with(root.join(place)))
}

/// Logs, journals, the server's database, the lists of used grants: all that there is.
fn files(fleet: &Fleet, into: &mut Haystacks) {
    for file in files_below(fleet.root()) {
        if !is_its_place(fleet.root(), &file) {
            // Those of a VM that goes meanwhile go, too.
            let bytes = fs::read(&file).unwrap_or_default();
            into.insert(file.display().to_string(), bytes);
        }
    }
}

/// Arguments and environment of every process of the fleet.
fn processes(fleet: &Fleet, when: &str, into: &mut Haystacks) -> usize {
    let found = command_lines(fleet.root());
    for (pid, line) in &found {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        into.insert(format!("arguments of {pid} {when}"), line.clone());
        into.insert(format!("environment of {pid} {when}"), environment);
    }
    found.len()
}

/// All that the command line and metrics show.
async fn answers(fleet: &Fleet, into: &mut Haystacks) -> anyhow::Result<()> {
    let own = fleet.certificates().path(ADMIN);
    let endpoints = [fleet.server(), fleet.agent("host-a"), fleet.agent("host-b")];
    for endpoint in &endpoints {
        let metrics = fleet.metrics(endpoint).await?;
        into.insert(format!("metrics of {endpoint}"), metrics.into());
    }
    let server = fleet.server().to_string();
    // Two that work everywhere, and calls that fail: with what they say.
    for line in [
        "get hosts",
        "get vms",
        "get migrations",
        "get saves",
        "get leftovers",
        "memory digest web",
        "memory mappings web",
        "get vm nobody",
        "migrate web --to host-c",
        "migrate web --to host-b",
        "cancel nothing",
        "fence host host-a",
        "create vm web --memory 4MiB",
    ] {
        for format in ["json", "yaml", "table"] {
            let line = format!("{line} -o {format} --server {server} --tls-dir {own}");
            let words: Vec<&str> = line.split(' ').collect();
            let output = slat(&words, &[("SLAT_LOG_FILTER", "trace")]).await?;
            into.insert(format!("slat {line}"), output.stdout);
            into.insert(format!("slat {line}, errors"), output.stderr);
        }
    }
    Ok(())
}

/// The ticket of a migration's page streams, asked for once more with the server's certificate and
/// the server's key for grants.
async fn ticket(fleet: &Fleet, migration: &v1::Migration, vm: &v1::Vm) -> anyhow::Result<Vec<u8>> {
    let link = fleet.certificates().link(SERVER)?;
    let agent = |host: &str| {
        let channel = connect_by(&fleet.agent(host), &link);
        channel.map(TransferServiceClient::new)
    };
    let request = v1::DescribeOutgoingRequest {
        migration: migration.name.clone(),
        vm: vm.name.clone(),
        epoch: vm.epoch,
        vm_uid: vm.uid.clone(),
    };
    let described = agent("host-a")?.describe_outgoing(request).await?;
    let described = described.into_inner();
    let keys = files_below(&fleet.root().join("server/grant-keys"));
    let key = keys
        .iter()
        .find(|it| it.extension().is_some_and(|it| it == "key"));
    let signer = Signer::from_pkcs8(&fs::read(key.context("no key for grants")?)?)?;
    let mut parties = Vec::new();
    for host in ["host-a", "host-b"] {
        let name = format!("hosts/{host}");
        let hosts = fleet.hosts(&fleet.server());
        let shown = { hosts }.get_host(v1::GetHostRequest { name }).await?;
        parties.push(Party {
            host: host.to_owned(),
            incarnation: shown.into_inner().incarnation,
        });
    }
    let destination = parties.pop().context("no host")?;
    let source = parties.pop().context("no host")?;
    let id = migration.name.strip_prefix("migrations/");
    let grant = Grant::new(
        Purpose::Receive,
        id.context("a migration's name")?,
        (&vm.uid, vm.epoch),
        (source, destination),
        SystemTime::now(),
        Duration::from_secs(600),
    )?;
    let grant = Grant {
        source_key: described.channel_key[..].try_into()?,
        ..grant
    };
    let request = v1::PrepareIncomingRequest {
        migration: migration.name.clone(),
        vm: described.vm,
        slots: described.slots,
        params: migration.params,
        source_agent_address: fleet.agent("host-a").to_string(),
        preamble: described.preamble,
        send_time: described.send_time,
        grant: Some((&signer.sign(&grant)?).into()),
        ..Default::default()
    };
    let prepared = agent("host-b")?.prepare_incoming(request).await?;
    let ticket = prepared.into_inner().ticket;
    ensure!(ticket.len() == 32, "{} bytes", ticket.len());
    Ok(ticket)
}

/// Nothing that is open in a VM's process leads to a key.
fn opens_no_key(fleet: &Fleet, pid: u32) -> anyhow::Result<()> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        for place in ["pki", "tls", "server"] {
            let leads = target.starts_with(fleet.root().join(place));
            ensure!(!leads, "VM process {pid} has {} open", target.display());
        }
    }
    Ok(())
}

#[test]
fn no_key_and_no_guest_byte_is_anywhere_else() {
    let layout = Layout::two(scene::best_backend());
    let protection = Protection {
        tls: true,
        namespaces: false,
    };
    scene::run_by(layout, protection, async |fleet: &mut Fleet| {
        let spec = busy(fleet.backend(), 32, 1, Some(MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let source = fleet.vm_process("host-a", &vm.name)?;
        let mut needles = keys(fleet)?;
        needles.extend(guest(source.pid(), 32 * MIB)?);
        let mut haystacks = Haystacks::new();
        // Slow: all that is looked at meanwhile takes its time, too.
        let params = v1::MigrationParams {
            max_downtime: Some(proto_duration(Duration::from_secs(10))),
            ..verified(paced(4 * MIB), Verify::AfterCommit)
        };
        let migration = fleet
            .migrate_until_precopy(&vm.name, "host-b", params)
            .await?;
        // Two daemons and the server, a VM process at each end.
        let seen = processes(fleet, "while pages flow", &mut haystacks);
        ensure!(seen >= 5, "{seen} processes");
        opens_no_key(fleet, source.pid())?;
        opens_no_key(fleet, fleet.vm_process("host-b", &vm.name)?.pid())?;
        needles.extend(forms("the ticket", &ticket(fleet, &migration, &vm).await?));
        files(fleet, &mut haystacks);
        let done = fleet
            .migration_ends(&migration.name, v1::MigrationPhase::Completed)
            .await?;
        ensure!(done.error.is_none(), "{done:#?}");
        fleet.runs_soundly_on(&vm.name, "host-b").await?;
        // Its memory as it is now, too.
        let target = fleet.vm_process("host-b", &vm.name)?;
        needles.extend(guest(target.pid(), 32 * MIB)?);
        answers(fleet, &mut haystacks).await?;
        processes(fleet, "at the end", &mut haystacks);
        let mut last = Haystacks::new();
        files(fleet, &mut last);
        let last = last.into_iter();
        haystacks.extend(last.map(|(name, bytes)| (format!("{name}, later"), bytes)));

        for expected in ["server.log", "host-a.log", "host-b.log", "/log", "journal"] {
            let has =
                |(name, bytes): (&String, &Vec<u8>)| name.contains(expected) && !bytes.is_empty();
            ensure!(haystacks.iter().any(has), "no {expected} was looked at");
        }
        let total: usize = haystacks.values().map(Vec::len).sum();
        let found = look(needles, haystacks).await?;
        ensure!(found.is_empty(), "{found:#?}");
        eprintln!("nothing in {total} bytes");
        Ok(())
    });
}

/// What is found, and where.
async fn look(needles: Needles, haystacks: Haystacks) -> anyhow::Result<Vec<String>> {
    let found = tokio::task::spawn_blocking(move || {
        // By the first four bytes, so that a haystack is gone through once.
        let mut by_start: BTreeMap<[u8; 4], Vec<&(String, Vec<u8>)>> = BTreeMap::new();
        for needle in &needles {
            if let Some(start) = needle.1.first_chunk() {
                by_start.entry(*start).or_default().push(needle);
            }
        }
        let mut found = Vec::new();
        for (place, bytes) in &haystacks {
            for (at, start) in bytes.windows(4).enumerate() {
                let start: [u8; 4] = start.try_into().unwrap_or_default();
                for (name, secret) in by_start.get(&start).into_iter().flatten() {
                    if bytes[at..].starts_with(secret) {
                        found.push(format!("{name} in {place}"));
                    }
                }
            }
        }
        found
    });
    Ok(found.await?)
}

#[tokio::test]
async fn what_is_hidden_is_found_where_it_is() {
    let secret: Vec<u8> = (100..132).collect();
    let told = [
        format!("{secret:?}").into_bytes(),
        format!("{secret:02x?}").replace(", ", "").into_bytes(),
        secret.clone(),
        [b"x", &*secret].concat(),
    ];
    let in_base64 = told
        .iter()
        .skip(2)
        .map(|bytes| bytes.chunks_exact(3).flat_map(base64).collect::<Vec<u8>>());
    for bytes in told.iter().cloned().chain(in_base64) {
        let haystacks = Haystacks::from([("a log".to_owned(), bytes.clone())]);
        let found = look(forms("it", &secret), haystacks).await.unwrap();
        assert!(!found.is_empty(), "{}", String::from_utf8_lossy(&bytes));
    }
    assert_eq!(from_base64("ZGVm"), b"def");
}
