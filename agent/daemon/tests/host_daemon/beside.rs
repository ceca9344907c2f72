//! The processes beside a VM's, as the agent starts them: a pager that serves nothing, and a writer
//! that writes a small image. Both are this test executable started again.

use std::{
    ffi::OsString,
    fs::File,
    io::Read as _,
    os::fd::{FromRawFd as _, OwnedFd},
    path::Path,
};

use slat_image::{Base, Compression, ImageId, MemorySpec, Options, Reader, Section, Writer};
use slat_paging::{
    SOCKET,
    wire::{
        FromPager, FromWriter, Problem, ProblemKind, Role, Socket, ToPager, ToWriter, VERSION,
        WRITER_FD, WireError, Written,
    },
};

const VARIABLE: &str = "SLAT_TEST_BESIDE";

/// The program of a `pager` or a `writer`.
pub(crate) fn program(role: &str) -> Vec<OsString> {
    let exe = std::env::current_exe().unwrap();
    let variable = format!("{VARIABLE}={role}");
    let mut program: Vec<OsString> = vec!["env".into(), variable.into(), exe.into()];
    program.extend(["--exact", "beside::process_beside", "--nocapture", "--"].map(OsString::from));
    program
}

/// Not a test of its own: the main of either, when started as one.
#[test]
fn process_beside() {
    match std::env::var(VARIABLE).as_deref() {
        Ok("pager") => pager(),
        Ok(_) => writer(),
        Err(_) => return,
    }
    // Not back into the harness, which would report a passed test.
    std::process::exit(0);
}

/// Says who it is, and waits for the end of its VM.
fn pager() {
    let arguments: Vec<String> = std::env::args().collect();
    let at = arguments.iter().position(|one| one == "--dir").unwrap();
    let socket = Socket::connect(&Path::new(&arguments[at + 1]).join(SOCKET)).unwrap();
    let hello = FromPager::Hello {
        role: Role::Pager,
        version: VERSION,
        pid: std::process::id(),
    };
    socket.send(&hello, &[]).unwrap();
    while !matches!(socket.receive::<ToPager>(), Err(WireError::Closed)) {}
}

/// Writes one page of what it is told, or does what the save's name says.
fn writer() {
    // SAFETY: the agent put the socket there, and nobody else in this process uses the number.
    let socket = Socket::from(unsafe { OwnedFd::from_raw_fd(WRITER_FD) });
    let mut begin = None;
    let (mut sections, mut memories, mut layers) = (Vec::new(), Vec::new(), 0);
    loop {
        let packet = socket.receive::<ToWriter>().unwrap();
        let mut fds = packet.fds.into_iter().map(File::from);
        match packet.message {
            ToWriter::Begin { name, .. } => {
                begin = Some((name, fds.next().unwrap(), fds.collect::<Vec<_>>()));
            }
            ToWriter::Section {
                name,
                version,
                optional,
            } => {
                use std::io::Seek as _;
                let mut file = fds.next().unwrap();
                file.rewind().unwrap();
                let mut contents = Vec::new();
                file.read_to_end(&mut contents).unwrap();
                sections.push(Section {
                    name,
                    version,
                    optional,
                    contents,
                });
            }
            ToWriter::Memory { number, pages } => memories.push(MemorySpec { number, pages }),
            ToWriter::Layer(_) => layers += 1,
            ToWriter::LayerMemory(_) => assert_eq!(fds.count(), 3),
            ToWriter::Go => break,
        }
    }
    let (name, file, bases) = begin.unwrap();
    let mut written = Written {
        all: memories.iter().map(|memory| memory.pages).sum(),
        done: 1,
        ..Default::default()
    };
    // It may have been given up already.
    drop(socket.send(&FromWriter::Progress(written), &[]));
    if name.contains("slow") {
        // Until the agent closes the socket.
        drop(socket.receive::<ToWriter>());
        return;
    }
    if name.contains("dies") {
        std::process::exit(9);
    }
    if name.contains("full") {
        let message = "no room, says the fake".to_owned();
        let kind = ProblemKind::NoSpace;
        let problem = Problem { kind, message };
        socket.send(&FromWriter::Failed(problem), &[]).unwrap();
        return;
    }
    assert_eq!(layers, 1);
    let options = Options {
        id: ImageId(*uuid::Uuid::now_v7().as_bytes()),
        compression: Compression::None,
        base: base(bases),
    };
    let image = Writer::new(file, &options).unwrap();
    for memory in memories {
        image.add_memory(memory).unwrap();
    }
    for section in sections {
        image.add_section(section).unwrap();
    }
    image.write(0, 0, &[7; 4096]).unwrap();
    image.finish().unwrap();
    written.done = written.all;
    written.pages = 1;
    socket.send(&FromWriter::Done(written), &[]).unwrap();
}

/// The nearest first.
fn base(files: Vec<File>) -> Option<Base> {
    let mut below = None;
    for file in files.into_iter().rev() {
        below = Some(std::sync::Arc::new(Reader::open(file, below).unwrap()));
    }
    below.map(|reader| reader.as_base())
}
