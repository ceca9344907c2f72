//! `slat man`: manual pages, made from the command line's own description: slat(1) and one page for
//! each command, `slat-get-vms.1` and so on.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use crate::{failure::Failure, term::out};

const EXAMPLES: &str = "\
Examples:
  slat man --dir /usr/local/share/man/man1      then: man slat, man slat-migrate
  slat man --dir . && man ./slat-get-vms.1";

/// Options of `slat man`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ManArgs {
    /// Directory to write the pages into, as /usr/local/share/man/man1; it is made when missing
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

/// Writes the pages of `line`, the whole command line.
pub(crate) fn run(args: &ManArgs, line: clap::Command) -> Result<(), Failure> {
    let written = write(&args.dir, line).map_err(|error| {
        Failure::local(format!(
            "cannot write manual pages into {}: {error}",
            args.dir.display()
        ))
    })?;
    out::line(format!("{written} manual pages in {}", args.dir.display()))
}

fn write(dir: &Path, line: clap::Command) -> std::io::Result<usize> {
    std::fs::create_dir_all(dir)?;
    let mut line = line.disable_help_subcommand(true);
    line.build();
    pages(dir, &line, "slat")
}

/// The page of `command`, whose whole name is `name`, and those below it.
fn pages(dir: &Path, command: &clap::Command, name: &str) -> std::io::Result<usize> {
    let page = clap_mangen::Man::new(command.clone())
        .title(name)
        .source(format!("slat {}", crate::roles::VERSION));
    let mut text = Vec::new();
    page.render(&mut text)?;
    let mut file = std::fs::File::create(dir.join(format!("{name}.1")))?;
    file.write_all(&text)?;
    let mut written = 1;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        written += pages(dir, sub, &format!("{name}-{}", sub.get_name()))?;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn each_command_has_a_page_with_its_options_and_examples() {
        let dir = slat_test_dir::TestDir::new();
        let written = write(dir.path(), Cli::command()).unwrap();
        let page = |name: &str| {
            let text = std::fs::read_to_string(dir.path().join(format!("{name}.1"))).unwrap();
            text.replace("\\-", "-")
        };
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), written);
        assert!(page("slat").contains("slat-migrate"), "{}", page("slat"));
        assert!(page("slat-migrate").contains("--max-downtime"));
        assert!(page("slat-delete-vm").contains("--force"));
        assert!(page("slat-get-vms").contains("Examples:"));
        assert!(
            !dir.path().join("slat-vm.1").exists(),
            "agents run it, nobody else"
        );
    }
}
