//! Many changes of slots in one call, from a file of one change a line.
//!
//! A line is what the command for one change takes, without the VM. The agent makes all of them or
//! none, and pauses the vCPUs once at most. Nothing is sent when a line cannot be read.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use clap::{Parser as _, error::ErrorKind};
use slat_proto::v1::slot_change::Change;

use super::{
    super::target::VmTarget,
    slots::{self, Access, Order},
};
use crate::{
    client::Session,
    failure::{Failure, in_options},
    term::units::{GuestAddress, Size},
};

pub(super) const EXAMPLE: &str = "\
A file holds one change a line, made in this order; # begins a comment:
  delete-slot --slot 3
  add-slot --slot 3 --base 4GiB --size 128MiB    # a bigger one in its place
  move-slot --slot 4 --base 8GiB
  set-slot --slot 5 --access read-only

Examples:
  slat memory change-slots web -f changes.txt
  slat memory change-slots web -f changes.txt --generation 7   only if nothing changed since
  echo 'delete-slot --slot 3' | slat memory change-slots web -f -";

/// The longest file: more than a change of every slot that a kernel has.
const LONGEST: u64 = 8 << 20;

/// Options of `slat memory change-slots`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct BatchArgs {
    #[command(flatten)]
    vm: VmTarget,
    /// File of changes, one a line, as changes.txt; - reads standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Refuse when the table has changed since this generation, as 7 (slots shows it)
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
}

/// One line.
#[derive(Debug, clap::Parser)]
#[command(
    no_binary_name = true,
    disable_help_flag = true,
    disable_help_subcommand = true
)]
enum Line {
    #[command(name = "add-slot")]
    Add {
        #[arg(long)]
        slot: u32,
        #[arg(long)]
        base: GuestAddress,
        #[arg(long)]
        size: Size,
        #[arg(long)]
        read_only: bool,
    },
    #[command(name = "delete-slot")]
    Delete {
        #[arg(long)]
        slot: u32,
    },
    #[command(name = "set-slot")]
    Set {
        #[arg(long)]
        slot: u32,
        #[arg(long)]
        access: Access,
    },
    #[command(name = "move-slot")]
    Move {
        #[arg(long)]
        slot: u32,
        #[arg(long)]
        base: GuestAddress,
    },
}

impl Line {
    fn change(self) -> Result<Change, Failure> {
        let (slot, order) = match self {
            Self::Add {
                slot,
                base,
                size,
                read_only,
            } => {
                let (base, size) = (base.0, size.0);
                let add = Order::Add {
                    base,
                    size,
                    read_only,
                };
                (slot, add)
            }
            Self::Delete { slot } => (slot, Order::Delete),
            Self::Set { slot, access } => (slot, Order::Set(access)),
            Self::Move { slot, base } => (slot, Order::Move { base: base.0 }),
        };
        order.of_slot(slot)
    }
}

/// What clap says of a line, without the advice that is about a whole command.
fn said(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "no change".to_owned();
    }
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or(&text);
    let words: Vec<&str> = first.split_whitespace().collect();
    let words = words.join(" ");
    words.strip_prefix("error: ").unwrap_or(&words).to_owned()
}

/// The changes of a file's text, each with its line.
fn changes(name: &str, text: &str) -> Result<Vec<(usize, Change)>, Failure> {
    let mut changes = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let words = line.split('#').next().unwrap_or(line).split_whitespace();
        let words: Vec<&str> = words.collect();
        if words.is_empty() {
            continue;
        }
        let bad = |why: String| Failure::Usage(format!("{name}, line {number}: {why}"));
        let line = Line::try_parse_from(words).map_err(|error| bad(said(&error)))?;
        let change = line.change().map_err(|failure| match failure {
            Failure::Usage(why) => bad(why),
            other => other,
        })?;
        changes.push((number, change));
    }
    if changes.is_empty() {
        return Err(Failure::Usage(format!("{name}: no change in it")));
    }
    Ok(changes)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = match path.as_os_str().as_encoded_bytes() {
        b"-" => io::stdin().take(LONGEST + 1).read_to_string(&mut text)?,
        _ => File::open(path)?
            .take(LONGEST + 1)
            .read_to_string(&mut text)?,
    };
    if read as u64 > LONGEST {
        return Err(io::Error::other(format!("longer than {LONGEST} bytes")));
    }
    Ok(text)
}

/// Makes the changes of a file.
pub(super) async fn change(session: &Session, args: &BatchArgs) -> Result<(), Failure> {
    let name = match args.file.as_os_str().as_encoded_bytes() {
        b"-" => "standard input".into(),
        _ => args.file.display().to_string(),
    };
    let text =
        read(&args.file).map_err(|error| Failure::local(format!("cannot read {name}: {error}")))?;
    let (lines, changes): (Vec<usize>, Vec<Change>) = changes(&name, &text)?.into_iter().unzip();
    let doing = format!("make {} of slots of {}", how_many(changes.len()), args.vm);
    let made = slots::update(session, &args.vm, args.generation, changes, doing).await;
    made.map_err(|failure| at_its_line(failure, &name, &lines))
}

fn how_many(changes: usize) -> String {
    match changes {
        1 => "1 change".to_owned(),
        many => format!("{many} changes"),
    }
}

/// A refusal of one change names its line, as an error of syntax does. The API counts changes, from
/// 0 on; whoever wrote the file counts lines.
fn at_its_line(mut failure: Failure, name: &str, lines: &[usize]) -> Failure {
    if let Failure::Api { error, .. } = &mut failure
        && let Some(change) = error.metadata.get("change")
        && let Some(line) = change.parse().ok().and_then(|at: usize| lines.get(at))
    {
        error.message = format!("{name}, line {line}: {}", in_options(&error.message));
        error.metadata.remove("change");
        error.metadata.insert("line".to_owned(), line.to_string());
    }
    failure
}

#[cfg(test)]
mod tests {
    use slat_proto::{ApiError, Reason};

    use super::*;

    #[test]
    fn lines_are_changes_in_their_order() {
        let text = "
            # the bigger one
            delete-slot --slot 3
            add-slot --slot 3 --base 4GiB --size 128MiB --read-only # in its place
            move-slot --slot 4 --base 0x200000000
            set-slot --slot 5 --access read-write";
        let (lines, found): (Vec<usize>, Vec<Change>) =
            changes("f", text).unwrap().into_iter().unzip();
        assert_eq!(lines, [3, 4, 5, 6]);
        let [
            Change::Delete(deleted),
            Change::Create(created),
            Change::Move(moved),
            Change::SetFlags(set),
        ] = found.as_slice()
        else {
            panic!("{found:?}");
        };
        assert_eq!(deleted.slot, 3);
        let slot = created.slot.as_ref().unwrap();
        assert_eq!((slot.slot, slot.base_gfn, slot.pages), (3, 1 << 20, 32768));
        assert!(slot.read_only);
        assert_eq!((moved.slot, moved.base_gfn), (4, 0x200000));
        assert_eq!((set.slot, set.read_only), (5, false));
    }

    #[test]
    fn a_change_that_is_refused_is_named_by_its_line() {
        let refused = |change: &str| {
            let error = ApiError::new(Reason::BadSlotTable, "slot 3: overlaps slot 4");
            let error = error.with("slot", 3).with("change", change);
            let failure = Failure::api("make 2 changes of slots of vms/web", error);
            at_its_line(failure, "f", &[3, 7]).render()
        };
        let text = refused("1");
        assert!(
            text.contains(": f, line 7: slot 3: overlaps slot 4\n"),
            "{text}"
        );
        assert!(text.contains("detail: line=7 slot=3\n"), "{text}");
        assert_eq!([how_many(1), how_many(2)], ["1 change", "2 changes"]);
        for beyond in ["2", "x"] {
            let text = refused(beyond);
            assert!(text.contains(": slot 3: overlaps"), "{text}");
        }
    }

    #[test]
    fn a_line_that_cannot_be_read_is_named() {
        for (text, words) in [
            ("", "f: no change in it"),
            ("# nothing\n\n", "f: no change in it"),
            (
                "delete-slot --slot 1\nremove 3",
                "f, line 2: unrecognized subcommand 'remove'",
            ),
            (
                "delete-slot",
                "f, line 1: the following required arguments were not provided: --slot",
            ),
            (
                "delete-slot --slot x",
                "f, line 1: invalid value 'x' for '--slot <SLOT>'",
            ),
            (
                "\n\nmove-slot --slot 1 --base 5KiB",
                "f, line 3: --base 0x1400 is not a whole number",
            ),
            (
                "set-slot --slot 1 --access none",
                "f, line 1: invalid value 'none'",
            ),
            ("--help", "f, line 1: unexpected argument '--help' found"),
        ] {
            let failure = changes("f", text).unwrap_err();
            assert_eq!(failure.exit_code(), 2);
            let Failure::Usage(said) = &failure else {
                panic!("{text}: {failure:?}");
            };
            assert!(said.starts_with(words), "{text}: {said}");
        }
    }
}
