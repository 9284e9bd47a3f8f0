//! The state machine of a transfer, for the hub and for the site.
//!
//! [`step`] is the only place that decides how a transfer changes: the catalogue reads a row,
//! passes it here in the same database transaction, and stores what comes back. Messages may be
//! lost, repeated, late or out of order: an event that does not apply any more changes nothing.
//!
//! ```text
//!                    ┌──────────── retry, a new delivery, a newer generation ───────────┐
//!                    ▼                                                                  │
//!   queued ─▶ planning ─▶ transferring ─▶ committing ─▶ done                            │
//!     │  ▲        │            │              │        failed ─────────────────────────▶┤
//!     ▼  │        ▼            ▼              ▼        cancelled ──────────────────────▶┘
//!    paused ◀─────┴────────────┴──────────────┘
//! ```

use base::fault::{Fault, Reason};
use base::names::TransferId;

use super::{Action, Body, State, TransferRow, Want};

/// Something that happens to a transfer.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// At the hub: a new delivery names the artifact and the site of this transfer. `lost`: the
    /// site is known to lack the delivered content.
    Delivered {
        /// Whether a done transfer starts again.
        lost: bool,
    },
    /// At the hub: a user requests an action.
    Asked(Action),
    /// At the hub: the site reports. The receipt of a report that says `done` was checked before.
    Reported {
        /// The reported generation.
        generation: i64,
        /// The state at the site.
        state: State,
        /// The other fields of the report.
        body: Body,
    },
    /// At the site: the hub's request. A transfer that is missing in the hub's complete list is
    /// cancelled.
    Wanted {
        /// The request.
        want: Want,
        /// The requested generation.
        generation: i64,
        /// The transfers that must be done first.
        after: Vec<TransferId>,
    },
    /// At the site: the hub wants another transfer of the same artifact, and no longer knows this
    /// one.
    Superseded {
        /// The transfer that the hub wants.
        by: TransferId,
    },
    /// At the site: the transfer's own task made progress.
    Moved {
        /// The generation of the task.
        generation: i64,
        /// The new state.
        state: State,
        /// The other fields.
        body: Body,
    },
    /// The site removed the delivered content after a run. A transfer that restarted in the meantime
    /// delivers it again and is not marked.
    Removed {
        /// When the site removed it.
        at_ms: i64,
    },
    /// At the site: the task of a transfer that pauses or is cancelled has ended, and its staged
    /// content is removed or recorded.
    Ended {
        /// The generation that was ended.
        generation: i64,
        /// The hub's request.
        want: Want,
    },
}

/// An effect besides storing the new row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// At the hub: send the site its complete list.
    SendList,
    /// At the site: a task of this generation runs. It starts when the task of an earlier
    /// generation has ended.
    Run,
    /// At the site: stop the task, wait for its end, clean up, and report [`Event::Ended`].
    End(Want),
}

/// The result of an event.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The new row; `None`: no change.
    pub row: Option<TransferRow>,
    /// The effects.
    pub effects: Vec<Effect>,
}

impl Step {
    fn nothing() -> Self {
        Self {
            row: None,
            effects: Vec::new(),
        }
    }

    fn to(row: TransferRow, effects: &[Effect]) -> Self {
        Self {
            row: Some(row),
            effects: effects.to_vec(),
        }
    }
}

/// The reason and the next step of a paused transfer.
fn held(id: &TransferId, reason: Reason, command: &str) -> Fault {
    Fault::internal("a user asked for this")
        .with_reason(reason)
        .with_next(format!("packhorse {command} {id}"))
}

fn paused(id: &TransferId) -> Fault {
    held(id, Reason::PausedByUser, "resume")
}

fn cancelled(id: &TransferId) -> Fault {
    held(id, Reason::CancelledByUser, "retry")
}

impl TransferRow {
    /// Whether an action applies now. `others_failed`: the action was requested for a delivery with
    /// other, failed transfers, and `retry` means those.
    pub fn takes(&self, action: Action, others_failed: bool) -> bool {
        match action {
            Action::Pause => !self.state.is_final(),
            Action::Resume => self.state == State::Paused || !self.state.is_final(),
            Action::Cancel => self.state != State::Done,
            Action::Retry if self.state == State::Done => {
                !others_failed && self.removed_ms.is_none()
            }
            // What is open is being tried: a repeated request gets the same answer.
            Action::Retry => self.state != State::Paused,
        }
    }

    /// The effect that the current row of a transfer requires at a site: queried after every
    /// [`Event::Wanted`], and for each open transfer at start.
    pub fn due(&self) -> Option<Effect> {
        match self.want {
            Want::Cancel if !matches!(self.state, State::Done | State::Cancelled) => {
                Some(Effect::End(Want::Cancel))
            }
            Want::Pause if !self.state.is_final() => Some(Effect::End(Want::Pause)),
            Want::Run if !self.state.is_final() => Some(Effect::Run),
            _ => None,
        }
    }

    fn at(mut self, state: State, now_ms: i64) -> Self {
        let before = self.finished_ms.filter(|_| self.state == state);
        self.state = state;
        self.updated_ms = now_ms;
        self.finished_ms = state.is_final().then(|| before.unwrap_or(now_ms));
        self
    }

    /// The transfer restarted for the next generation.
    fn again(mut self, now_ms: i64) -> Self {
        self.body = self.body.begun_again(self.state);
        self.generation += 1;
        self.want = Want::Run;
        self.at(State::Queued, now_ms)
    }
}

/// Applies an event to a transfer. An error is a fault of the sender of the event, and changes
/// nothing.
pub fn step(row: &TransferRow, event: Event, now_ms: i64) -> Result<Step, Fault> {
    match event {
        Event::Delivered { lost } => Ok(delivered(row, lost, now_ms)),
        Event::Asked(action) => Ok(asked(row, action, now_ms)),
        Event::Reported {
            generation,
            state,
            body,
        } => reported(row, generation, state, body, now_ms),
        Event::Wanted {
            want,
            generation,
            after,
        } => Ok(wanted(row, want, generation, after)),
        Event::Superseded { by } => Ok(superseded(row, &by, now_ms)),
        Event::Moved {
            generation,
            state,
            body,
        } => moved(row, generation, state, body, now_ms),
        Event::Removed { at_ms } => Ok(removed(row, at_ms)),
        Event::Ended { generation, want } => Ok(ended(row, generation, want, now_ms)),
    }
}

fn delivered(row: &TransferRow, lost: bool, now_ms: i64) -> Step {
    match row.state {
        State::Failed => Step::to(row.clone().again(now_ms), &[Effect::SendList]),
        State::Done if lost => Step::to(row.clone().again(now_ms), &[Effect::SendList]),
        _ => Step::nothing(),
    }
}

fn asked(row: &TransferRow, action: Action, now_ms: i64) -> Step {
    let mut row = row.clone();
    let (want, state, why) = match action {
        Action::Pause => (Want::Pause, State::Paused, Some(paused(&row.id))),
        Action::Cancel => (Want::Cancel, State::Cancelled, Some(cancelled(&row.id))),
        Action::Resume if row.state == State::Paused => (Want::Run, State::Queued, None),
        Action::Resume => (Want::Run, row.state, None),
        Action::Retry if !row.state.is_final() => return Step::nothing(),
        Action::Retry => {
            row = row.again(now_ms);
            (Want::Run, State::Queued, None)
        }
    };
    row.want = want;
    row.body.set_fault(why.as_ref());
    Step::to(row.at(state, now_ms), &[Effect::SendList])
}

fn reported(
    row: &TransferRow,
    generation: i64,
    state: State,
    body: Body,
    now_ms: i64,
) -> Result<Step, Fault> {
    if generation < 0 || generation > row.generation {
        let newest = row.generation;
        return Err(Fault::integrity(format!(
            "generation {generation} was never requested; the newest is {newest}"
        )));
    }
    if generation < row.generation {
        return Ok(Step::nothing());
    }
    if state == State::Done && row.state != State::Done && body.receipt.is_none() {
        return Err(Fault::integrity(format!(
            "the receipt for transfer {} is missing or malformed",
            row.id
        )));
    }
    let mut next = row.clone();
    match (row.state, state) {
        // The commit finished before the site received the cancellation: the version is active, and
        // both sides say so.
        (State::Cancelled, State::Done) => next.want = Want::Run,
        (State::Cancelled, State::Cancelled) if row.want == Want::Cancel => {
            // The site has cancelled it: nothing is requested any more.
            next.want = Want::Run;
            return Ok(Step::to(next, &[]));
        }
        (State::Cancelled, _) => return Ok(Step::nothing()),
        // A paused transfer stays paused until the site has received the new request.
        (State::Paused, state)
            if row.want == Want::Pause && state != State::Paused && !state.is_final() =>
        {
            return Ok(Step::nothing());
        }
        (State::Done, state) if state != State::Done => return Ok(Step::nothing()),
        _ => {}
    }
    next.body = body;
    if next.state == state && next.body == row.body && next.want == row.want {
        return Ok(Step::nothing());
    }
    Ok(Step::to(next.at(state, now_ms), &[]))
}

fn wanted(row: &TransferRow, want: Want, generation: i64, after: Vec<TransferId>) -> Step {
    let mut next = row.clone();
    // Only an ended transfer restarts: a running one continues for the newer generation.
    if generation > row.generation && row.state.is_final() {
        next.body = next.body.begun_again(row.state);
        // Content that was removed after a run is delivered again: content that exists in the
        // meantime does not belong to this transfer.
        next.body.landed &= row.removed_ms.is_none();
        (next.state, next.finished_ms, next.removed_ms) = (State::Queued, None, None);
    }
    (next.want, next.generation, next.after) = (want, generation, after);
    let effects: Vec<Effect> = next.due().into_iter().collect();
    Step {
        row: (next != *row).then_some(next),
        effects,
    }
}

fn superseded(row: &TransferRow, by: &TransferId, now_ms: i64) -> Step {
    if matches!(row.state, State::Done | State::Cancelled) {
        return Step::nothing();
    }
    let mut next = row.clone().at(State::Cancelled, now_ms);
    let why = Fault::internal(format!(
        "the hub requests {} with transfer {by}",
        row.artifact
    ))
    .with_reason(Reason::CancelledByUser)
    .with_next(format!("see 'packhorse status {by}'"));
    next.body.set_fault(Some(&why));
    Step::to(next, &[Effect::End(Want::Cancel)])
}

fn moved(
    row: &TransferRow,
    generation: i64,
    state: State,
    body: Body,
    now_ms: i64,
) -> Result<Step, Fault> {
    // A task whose transfer ended, or that a newer generation replaced, changes nothing. Its commit
    // also counts for the newer generation.
    let ended = matches!(row.state, State::Done | State::Cancelled) && row.state != state;
    let replaced = generation < row.generation && (state != State::Done || row.state.is_final());
    if replaced || ended || (row.state == state && row.body == body && row.generation == generation)
    {
        return Ok(Step::nothing());
    }
    if state == State::Done && row.state != State::Done && body.receipt.is_none() {
        return Err(Fault::internal(format!(
            "transfer {} cannot be done without a receipt",
            row.id
        )));
    }
    let mut next = row.clone();
    next.body = body;
    Ok(Step::to(next.at(state, now_ms), &[]))
}

fn removed(row: &TransferRow, at_ms: i64) -> Step {
    if !row.state.is_final() || row.removed_ms.is_some() {
        return Step::nothing();
    }
    let mut next = row.clone();
    next.removed_ms = Some(at_ms);
    Step::to(next, &[])
}

fn ended(row: &TransferRow, generation: i64, want: Want, now_ms: i64) -> Step {
    if row.generation != generation || row.want != want {
        return Step::nothing(); // another action was requested since
    }
    let (state, why) = match want {
        Want::Pause if row.state.is_final() || row.state == State::Paused => {
            return Step::nothing();
        }
        Want::Pause => (State::Paused, paused(&row.id)),
        Want::Run => return Step::nothing(),
        Want::Cancel if matches!(row.state, State::Done | State::Cancelled) => {
            return Step::nothing();
        }
        Want::Cancel => (State::Cancelled, cancelled(&row.id)),
    };
    let mut next = row.clone();
    next.body.set_fault(Some(&why));
    Step::to(next.at(state, now_ms), &[])
}
