//! The documentation agrees with the program: its links, commands, options, exit codes, reasons and
//! configuration keys.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Arg, Command, CommandFactory as _, Parser as _};
use packhorse::cli::Args;

const FAULT: &str = include_str!("../../crates/base/src/fault.rs");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The page of this path, for example `docs/commands.md`.
fn page(path: &str) -> Page {
    Page::new(root().join(path), &read(path))
}

/// All pages.
fn pages() -> Vec<Page> {
    fn add(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                add(&path, out);
            } else if path.extension().is_some_and(|ext| ext == "md") {
                out.push(path);
            }
        }
    }
    let names = [
        "README.md",
        "README.zh-CN.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "BENCHMARKS.md",
    ];
    let mut paths: Vec<PathBuf> = names.iter().map(|name| root().join(name)).collect();
    add(&root().join("docs"), &mut paths);
    assert!(paths.len() > 15);
    paths
        .into_iter()
        .map(|path| Page::new(path.clone(), &std::fs::read_to_string(path).unwrap()))
        .collect()
}

/// One page, split into prose and the commands of its `sh` blocks.
struct Page {
    path: PathBuf,
    prose: Vec<String>,
    commands: Vec<String>,
}

impl Page {
    fn new(path: PathBuf, text: &str) -> Self {
        let (mut prose, mut commands) = (Vec::new(), Vec::new());
        let mut block: Option<&str> = None;
        for line in text.lines() {
            match (line.trim_start().strip_prefix("```"), block) {
                (Some(language), None) => block = Some(language),
                (Some(_), Some(_)) => block = None,
                (None, None) => prose.push(line.to_owned()),
                (None, Some("sh")) => commands.push(line.trim().to_owned()),
                (None, Some(_)) => {}
            }
        }
        assert!(
            block.is_none(),
            "{}: a code block has no end",
            path.display()
        );
        Self {
            path,
            prose,
            commands,
        }
    }

    /// The path, for messages.
    fn name(&self) -> String {
        self.path
            .strip_prefix(root())
            .unwrap_or(&self.path)
            .display()
            .to_string()
    }

    /// The targets of its links.
    fn links(&self) -> Vec<String> {
        let mut out = Vec::new();
        for line in &self.prose {
            // Without code spans, which can contain anything.
            let text: String = line.split('`').step_by(2).collect();
            for (at, open) in text.match_indices("](") {
                let target = text[at + open.len()..].split([')', ' ']).next().unwrap();
                out.push(target.to_owned());
            }
        }
        out
    }

    /// The headings of this level, each with the lines up to the next heading of this or a higher
    /// level.
    fn sections(&self, level: usize) -> Vec<(String, Vec<&str>)> {
        let mut out: Vec<(String, Vec<&str>)> = Vec::new();
        let mut open = false;
        for line in &self.prose {
            let hashes = line.bytes().take_while(|byte| *byte == b'#').count();
            match hashes {
                0 => {}
                found if found == level => {
                    out.push((line[level..].trim().to_owned(), Vec::new()));
                    open = true;
                    continue;
                }
                found if found < level => open = false,
                _ => {}
            }
            if let Some((_, lines)) = out.last_mut().filter(|_| open) {
                lines.push(line);
            }
        }
        out
    }

    fn section(&self, level: usize, heading: &str) -> Vec<&str> {
        let found = self
            .sections(level)
            .into_iter()
            .find(|(name, _)| name == heading);
        found
            .unwrap_or_else(|| panic!("{} has no section {heading:?}", self.name()))
            .1
    }

    /// The anchors of its headings: lower case, words joined by dashes, no punctuation.
    fn anchors(&self) -> BTreeSet<String> {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let mut out = BTreeSet::new();
        for line in self.prose.iter().filter(|line| line.starts_with('#')) {
            let heading = line.trim_start_matches('#').trim().to_lowercase();
            assert!(
                !heading.contains("]("),
                "{}: a heading has a link: {line}",
                self.name()
            );
            let kept = heading
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            let slug: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
            let count = seen.entry(slug.clone()).or_default();
            out.insert(if *count == 0 {
                slug
            } else {
                format!("{slug}-{count}")
            });
            *count += 1;
        }
        out
    }
}

/// The cells of a line of a table.
fn cells(line: &str) -> Option<Vec<&str>> {
    let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    Some(inner.split('|').map(str::trim).collect())
}

#[test]
fn every_link_and_anchor_exists() {
    let pages = pages();
    let anchors: BTreeMap<PathBuf, BTreeSet<String>> = pages
        .iter()
        .map(|page| (page.path.canonicalize().unwrap(), page.anchors()))
        .collect();
    let (mut bad, mut count) = (Vec::new(), 0);
    for page in &pages {
        for target in page
            .links()
            .into_iter()
            .filter(|target| !target.starts_with("http"))
        {
            count += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let path = if file.is_empty() {
                page.path.clone()
            } else {
                page.path.parent().unwrap().join(file)
            };
            let found = path.canonicalize();
            let has_anchor = |path: &PathBuf| {
                anchors
                    .get(path)
                    .is_some_and(|all: &BTreeSet<String>| all.contains(anchor))
            };
            if !found.is_ok_and(|path| anchor.is_empty() || has_anchor(&path)) {
                bad.push(format!("{}: {target}", page.name()));
            }
        }
    }
    assert!(bad.is_empty(), "links to nothing: {bad:#?}");
    assert!(count > 100, "only {count} links were found");
}

/// The words of a command line as a shell splits them, up to a redirection, a pipe or a comment.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), None::<String>);
    let mut quote = None;
    for c in line.chars() {
        match quote {
            Some(end) if c == end => quote = None,
            Some(_) => word.get_or_insert_default().push(c),
            None if c == '\'' || c == '"' => {
                word.get_or_insert_default();
                quote = Some(c);
            }
            None if c == ' ' => words.extend(word.take()),
            None if "|>&;#".contains(c) && word.is_none() => break,
            None => word.get_or_insert_default().push(c),
        }
    }
    assert!(quote.is_none(), "a quotation mark has no partner: {line}");
    words.extend(word);
    words
}

#[test]
fn a_command_line_is_split_like_in_a_shell() {
    assert_eq!(
        words("packhorse a 'b c' \"\" d='e f' > g"),
        ["packhorse", "a", "b c", "", "d=e f"]
    );
}

#[test]
fn every_command_of_the_documentation_parses() {
    let (mut bad, mut count) = (Vec::new(), 0);
    for page in pages() {
        for line in &page.commands {
            let line = line.strip_prefix("sudo -u packhorse ").unwrap_or(line);
            if !line.starts_with("packhorse ") {
                continue;
            }
            count += 1;
            match Args::try_parse_from(words(line)) {
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
                    ) => {}
                Err(error) => bad.push(format!("{}: {line}: {error}", page.name())),
            }
        }
    }
    assert!(bad.is_empty(), "commands that do not parse: {bad:#?}");
    assert!(count > 100, "only {count} commands were found");
}

/// Name and number of each exit code in the source.
fn exit_codes() -> Vec<(&'static str, &'static str)> {
    let body = FAULT
        .split_once("pub enum Code {")
        .unwrap()
        .1
        .split_once('}')
        .unwrap()
        .0;
    let codes: Vec<_> = body
        .lines()
        .filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "))
        .collect();
    assert!(codes.len() > 10, "{codes:?}");
    codes
}

/// The name of each reason in the source.
fn reasons() -> Vec<&'static str> {
    let arms = FAULT
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Reason::")?.split_once(" => \""));
    let reasons: Vec<&str> = arms.map(|(_, name)| name.trim_end_matches("\",")).collect();
    assert!(
        reasons.len() > 10 && reasons.contains(&"no_space"),
        "{reasons:?}"
    );
    reasons
}

#[test]
fn every_exit_code_is_explained() {
    let tables = [
        ("docs/troubleshooting.md", "Exit codes"),
        ("docs/zh-CN/troubleshooting.md", "退出码"),
        ("docs/commands.md", "Exit codes"),
    ];
    for (path, heading) in tables {
        let page = page(path);
        let rows: BTreeMap<&str, Vec<&str>> = page
            .section(2, heading)
            .into_iter()
            .filter_map(cells)
            .map(|cells| (cells[0], cells[1..].to_vec()))
            .collect();
        for (name, number) in exit_codes() {
            let row = rows
                .get(number)
                .unwrap_or_else(|| panic!("{path} does not explain exit code {number} ({name})"));
            assert!(
                row.len() >= 2 && row.iter().all(|cell| cell.chars().count() > 1),
                "{path}: {number}: {row:?}"
            );
        }
        let known: BTreeSet<&str> = exit_codes()
            .iter()
            .map(|(_, number)| *number)
            .chain(["0"])
            .collect();
        let unknown: Vec<&&str> = rows
            .keys()
            .filter(|cell| cell.parse::<u8>().is_ok() && !known.contains(*cell))
            .collect();
        assert!(
            unknown.is_empty(),
            "{path} explains exit codes that do not exist: {unknown:?}"
        );
    }
    let help = Args::command().get_after_help().unwrap().to_string();
    for (name, number) in exit_codes() {
        assert!(
            help.contains(&format!(" {number} ")),
            "the help does not list exit code {number} ({name})"
        );
    }
}

#[test]
fn every_reason_is_explained() {
    for path in ["docs/troubleshooting.md", "docs/zh-CN/troubleshooting.md"] {
        let page = page(path);
        let listed: Vec<String> = page
            .prose
            .iter()
            .filter_map(|line| Some(cells(line)?[0].to_owned()))
            .collect();
        for reason in reasons() {
            assert!(
                listed.contains(&format!("[`{reason}`](#{reason})")),
                "{path} does not list {reason}"
            );
            let text = page.section(3, reason).concat();
            assert!(
                text.chars().count() > 30,
                "{path} does not explain {reason}: {text:?}"
            );
        }
    }
}

/// The full name of each command that is not hidden and has no commands below it, with its
/// definition.
fn commands() -> Vec<(String, Command)> {
    fn add(of: &Command, name: &str, out: &mut Vec<(String, Command)>) {
        for command in of
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
        {
            let name = format!("{name} {}", command.get_name()).trim().to_owned();
            match command.has_subcommands() {
                true => add(command, &name, out),
                false => out.push((name, command.clone())),
            }
        }
    }
    let mut out = Vec::new();
    add(&Args::command(), "", &mut out);
    assert!(out.len() > 25);
    out
}

/// How a command line and the documentation write an argument.
fn written(arg: &Arg) -> String {
    match (arg.get_long(), arg.get_value_names()) {
        (Some(long), _) => format!("--{long}"),
        (None, Some(names)) => names[0].to_string(),
        (None, None) => arg.get_id().as_str().to_uppercase(),
    }
}

/// Whether a text contains this word, and not only as a part of a longer one.
fn mentions(text: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    text.match_indices(word).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + word.len()..]);
        !before.ends_with(part_of_word) && !after.starts_with(part_of_word)
    })
}

#[test]
fn every_command_and_option_is_documented() {
    let text = read("docs/commands.md");
    let page = page("docs/commands.md");
    let headings: Vec<String> = page
        .sections(2)
        .into_iter()
        .map(|(heading, _)| heading)
        .collect();
    let global: Vec<String> = Args::command()
        .get_arguments()
        .map(written)
        .chain(["--help".into(), "--version".into()])
        .collect();
    // With code blocks: the syntax of a command is in one.
    let section = |heading: &str| {
        let from = text
            .split_once(&format!("\n## {heading}\n"))
            .unwrap_or_else(|| panic!("docs/commands.md has no section {heading:?}"))
            .1;
        from.split("\n## ").next().unwrap()
    };
    let shared = section("Options of every command");
    for option in &global {
        assert!(
            mentions(shared, option),
            "docs/commands.md does not explain {option}"
        );
    }
    let mut documented = BTreeSet::new();
    for heading in &headings {
        let names: Vec<&str> = heading.split(", ").collect();
        let of: Vec<Command> = commands()
            .into_iter()
            .filter(|(name, _)| names.contains(&name.as_str()))
            .map(|(_, command)| command)
            .collect();
        let known: BTreeSet<String> = of
            .iter()
            .flat_map(|command| command.get_arguments().map(written))
            .chain(global.clone())
            .collect();
        if of.len() == names.len() {
            documented.extend(names.iter().map(|name| (*name).to_owned()));
            for arg in of
                .iter()
                .flat_map(|command| command.get_arguments().filter(|arg| !arg.is_hide_set()))
            {
                assert!(
                    mentions(section(heading), &written(arg)),
                    "docs/commands.md, {heading}: {} is missing",
                    written(arg)
                );
            }
        }
        let first_cells = section(heading)
            .lines()
            .filter_map(|line| Some(cells(line)?[0]));
        let options = first_cells
            .filter(|cell| cell.starts_with("`-"))
            .flat_map(|cell| cell.split([' ', '`', ',']));
        for option in options.filter(|word| word.starts_with("--")) {
            assert!(
                known.contains(option),
                "docs/commands.md, {heading}: there is no option {option}"
            );
        }
    }
    let missing: Vec<String> = commands()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !documented.contains(name))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/commands.md has no section for {missing:?}"
    );
    let configuration = read("docs/configuration.md");
    for (name, command) in commands() {
        for variable in command.get_arguments().filter_map(Arg::get_env) {
            let variable = variable.to_str().unwrap();
            assert!(
                mentions(&text, variable) && mentions(&configuration, variable),
                "{variable} of {name} is not documented"
            );
        }
    }
}

#[test]
fn every_configuration_key_is_documented() {
    let page = page("docs/configuration.md");
    let sections = page.sections(2);
    let mut count = 0;
    for path in ["config/hub.toml", "config/site.toml"] {
        // A block is a table with its comment, header and keys. Defaults and further keys are in
        // comments.
        for block in read(path).split("\n\n") {
            let lines = || {
                block
                    .lines()
                    .map(|line| line.trim_start_matches('#').trim())
            };
            let table = lines().find_map(|line| line.strip_prefix('[')?.strip_suffix(']'));
            // The user chooses the name of a registry.
            let heading = match table {
                None => "Top level".to_owned(),
                Some(table) if table.starts_with("registry.") => "`[registry.".to_owned(),
                Some(table) => format!("`[{table}]`"),
            };
            let key = |line: &str| {
                let (key, _) = line.split_once(" = ")?;
                let is_key = !key.is_empty()
                    && key
                        .bytes()
                        .all(|byte| byte.is_ascii_lowercase() || byte == b'_');
                is_key.then(|| key.to_owned())
            };
            for key in lines().filter_map(key) {
                let section = sections.iter().find(|(name, _)| name.contains(&heading));
                let (_, lines) = section
                    .unwrap_or_else(|| panic!("docs/configuration.md has no section {heading}"));
                let explained = lines
                    .iter()
                    .filter_map(|line| cells(line))
                    .any(|cells| cells[0] == format!("`{key}`"));
                assert!(
                    explained,
                    "docs/configuration.md does not explain {key} in {heading} ({path})"
                );
                count += 1;
            }
        }
    }
    assert!(count > 40, "only {count} keys were found");
}

#[test]
fn the_first_pages_are_short() {
    for path in ["README.md", "README.zh-CN.md", "ARCHITECTURE.md"] {
        let lines = read(path).lines().count();
        assert!(
            lines <= 150,
            "{path} has {lines} lines; at most 150 are allowed"
        );
    }
}
