//! The state of a waiting command: takes the answers about its transfers and returns lines to
//! print. No I/O, no clock.

use std::collections::BTreeMap;

use super::human;
use crate::api::types::{CURSOR_OF_HUB, State, Transfer};
use base::fault::{Code, Fault, Reason, Retry};
use base::limits::OFFENDERS_LISTED_MAX;

/// The transfers for which a command waits.
#[derive(Debug)]
pub(crate) struct Tracker {
    transfers: BTreeMap<String, Option<Transfer>>,
    /// Other transfers on which these depend, in their last known state.
    firsts: Vec<Transfer>,
    /// For each transfer, the state and reason of its last printed line.
    printed: BTreeMap<String, (bool, Option<Reason>)>,
}

impl Tracker {
    /// A tracker of these transfers.
    pub(crate) fn new(ids: &[String]) -> Self {
        Self {
            transfers: ids.iter().map(|id| (id.clone(), None)).collect(),
            firsts: Vec::new(),
            printed: BTreeMap::new(),
        }
    }

    /// Ids of the other transfers on which open transfers depend.
    pub(super) fn unknown_firsts(&self) -> Vec<String> {
        let open = self
            .transfers
            .values()
            .flatten()
            .filter(|t| !t.state.is_final());
        let mut ids: Vec<String> = open
            .filter_map(waited_for)
            .filter(|id| !self.transfers.contains_key(*id))
            .cloned()
            .collect();
        ids.sort();
        ids.dedup();
        ids
    }

    /// Replaces the known state of those other transfers.
    pub(super) fn set_firsts(&mut self, firsts: Vec<Transfer>) {
        self.firsts = firsts;
    }

    /// These transfers, and those on which they depend.
    fn all(&self) -> impl Iterator<Item = &Transfer> + Clone {
        self.transfers.values().flatten().chain(&self.firsts)
    }

    /// Takes an answer. Returns a line for the user if the transfer ended, or has a new reason to
    /// wait. A transfer that tries again for the same reason gives no line: the progress line names
    /// what waits.
    pub(crate) fn absorb(&mut self, transfer: Transfer) -> Option<String> {
        let known = self.transfers.get_mut(&transfer.id)?;
        let before = known.as_ref().map(|t| (t.state, t.reason));
        // An older answer can arrive after a newer one and is ignored. A site passes on the answers
        // of the hub until it has the transfer itself; hub and site count independently.
        let is_older = |t: &Transfer| {
            t.cursor & CURSOR_OF_HUB == transfer.cursor & CURSOR_OF_HUB
                && t.cursor > transfer.cursor
        };
        if known.as_ref().is_some_and(is_older) {
            return None;
        }
        let line = (before != Some((transfer.state, transfer.reason)))
            .then(|| notice(&transfer))
            .flatten();
        let now = (
            transfer.state.is_final() || transfer.state == State::Paused,
            transfer.reason,
        );
        let line = line.filter(|_| self.printed.insert(transfer.id.clone(), now) != Some(now));
        *known = Some(transfer);
        line
    }

    /// Ids of the transfers that have not ended or are unknown. Empty when nothing more happens
    /// without user action.
    pub(crate) fn open(&self) -> Vec<String> {
        if self.unseen().is_none()
            && self
                .transfers
                .values()
                .flatten()
                .all(|t| ended(t, self.all()))
        {
            return Vec::new();
        }
        let open = |t: &Option<Transfer>| t.as_ref().is_none_or(|t| !t.state.is_final());
        self.transfers
            .iter()
            .filter(|(_, t)| open(t))
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// An id about which the daemon has not answered.
    pub(super) fn unseen(&self) -> Option<&str> {
        self.transfers
            .iter()
            .find(|(_, t)| t.is_none())
            .map(|(id, _)| id.as_str())
    }

    /// All known transfers, in their last known state.
    pub(crate) fn seen(&self) -> Vec<Transfer> {
        self.transfers.values().flatten().cloned().collect()
    }

    /// Committed bytes and total bytes.
    pub(super) fn bytes(&self) -> (u64, u64) {
        self.transfers
            .values()
            .flatten()
            .fold((0, 0), |(done, total), t| {
                let part = if t.state == State::Done {
                    t.bytes.total
                } else {
                    t.bytes.committed.min(t.bytes.total)
                };
                (done + part, total + t.bytes.total)
            })
    }

    /// The progress of all transfers, on one line.
    pub(crate) fn summary(&self) -> String {
        let (done, total) = self.bytes();
        let seen = || self.transfers.values().flatten();
        let ended = seen().filter(|t| t.state.is_final()).count();
        let mut line = match human::share(done, total) {
            Some(percent) if ended < self.transfers.len() => {
                format!("{percent} % of {}", human::bytes(total))
            }
            _ => human::bytes(total),
        };
        line.push_str(&format!(", {ended} of {} ended", self.transfers.len()));
        let moving = || seen().filter(|t| !t.state.is_final());
        let rate = moving().fold(0u64, |sum, t| sum.saturating_add(t.rate));
        if rate > 0 {
            line.push_str(&format!(", {}", human::rate(rate)));
        }
        if let Some(eta) = moving().filter_map(|t| t.eta_seconds).max() {
            line.push_str(&format!(", {} to go", human::seconds(eta)));
        }
        let why = |t: &Transfer| {
            let reason = t.reason?.as_str();
            Some(first(t, self.all()).map_or_else(
                || reason.to_owned(),
                |first| format!("{reason}: {}", first.artifact),
            ))
        };
        let waiting: Vec<String> = moving()
            .filter_map(|t| Some(format!("{} ({})", t.site, why(t)?)))
            .collect();
        if !waiting.is_empty() {
            line.push_str(&format!("; waiting: {}", listed(&waiting)));
        }
        line
    }

    /// The result of the command: success, the fault of the only transfer, or `partial`.
    pub(crate) fn verdict(&self) -> Result<(), Fault> {
        let bad: Vec<&Transfer> = self
            .transfers
            .values()
            .flatten()
            .filter(|t| t.state != State::Done)
            .collect();
        match bad.as_slice() {
            [] => Ok(()),
            [only] if self.transfers.len() == 1 => Err(match failed_before(only, self.all()) {
                Some(first) => after_failed(only, first),
                None => fault_of(only),
            }),
            _ => {
                let waits = |t: &Transfer| failed_before(t, self.all());
                let how = |t: &Transfer| match waits(t) {
                    None => why(t).to_owned(),
                    Some(first) if self.transfers.contains_key(&first.id) => {
                        format!("waits for {}", first.artifact)
                    }
                    Some(first) => {
                        format!("waits for {}, which failed: {}", first.artifact, first.id)
                    }
                };
                // A failed transfer needs action and is listed before those that only wait for it.
                let (after, first): (Vec<&Transfer>, Vec<&Transfer>) =
                    bad.iter().copied().partition(|t| waits(t).is_some());
                let names: Vec<String> = first
                    .iter()
                    .chain(&after)
                    .map(|t| format!("{} at {} ({})", t.artifact, t.site, how(t)))
                    .collect();
                let message = format!(
                    "{} of {} transfers did not arrive: {}",
                    bad.len(),
                    self.transfers.len(),
                    listed(&names)
                );
                let mut next = "see 'packhorse status TRANSFER', fix the cause, then run 'packhorse retry TRANSFER'".to_owned();
                if !after.is_empty() {
                    next.push_str("; transfers that wait for it then continue");
                }
                Err(fault(Code::Partial, message, &next))
            }
        }
    }
}

/// Whether nothing more happens to this transfer without user action.
fn ended<'a>(transfer: &Transfer, among: impl Iterator<Item = &'a Transfer>) -> bool {
    transfer.state.is_final() || failed_before(transfer, among).is_some()
}

/// The id of what must be at the site before this transfer.
fn waited_for(waiting: &Transfer) -> Option<&String> {
    waiting
        .waits_for
        .as_ref()
        .filter(|_| waiting.reason == Some(Reason::WaitingForDependency))
}

/// The one of these that must be at the site before this transfer.
fn first<'a>(
    waiting: &Transfer,
    mut among: impl Iterator<Item = &'a Transfer>,
) -> Option<&'a Transfer> {
    let id = waited_for(waiting)?;
    among.find(|t| t.site == waiting.site && t.id == *id)
}

/// The same, if it failed. Nothing waits for a cancelled transfer.
fn failed_before<'a>(
    waiting: &Transfer,
    among: impl Iterator<Item = &'a Transfer>,
) -> Option<&'a Transfer> {
    first(waiting, among).filter(|t| t.state == State::Failed)
}

/// The first items, and the number of the others.
fn listed(items: &[String]) -> String {
    let shown = items
        .iter()
        .take(OFFENDERS_LISTED_MAX)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    match items.len().checked_sub(OFFENDERS_LISTED_MAX) {
        Some(more) if more > 0 => format!("{shown}, and {more} more"),
        _ => shown,
    }
}

fn why(transfer: &Transfer) -> &'static str {
    transfer
        .reason
        .map_or(transfer.state.as_str(), Reason::as_str)
}

/// The line for a transfer that ended or waits; `None` for one that progresses.
pub(super) fn notice(transfer: &Transfer) -> Option<String> {
    let (artifact, site) = (&transfer.artifact, &transfer.site);
    let detail = transfer
        .message
        .as_deref()
        .map(|m| format!(": {}", human::clean(m)))
        .unwrap_or_default();
    match (transfer.state, transfer.reason) {
        (State::Done, _) => Some(format!("{artifact} arrived at {site}{detail}")),
        (State::Failed | State::Cancelled, _) => Some(format!(
            "{artifact} to {site}: {} ({}){detail}",
            transfer.state.as_str(),
            why(transfer)
        )),
        (State::Paused, _) => Some(format!("{artifact} to {site} is paused{detail}")),
        (_, Some(Reason::WaitingForTurn) | None) => None,
        (_, Some(reason)) => Some(format!(
            "{artifact} to {site} waits ({}){detail}",
            reason.as_str()
        )),
    }
}

/// The fault of a command whose transfer cannot start because another transfer failed.
fn after_failed(transfer: &Transfer, first: &Transfer) -> Fault {
    let (artifact, site) = (&transfer.artifact, &transfer.site);
    let detail = first.message.as_deref().unwrap_or(why(first));
    let message = format!(
        "{artifact} did not arrive at {site}: it waits for {}, which failed ({}): {detail}",
        first.artifact,
        why(first)
    );
    fault(
        Code::Partial,
        message,
        &format!(
            "fix the cause, then run 'packhorse retry {}'; {artifact} then continues",
            first.id
        ),
    )
}

/// The fault of a command whose transfer did not arrive.
fn fault_of(transfer: &Transfer) -> Fault {
    let code = match transfer.reason {
        Some(Reason::NoSpace) => Code::NoSpace,
        Some(
            Reason::SinkUnavailable
            | Reason::HubUnreachable
            | Reason::SiteOffline
            | Reason::WaitingForSource,
        ) => Code::Unreachable,
        Some(Reason::SinkDenied) => Code::NotAllowed,
        Some(Reason::SinkRefused) => Code::Conflict,
        Some(Reason::Integrity) => Code::Integrity,
        Some(Reason::SourceGone) => Code::NotFound,
        Some(Reason::CancelledByUser | Reason::PausedByUser) => Code::Partial,
        Some(
            Reason::Internal
            | Reason::WindowClosed
            | Reason::WaitingForDependency
            | Reason::WaitingForTurn,
        ) => Code::Internal,
        None if transfer.state == State::Cancelled => Code::Partial,
        None => Code::Internal,
    };
    let detail = transfer.message.as_deref().unwrap_or(why(transfer));
    let message = format!(
        "{} did not arrive at {}: {detail}",
        transfer.artifact, transfer.site
    );
    let next = transfer
        .next
        .clone()
        .unwrap_or_else(|| format!("fix the cause, then run 'packhorse retry {}'", transfer.id));
    fault(code, message, &next)
}

fn fault(code: Code, message: String, next: &str) -> Fault {
    let mut fault = Fault::internal(message)
        .with_next(next)
        .with_retry(Retry::Never);
    fault.code = code;
    fault
}
