//! Generates the completion scripts for shells and the man pages from the definitions of the
//! command line.

use std::path::Path;

use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;
use serde_json::json;

use super::args::{Args, Global};
use super::output::{emit, one};
use crate::api::VERSION;
use base::durable;
use base::fault::{Fault, IoContext as _};

/// How the sections are called that are made from the text after a command's help.
const SECTIONS: [(&str, &str); 3] = [
    (".SH EXTRA\nExample:\n", ".SH EXAMPLE\n"),
    (".SH EXTRA\nExamples:\n", ".SH EXAMPLES\n"),
    ("\nExit codes: ", "\n.SH EXIT CODES\n"),
];

/// `completions`
pub(super) fn completions(shell: Shell) -> Result<(), Fault> {
    emit(&script(shell))
}

fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(
        shell,
        &mut without_hidden(&Args::command()),
        "packhorse",
        &mut script,
    );
    String::from_utf8_lossy(&script).into_owned()
}

/// The same command without hidden options and commands, which clap_complete would offer.
fn without_hidden(command: &Command) -> Command {
    let mut visible = Command::new(command.get_name().to_owned())
        .args(
            command
                .get_arguments()
                .filter(|arg| !arg.is_hide_set())
                .cloned(),
        )
        .subcommands(shown(command).map(without_hidden));
    if let Some(about) = command.get_about() {
        visible = visible.about(about.clone());
    }
    if let Some(version) = command.get_version() {
        visible = visible.version(version.to_owned());
    }
    visible
}

fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
}

/// `man`
pub(super) fn man(global: &Global, dir: &Path) -> Result<(), Fault> {
    let pages = pages()?;
    let not_there =
        |fault: Fault| fault.with_next("name a directory that you can write to: packhorse man DIR");
    durable::create_dir_all(dir).map_err(not_there)?;
    for page in &pages {
        durable::replace(&dir.join(&page.file), page.text.as_bytes()).map_err(not_there)?;
    }
    let files: Vec<&str> = pages.iter().map(|page| page.file.as_str()).collect();
    let answer = json!({"directory": dir.display().to_string(), "files": files});
    one(global.output, &answer, |_| {
        format!("{} man pages are in {}\n", files.len(), dir.display())
    })
}

/// One man page.
struct Page {
    file: String,
    text: String,
}

/// The man pages of the program and of each command that is not hidden.
fn pages() -> Result<Vec<Page>, Fault> {
    let mut program = Args::command().disable_help_subcommand(true);
    // Gives each command its full name and the options of every command.
    program.build();
    let mut pages = Vec::new();
    add_pages(&program, &mut pages)?;
    Ok(pages)
}

fn add_pages(command: &Command, pages: &mut Vec<Page>) -> Result<(), Fault> {
    let man = Man::new(command.clone())
        .source(format!("packhorse {VERSION}"))
        .manual("Packhorse");
    let mut text = Vec::new();
    man.render(&mut text).at("make a man page")?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let text = SECTIONS
        .iter()
        .fold(text, |text, (from, to)| text.replace(from, to));
    pages.push(Page {
        file: man.get_filename(),
        text,
    });
    shown(command).try_for_each(|command| add_pages(command, pages))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{Parser as _, ValueEnum as _};

    use super::*;

    /// The full name of each command that is not hidden, with its definition.
    fn all(of: &Command, name: &str, out: &mut Vec<(String, Command)>) {
        for command in shown(of) {
            let name = format!("{name} {}", command.get_name());
            all(command, &name, out);
            out.push((name, command.clone()));
        }
    }

    fn commands() -> Vec<(String, Command)> {
        let mut out = Vec::new();
        all(&Args::command(), "packhorse", &mut out);
        out
    }

    #[test]
    fn the_help_of_every_command_has_an_example_that_parses() {
        for (name, command) in commands() {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.starts_with("Example:\n") || help.starts_with("Examples:\n"),
                "{name}: {help}"
            );
            let examples: Vec<&str> = help.lines().skip(1).map(str::trim).collect();
            assert!(
                !examples.is_empty() && (examples.len() > 1) == help.starts_with("Examples"),
                "{name}: {help}"
            );
            for example in examples {
                assert!(example.starts_with(&name), "{name}: {example}");
                let words = example.split_whitespace().take_while(|word| *word != ">");
                let parsed = Args::try_parse_from(words);
                assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
            }
        }
    }

    #[test]
    fn every_shell_completes_what_is_shown_and_nothing_hidden() {
        for shell in Shell::value_variants() {
            let script = script(*shell);
            for word in ["rebuild-index", "password-file", "completions"] {
                assert!(script.contains(word), "{shell} does not complete {word}");
            }
            for word in ["sample-trainer", "until-stdin-ends"] {
                assert!(!script.contains(word), "{shell} completes {word}");
            }
        }
    }

    #[test]
    fn every_command_has_a_man_page() {
        let pages = pages().unwrap();
        let files: BTreeSet<String> = pages.iter().map(|page| page.file.clone()).collect();
        let expected = commands()
            .into_iter()
            .map(|(name, _)| format!("{}.1", name.replace(' ', "-")))
            .chain(["packhorse.1".into()]);
        assert_eq!(files, expected.collect());
        let page = |file: &str| &pages.iter().find(|page| page.file == file).unwrap().text;
        let publish = page("packhorse-publish.1");
        for text in [
            "packhorse\\-publish \\- Publish an artifact",
            "PACKHORSE_JOIN_TOKEN",
            ".SH EXAMPLES\n  packhorse publish",
            "\\-\\-config",
        ] {
            assert!(publish.contains(text), "{text} is not in\n{publish}");
        }
        assert!(
            page("packhorse.1").contains(".SH EXIT CODES\n0 done"),
            "{}",
            page("packhorse.1")
        );
        for Page { file, text } in &pages {
            assert!(
                !text.contains("EXTRA") && !text.contains("sample-trainer") && text.is_ascii(),
                "{file}\n{text}"
            );
        }
    }
}
