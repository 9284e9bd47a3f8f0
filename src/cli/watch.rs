//! `status --watch`: redraws the table on a terminal, and elsewhere prints a line, or with JSON an
//! object, for each change.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

use tokio::time::Instant;

use super::args::Output;
use super::client::Client;
use super::follow::{Deadline, Progress, look_at_firsts, patiently};
use super::tracker::Tracker;
use super::{human, output, status};
use crate::api::types::{State, Transfer, TransferQuery};
use base::fault::{Fault, Reason};
use base::limits::PROGRESS_LINE_EVERY;

/// `status --watch` waits for its daemon without limit.
const AWAY_MAX: Duration = Duration::MAX;
/// The shortest time between two redraws.
const REDRAW_EVERY: Duration = Duration::from_millis(200);
/// The longest time between two redraws: rates and times change although nothing else does.
const WAIT: Duration = Duration::from_secs(10);
/// How many ended transfers are kept; open transfers are always kept.
const ENDED_KEPT_MAX: usize = 1_000;

/// Shows changes. Returns when nothing more happens to the transfers of `query` without user
/// action; never if it names no transfer.
pub(super) async fn run(
    client: &Client,
    format: Output,
    query: TransferQuery,
) -> Result<(), Fault> {
    // Shows no progress; only reports when the daemon does not answer.
    let progress = Progress::new();
    let deadline = Deadline::after(None);
    let mut screen = Screen::new(format);
    let mut known: HashMap<String, Transfer> = HashMap::new();
    let mut next = query.clone();
    loop {
        let (changed, cursor) =
            patiently(&progress, deadline, AWAY_MAX, || client.transfers(&next)).await?;
        if next.since.is_none() && query.id.is_some() && changed.is_empty() {
            return Err(no_transfer(query.id.as_deref()));
        }
        for transfer in &changed {
            known.insert(transfer.id.clone(), transfer.clone());
        }
        forget(&mut known);
        // An answer lists the newest first; lines are printed in order of time.
        let mut in_order = changed;
        in_order.sort_by_key(|t| t.cursor);
        screen.show(&in_order, &known)?;
        if query.id.is_some() && !known.is_empty() {
            let mut tracker = Tracker::new(&known.keys().cloned().collect::<Vec<_>>());
            for transfer in known.values() {
                let _ = tracker.absorb(transfer.clone());
            }
            look_at_firsts(client, &mut tracker).await;
            if tracker.open().is_empty() {
                return tracker.verdict();
            }
        }
        next = TransferQuery {
            since: Some(cursor),
            wait: Some(WAIT.as_secs()),
            ..query.clone()
        };
        tokio::time::sleep(REDRAW_EVERY).await;
    }
}

/// The fault of `status` with an unknown id.
pub(super) fn no_transfer(id: Option<&str>) -> Fault {
    Fault::not_found(format!("there is no transfer {:?}", id.unwrap_or_default()))
        .with_next("'packhorse status' lists the transfers")
}

/// Limits memory: the command can run for weeks while transfers end.
fn forget(known: &mut HashMap<String, Transfer>) {
    let mut ended: Vec<(u64, String)> = known
        .values()
        .filter(|t| t.state.is_final())
        .map(|t| (t.cursor, t.id.clone()))
        .collect();
    if ended.len() > ENDED_KEPT_MAX {
        ended.sort();
        for (_, id) in ended.iter().take(ended.len() - ENDED_KEPT_MAX) {
            known.remove(id);
        }
    }
}

struct Screen {
    format: Output,
    terminal: bool,
    drawn: usize,
    said: HashMap<String, (State, Option<Reason>, Instant)>,
}

impl Screen {
    fn new(format: Output) -> Self {
        let terminal = format == Output::Table && std::io::stdout().is_terminal();
        Self {
            format,
            terminal,
            drawn: 0,
            said: HashMap::new(),
        }
    }

    fn show(
        &mut self,
        changed: &[Transfer],
        known: &HashMap<String, Transfer>,
    ) -> Result<(), Fault> {
        if self.terminal {
            return self.redraw(known);
        }
        let mut out = String::new();
        for transfer in changed {
            if self.format != Output::Table {
                out.push_str(&output::line(transfer)?);
            } else if self.is_worth_printing(transfer) {
                out.push_str(&change_line(transfer));
            }
        }
        self.said.retain(|id, _| known.contains_key(id));
        output::emit(&out)
    }

    /// Whether to print a line: at each change of state or reason; for progress alone, once per
    /// interval.
    fn is_worth_printing(&mut self, t: &Transfer) -> bool {
        let now = Instant::now();
        match self.said.get(&t.id) {
            Some((state, reason, at))
                if (*state, *reason) == (t.state, t.reason) && now < *at + PROGRESS_LINE_EVERY =>
            {
                false
            }
            _ => {
                self.said.insert(t.id.clone(), (t.state, t.reason, now));
                true
            }
        }
    }

    fn redraw(&mut self, known: &HashMap<String, Transfer>) -> Result<(), Fault> {
        let (width, height) = size();
        let mut all: Vec<Transfer> = known.values().cloned().collect();
        // Open transfers first, then the newest.
        all.sort_by_key(|t| (t.state.is_final(), std::cmp::Reverse(t.cursor)));
        let room = height.saturating_sub(3).max(1);
        let hidden = all.len().saturating_sub(room);
        all.truncate(room);
        // The cursor moves up over the previous table, so that the text above it stays.
        let mut out = if self.drawn > 0 {
            format!("\u{1b}[{}A\u{1b}[J", self.drawn)
        } else {
            String::new()
        };
        // Without colours: their codes would count when a line is cut to the width of the screen.
        let mut picture = if all.is_empty() {
            "no transfers\n".to_owned()
        } else {
            status::rows(&all, false)
        };
        if hidden > 0 {
            let _ = writeln!(picture, "and {hidden} more");
        }
        self.drawn = picture.lines().count();
        for line in picture.lines() {
            out.extend(line.chars().take(width));
            out.push('\n');
        }
        output::emit(&out)
    }
}

fn change_line(t: &Transfer) -> String {
    let percent = human::percent(t)
        .map(|p| format!(" {p} % of {}", human::bytes(t.bytes.total)))
        .unwrap_or_default();
    let rate = if t.rate > 0 {
        format!(" {}", human::rate(t.rate))
    } else {
        String::new()
    };
    let reason = t
        .reason
        .map(|r| format!(" ({})", r.as_str()))
        .unwrap_or_default();
    let message = t
        .message
        .as_deref()
        .map(|m| format!(": {}", human::clean(m)))
        .unwrap_or_default();
    let (at, id, artifact, site, state) = (
        human::local(&t.updated_at),
        &t.id,
        &t.artifact,
        &t.site,
        t.state.as_str(),
    );
    format!("{at} {id} {artifact} {site} {state}{reason}{percent}{rate}{message}\n")
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
            (usize::from(size.ws_col), usize::from(size.ws_row))
        }
        _ => (80, 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fake::{offline, transfer};

    #[test]
    fn one_line_for_each_change_and_none_for_each_byte() {
        let mut screen = Screen {
            format: Output::Table,
            terminal: false,
            drawn: 0,
            said: HashMap::new(),
        };
        let mut t = transfer("t1", "chengdu", State::Transferring);
        assert!(screen.is_worth_printing(&t));
        t.bytes.committed = 500;
        assert!(!screen.is_worth_printing(&t));
        t.state = State::Committing;
        assert!(screen.is_worth_printing(&t));
        let line = change_line(&offline("t2", "xian"));
        assert!(line.ends_with(" t2 dataset/line3:v1 xian queued (site_offline) 0 % of 1000 B: site xian is not connected\n"), "{line}");
    }

    #[test]
    fn what_has_ended_is_forgotten_in_the_end() {
        let mut known = HashMap::new();
        for i in 0..=ENDED_KEPT_MAX as u64 {
            let id = format!("t{i}");
            known.insert(
                id.clone(),
                Transfer {
                    cursor: i,
                    ..transfer(&id, "chengdu", State::Done)
                },
            );
        }
        known.insert("open".into(), transfer("open", "chengdu", State::Queued));
        forget(&mut known);
        assert_eq!(known.len(), ENDED_KEPT_MAX + 1);
        assert!(known.contains_key("open") && !known.contains_key("t0"));
    }
}
