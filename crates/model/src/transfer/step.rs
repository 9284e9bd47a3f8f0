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
    /// site is known to lack what arrived.
    Delivered {
        /// Whether a transfer that is done begins again.
        lost: bool,
    },
    /// At the hub: a user asks for something.
    Asked(Action),
    /// At the hub: the site reports. The receipt of a report that says `done` was checked before.
    Reported {
        /// The generation that the site speaks of.
        generation: i64,
        /// Where the transfer is at the site.
        state: State,
        /// The rest of the report.
        body: Body,
    },
    /// At the site: the hub says what it wants. A transfer that is missing in its complete list is
    /// to be cancelled.
    Wanted {
        /// What the hub asks for.
        want: Want,
        /// The generation that is asked for.
        generation: i64,
        /// The transfers that go first.
        after: Vec<TransferId>,
    },
    /// At the site: the hub wants another transfer of the same artifact, and no longer knows this
    /// one.
    Superseded {
        /// The transfer that the hub wants.
        by: TransferId,
    },
    /// At the site: the transfer's own task got somewhere.
    Moved {
        /// The generation that the task works for.
        generation: i64,
        /// Where it is now.
        state: State,
        /// The rest.
        body: Body,
    },
    /// At the site: the task of a transfer that is to pause or to be cancelled has ended, and what
    /// it staged is removed or noted.
    Ended {
        /// The generation that was ended.
        generation: i64,
        /// What the hub had asked for.
        want: Want,
    },
}

/// What is to be done besides storing the new row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// At the hub: send the site what is wanted now.
    TellSite,
    /// At the site: a task of this generation works on it. It begins when a task of an earlier
    /// generation has ended.
    Run,
    /// At the site: stop the task, wait for its end, clear up, and report [`Event::Ended`].
    End(Want),
}

/// What follows from an event.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The transfer as it is from now on; `None`: it does not change.
    pub row: Option<TransferRow>,
    /// What is to be done.
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

/// The reason and the next step of a transfer that a user holds.
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
    /// Whether an action makes sense now. `others_failed`: the action was asked for a delivery of
    /// which other transfers failed, and `retry` means those.
    pub fn takes(&self, action: Action, others_failed: bool) -> bool {
        match action {
            Action::Pause => !self.state.is_final(),
            Action::Resume => self.state == State::Paused || !self.state.is_final(),
            Action::Cancel => self.state != State::Done,
            Action::Retry if self.state == State::Done => {
                !others_failed && self.removed_ms.is_none()
            }
            Action::Retry => matches!(self.state, State::Failed | State::Cancelled),
        }
    }

    /// What a site has to do about a transfer as it stands: asked after every [`Event::Wanted`],
    /// and for each open transfer at start.
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

    /// The transfer from its beginning, for the next generation.
    fn again(mut self, now_ms: i64) -> Self {
        self.body = self.body.begun_again(self.state);
        self.generation += 1;
        self.want = Want::Run;
        self.at(State::Queued, now_ms)
    }
}

/// What an event does to a transfer. An error is the fault of whoever sent the event, and changes
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
        Event::Ended { generation, want } => Ok(ended(row, generation, want, now_ms)),
    }
}

fn delivered(row: &TransferRow, lost: bool, now_ms: i64) -> Step {
    match row.state {
        State::Failed => Step::to(row.clone().again(now_ms), &[Effect::TellSite]),
        State::Done if lost => Step::to(row.clone().again(now_ms), &[Effect::TellSite]),
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
        Action::Retry => {
            row = row.again(now_ms);
            (Want::Run, State::Queued, None)
        }
    };
    row.want = want;
    row.body.set_fault(why.as_ref());
    Step::to(row.at(state, now_ms), &[Effect::TellSite])
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
            "generation {generation} was never asked for; the newest is {newest}"
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
        // The commit was finished before the site learned of the cancel: the version is there, and
        // both ends say so.
        (State::Cancelled, State::Done) => next.want = Want::Run,
        (State::Cancelled, State::Cancelled) if row.want == Want::Cancel => {
            // The site has given it up: nothing is asked of it any more.
            next.want = Want::Run;
            return Ok(Step::to(next, &[]));
        }
        (State::Cancelled, _) => return Ok(Step::nothing()),
        // What a user holds stays so until the site has heard of it.
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
    // Only what has ended begins again: what runs goes on for the newer generation.
    if generation > row.generation && row.state.is_final() {
        next.body = next.body.begun_again(row.state);
        // What was removed after a run is brought again: what may lie there meanwhile is not this
        // transfer's own.
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
        "the hub asks for {} with transfer {by}",
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
    // A task whose transfer ended, or that a newer generation replaced, says nothing any more. What
    // it committed is there for the newer generation too.
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

fn ended(row: &TransferRow, generation: i64, want: Want, now_ms: i64) -> Step {
    if row.generation != generation || row.want != want {
        return Step::nothing(); // something else was asked for since
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
