//! `slat completion`: the shells' completion scripts, made from the command line's own description.

use clap_complete::generate;

use crate::{failure::Failure, term::out};

const EXAMPLES: &str = "\
Examples:
  slat completion bash > /etc/bash_completion.d/slat
  slat completion zsh > \"${fpath[1]}/_slat\"
  slat completion fish > ~/.config/fish/completions/slat.fish";

/// Shells there is a script for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Shell {
    /// GNU bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

/// Options of `slat completion`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the script for `line`, the whole command line.
pub(crate) fn run(args: &CompletionArgs, line: &mut clap::Command) -> Result<(), Failure> {
    out::line(script(args.shell, line).trim_end())
}

fn script(shell: Shell, line: &mut clap::Command) -> String {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    generate(shell, line, "slat", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn each_shell_learns_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell, &mut Cli::command());
            for word in ["migrate", "--max-downtime", "completion"] {
                assert!(
                    script.contains(word.trim_start_matches('-')),
                    "{shell:?} {word}"
                );
            }
        }
    }
}
