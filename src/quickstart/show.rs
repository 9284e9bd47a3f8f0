//! The output of the quickstart: progress on stderr (progress bars on a terminal, otherwise one
//! line per event), results on stdout.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::Path;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::api::types::Transfer;
use crate::cli::human;

/// Prints progress. Cheap to clone.
#[derive(Clone)]
pub(super) struct Show {
    bars: Option<MultiProgress>,
}

impl Show {
    /// Uses progress bars if stderr is a terminal.
    pub(super) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        Self {
            bars: terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr())),
        }
    }

    /// Prints a line to stderr, above any progress bars.
    pub(super) fn say(&self, line: &str) {
        let line = human::clean(line);
        match &self.bars {
            Some(bars) => bars.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Prints the title of an act that starts.
    pub(super) fn act(&self, title: &str) {
        self.say("");
        self.say(&format!("== {title}"));
    }

    /// Bars for the transfers of one artifact.
    pub(super) fn bars(&self) -> Bars {
        Bars {
            show: self.clone(),
            bars: HashMap::new(),
        }
    }
}

/// The progress bars of the unfinished transfers.
pub(super) struct Bars {
    show: Show,
    bars: HashMap<String, ProgressBar>,
}

impl Bars {
    /// Shows the progress of a transfer.
    pub(super) fn update(&mut self, transfer: &Transfer) {
        let Some(all) = &self.show.bars else { return };
        if transfer.state.is_final() {
            if let Some(bar) = self.bars.remove(&transfer.id) {
                bar.finish_and_clear();
                all.remove(&bar);
            }
            return;
        }
        let bar = self.bars.entry(transfer.id.clone()).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(1));
            let style = ProgressStyle::with_template("   {prefix:26} [{bar:16}] {wide_msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.progress_chars("=> "));
            bar.set_prefix(format!("{} to {}", transfer.artifact, transfer.site));
            bar
        });
        bar.set_length(transfer.bytes.total.max(1));
        // The received bytes grow steadily. The committed bytes grow in large steps.
        let bytes = &transfer.bytes;
        bar.set_position(
            (bytes.reused + bytes.resumed + bytes.received)
                .max(bytes.committed)
                .min(bytes.total),
        );
        bar.set_message(format!(
            "{} {}",
            human::bytes(bytes.total),
            transfer.state.as_str()
        ));
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.bars.values().for_each(ProgressBar::finish_and_clear);
    }
}

/// The output line for a completed transfer. `unchanged`: an earlier run had already delivered it.
pub(super) fn arrived(transfer: &Transfer, unchanged: bool) -> String {
    let (artifact, site, bytes) = (&transfer.artifact, &transfer.site, &transfer.bytes);
    let (size, wire) = (human::bytes(bytes.total), human::bytes(bytes.wire));
    match unchanged {
        true => format!("   {artifact} is at {site}: {size}, {wire} transmitted in an earlier run"),
        false => format!("   {artifact} arrived at {site}: {size}, {wire} transmitted"),
    }
}

/// The name under which this program was called, for commands that the user can copy.
pub(super) fn program() -> String {
    std::env::args_os()
        .next()
        .map_or_else(|| "packhorse".to_owned(), |name| quoted(Path::new(&name)))
}

/// A path, quoted for a shell.
pub(super) fn quoted(path: &Path) -> String {
    quoted_text(&path.to_string_lossy())
}

/// A word, quoted for a shell.
pub(super) fn quoted_text(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-:=,+@".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_can_be_pasted_into_a_shell() {
        assert_eq!(quoted_text("/tmp/线体-1.toml"), "/tmp/线体-1.toml");
        assert_eq!(quoted_text("/tmp/a b's"), r"'/tmp/a b'\''s'");
    }
}
