//! Output on stdout: tables for people, JSON for programs.

use std::io::{IsTerminal, Write};

use serde::Serialize;

use super::args::Output;
use super::human;
use crate::api::types::State;
use base::fault::Fault;

/// Writes to stdout. If the reader has closed the pipe (`| head`), the command ends without an
/// error, as every Unix filter does.
pub(crate) fn emit(text: &str) -> Result<(), Fault> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(|e| Fault::io("write to stdout", &e)),
    }
}

/// Writes a line to stderr. A reader that has closed stderr does not change the result of a
/// command, so an error is ignored (`eprintln!` would end the process with a panic).
pub(super) fn note(line: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(line.as_bytes());
    let _ = stderr.write_all(b"\n");
}

/// Prints a list: a table, a JSON array, or a line per item.
pub(super) fn rows<T: Serialize>(
    format: Output,
    rows: &[T],
    table: impl FnOnce(&[T]) -> String,
) -> Result<(), Fault> {
    match format {
        Output::Table => emit(&table(rows)),
        Output::Json => emit(&pretty(&rows)?),
        Output::Ndjson => rows.iter().try_for_each(|row| emit(&line(row)?)),
    }
}

/// Prints one value.
pub(super) fn one<T: Serialize>(
    format: Output,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Fault> {
    match format {
        Output::Table => emit(&text(value)),
        Output::Json => emit(&pretty(value)?),
        Output::Ndjson => emit(&line(value)?),
    }
}

/// One JSON object on one line.
pub(super) fn line<T: Serialize>(value: &T) -> Result<String, Fault> {
    serde_json::to_string(value)
        .map(|text| text + "\n")
        .map_err(|e| Fault::internal(format!("cannot print as JSON: {e}")))
}

fn pretty<T: Serialize>(value: &T) -> Result<String, Fault> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|e| Fault::internal(format!("cannot print as JSON: {e}")))
}

/// Whether to use colours: stdout is a terminal, and the environment allows them.
pub(super) fn colour() -> bool {
    std::io::stdout().is_terminal() && human::colour_wanted()
}

/// A cell: its text, and the terminal code of its colour.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    paint: Option<&'static str>,
}

impl<S: Into<String>> From<S> for Cell {
    fn from(text: S) -> Self {
        Cell {
            text: human::clean(&text.into()),
            paint: None,
        }
    }
}

impl Cell {
    /// A state in its colour. The colour only repeats what the word says.
    pub(super) fn state(state: State, stuck: bool) -> Self {
        let paint = match state {
            State::Done => Some("32"),
            State::Failed => Some("31"),
            State::Paused | State::Cancelled => Some("33"),
            State::Queued | State::Planning | State::Transferring | State::Committing => {
                stuck.then_some("33")
            }
        };
        Cell {
            text: state.as_str().into(),
            paint,
        }
    }
}

/// A table: each column is as wide as its widest cell, with two spaces between columns.
pub(crate) struct Table {
    head: &'static [&'static str],
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table with these column names; a column whose name begins with `>` is right-aligned.
    pub(crate) fn new(head: &'static [&'static str]) -> Self {
        Self {
            head,
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// The lines of the table, each with its line end.
    pub(crate) fn render(&self, colour: bool) -> String {
        let names: Vec<Cell> = self
            .head
            .iter()
            .map(|name| Cell::from(name.trim_start_matches('>')))
            .collect();
        let all = || std::iter::once(&names).chain(&self.rows);
        let widths: Vec<usize> = (0..names.len())
            .map(|i| {
                all()
                    .filter_map(|row| row.get(i))
                    .map(|c| c.text.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut out = String::new();
        for row in all() {
            let mut line = String::new();
            for (i, cell) in row.iter().enumerate().take(widths.len()) {
                let blanks = " ".repeat(widths[i] - cell.text.chars().count());
                let text = match cell.paint {
                    Some(code) if colour => format!("\u{1b}[{code}m{}\u{1b}[0m", cell.text),
                    _ => cell.text.clone(),
                };
                let right = self.head[i].starts_with('>');
                line.push_str(&if right {
                    blanks + &text
                } else {
                    text + &blanks
                });
                line.push_str("  ");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// Lines of `name  value`, with aligned values.
pub(super) fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs
        .iter()
        .map(|(name, _)| name.chars().count())
        .max()
        .unwrap_or(0);
    pairs
        .iter()
        .map(|(name, value)| format!("{name:width$}  {}\n", human::clean(value)))
        .collect()
}
