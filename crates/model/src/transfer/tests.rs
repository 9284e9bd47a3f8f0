//! Both ends of a transfer and a world between them: users act at any time, messages are lost,
//! repeated, late and out of order, tasks fail, and either end restarts from what it has stored.

use base::fault::{Code, Fault};
use content::chunk::Hash;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;

/// Histories that are tried, unless `PACKHORSE_HISTORIES` says how many.
const HISTORIES: u32 = 10_000;

fn new_row() -> TransferRow {
    TransferRow {
        id: "t-1".parse().unwrap(),
        delivery: "d-1".parse().unwrap(),
        artifact: "model/m:1".parse().unwrap(),
        digest: Hash([1; 32]),
        site: "chengdu".parse().unwrap(),
        want: Want::Run,
        generation: 0,
        state: State::Queued,
        body: Body::default(),
        created_ms: 0,
        updated_ms: 0,
        finished_ms: None,
        cursor: 0,
        after: Vec::new(),
        removed_ms: None,
    }
}

fn receipt(row: &TransferRow) -> Receipt {
    Receipt::sign(row, base::clock::now_ms(), b"certificate", |_| {
        Ok(b"signature".to_vec())
    })
    .unwrap()
}

/// A task of the site: its generation, how far it is, and whether it was told to stop.
#[derive(Debug)]
struct Task {
    generation: i64,
    state: State,
    stopped: bool,
}

#[derive(Debug)]
struct World {
    hub: TransferRow,
    site: Option<TransferRow>,
    /// What the hub wanted, on its way to the site.
    to_site: Vec<(Want, i64)>,
    /// What the site reported, on its way to the hub.
    to_hub: Vec<(i64, State, Body)>,
    /// Those that work in the staging folder.
    tasks: Vec<Task>,
    /// The generation whose task begins when the staging folder is free.
    next: Option<i64>,
    ending: Option<(i64, Want)>,
    /// Whether users see the artifact at the site.
    is_visible: bool,
    now: i64,
}

impl World {
    fn new() -> Self {
        let (to_site, to_hub, tasks) = Default::default();
        Self {
            hub: new_row(),
            site: None,
            to_site,
            to_hub,
            tasks,
            next: None,
            ending: None,
            is_visible: false,
            now: 0,
        }
    }

    fn at_hub(&mut self, event: Event) {
        self.now += 1;
        // What was late or never asked for is refused.
        let Ok(step) = step(&self.hub, event, self.now) else {
            return;
        };
        self.hub = step.row.unwrap_or_else(|| self.hub.clone());
        for effect in step.effects {
            assert_eq!(effect, Effect::SendList);
            self.to_site.push((self.hub.want, self.hub.generation));
        }
        self.check();
    }

    fn at_site(&mut self, event: Event) {
        self.now += 1;
        let Some(row) = &self.site else { return };
        let step =
            step(row, event, self.now).expect("the site does nothing that its own state forbids");
        if let Some(row) = step.row {
            self.site = Some(row);
        }
        for effect in step.effects {
            self.follow(effect);
        }
        self.check();
    }

    fn follow(&mut self, effect: Effect) {
        let Some(generation) = self.site.as_ref().map(|row| row.generation) else {
            return;
        };
        match effect {
            Effect::SendList => unreachable!("the site has nobody to tell"),
            Effect::Run
                if self
                    .tasks
                    .iter()
                    .any(|task| task.generation == generation && !task.stopped) => {}
            Effect::Run => {
                self.tasks.iter_mut().for_each(|task| task.stopped = true);
                self.next = Some(generation);
            }
            Effect::End(want) => {
                self.tasks.iter_mut().for_each(|task| task.stopped = true);
                (self.next, self.ending) = (None, Some((generation, want)));
            }
        }
        self.begin_when_free();
    }

    /// What waits for the end of a task.
    fn begin_when_free(&mut self) {
        if !self.tasks.is_empty() {
            return;
        }
        if let Some((generation, want)) = self.ending.take() {
            let is_cancelled =
                self.site.as_ref().and_then(TransferRow::due) == Some(Effect::End(Want::Cancel));
            let landed = self
                .site
                .as_ref()
                .is_some_and(|row| row.body.landed && row.generation == generation);
            if is_cancelled && landed && self.is_visible {
                // It was done before, and is still here.
                let row = self.site.clone().unwrap();
                let body = Body {
                    receipt: Some(receipt(&row)),
                    ..row.body
                };
                self.at_site(Event::Moved {
                    generation,
                    state: State::Done,
                    body,
                });
            } else {
                self.at_site(Event::Ended { generation, want });
            }
            // It was resumed meanwhile.
            if let Some(Effect::Run) = self.site.as_ref().and_then(TransferRow::due) {
                self.follow(Effect::Run);
            }
        }
        let is_due = self.site.as_ref().and_then(TransferRow::due) == Some(Effect::Run);
        if let (Some(generation), true) =
            (self.next.take().filter(|_| is_due), self.tasks.is_empty())
        {
            self.tasks.push(Task {
                generation,
                state: State::Queued,
                stopped: false,
            });
        }
    }

    fn take_wanted(&mut self, (want, generation): (Want, i64)) {
        let row = self.site.get_or_insert_with(new_row);
        if row.generation > generation {
            // The control stream is in order: what is older than the newest comes from a connection
            // that was replaced.
            return;
        }
        self.at_site(Event::Wanted {
            want,
            generation,
            after: Vec::new(),
        });
    }

    /// The task does its next piece of work; `fails`: it meets a fault that does not pass.
    fn work(&mut self, fails: bool) {
        let Some(task) = self.tasks.first_mut() else {
            return self.begin_when_free();
        };
        let generation = task.generation;
        // A commit that has begun is awaited.
        if task.stopped && task.state != State::Committing {
            self.tasks.clear();
            return self.begin_when_free();
        }
        let body = self.site.as_ref().unwrap().body.clone();
        if fails && task.state != State::Committing {
            self.tasks.clear();
            self.at_site(Event::Moved {
                generation,
                state: State::Failed,
                body,
            });
            return self.begin_when_free();
        }
        task.state = match task.state {
            State::Queued => State::Planning,
            State::Planning => State::Transferring,
            State::Transferring => State::Committing,
            _ => State::Done,
        };
        let state = task.state;
        let mut body = body;
        if state == State::Done {
            self.is_visible = true;
            body.receipt = Some(receipt(self.site.as_ref().unwrap()));
            self.tasks.clear();
        }
        self.at_site(Event::Moved {
            generation,
            state,
            body,
        });
        self.begin_when_free();
    }

    fn report(&mut self) {
        if let Some(row) = &self.site {
            self.to_hub
                .push((row.generation, row.state, row.body.clone()));
        }
    }

    fn take_report(&mut self, (generation, state, body): (i64, State, Body)) {
        self.at_hub(Event::Reported {
            generation,
            state,
            body,
        });
    }

    fn restart_site(&mut self) {
        self.tasks.clear();
        (self.next, self.ending) = (None, None);
        self.to_hub.clear();
        if let Some(effect) = self.site.as_ref().and_then(TransferRow::due) {
            self.follow(effect);
        }
    }

    /// One move of the world. `pick` chooses among messages.
    fn turn(&mut self, what: u8, pick: u8) {
        let at = |list: usize| usize::from(pick) % list.max(1);
        let action = match pick % 4 {
            0 => Action::Pause,
            1 => Action::Resume,
            2 => Action::Cancel,
            _ => Action::Retry,
        };
        match what % 12 {
            0 if self.hub.takes(action, false) => self.at_hub(Event::Asked(action)),
            1 => self.at_hub(Event::Delivered {
                lost: pick.is_multiple_of(2),
            }),
            2 => self.to_site.push((self.hub.want, self.hub.generation)),
            // Lost, taken, or taken and still on its way.
            3 if !self.to_site.is_empty() => drop(self.to_site.remove(at(self.to_site.len()))),
            4 if !self.to_site.is_empty() => {
                let message = self.to_site.remove(at(self.to_site.len()));
                self.take_wanted(message);
            }
            5 if !self.to_site.is_empty() => self.take_wanted(self.to_site[at(self.to_site.len())]),
            6 => self.report(),
            7 if !self.to_hub.is_empty() => {
                let message = self.to_hub.remove(at(self.to_hub.len()));
                if !pick.is_multiple_of(3) {
                    self.take_report(message);
                }
            }
            8 if !self.to_hub.is_empty() => {
                self.take_report(self.to_hub[at(self.to_hub.len())].clone());
            }
            9 => self.work(pick.is_multiple_of(8)),
            10 => self.work(false),
            11 if pick.is_multiple_of(4) => self.restart_site(),
            11 if pick % 4 == 1 => self.to_site.clear(),
            _ => {}
        }
    }

    fn check(&self) {
        assert!(
            self.tasks.len() <= 1,
            "two tasks use one staging folder: {:?}",
            self.tasks
        );
        for row in std::iter::once(&self.hub).chain(&self.site) {
            assert!(
                row.state != State::Done || row.body.receipt.is_some(),
                "done without a receipt"
            );
            assert_eq!(
                row.state.is_final(),
                row.finished_ms.is_some(),
                "{:?} at {:?}",
                row.state,
                row.finished_ms
            );
        }
        assert!(
            self.hub.state != State::Done || self.is_visible,
            "done, and nobody sees it"
        );
    }

    /// Lets everything come to its end: the network works, and nobody asks for anything.
    fn settle(&mut self) {
        (self.to_site, self.to_hub) = Default::default();
        for _ in 0..12 {
            self.take_wanted((self.hub.want, self.hub.generation));
            for _ in 0..8 {
                self.work(false);
            }
            self.report();
            self.to_hub
                .drain(..)
                .collect::<Vec<_>>()
                .into_iter()
                .for_each(|report| self.take_report(report));
        }
        let (hub, site) = (&self.hub, self.site.as_ref().unwrap());
        assert_eq!(
            hub.state, site.state,
            "both ends say the same: {hub:?} {site:?}"
        );
        match hub.want {
            Want::Pause => assert!(
                hub.state.is_final() || hub.state == State::Paused,
                "{hub:?}"
            ),
            _ => assert!(hub.state.is_final(), "{hub:?}"),
        }
        assert!(
            hub.state != State::Cancelled || !self.is_visible,
            "cancelled, and users see it"
        );
        assert!(self.tasks.is_empty() && self.next.is_none() && self.ending.is_none());
    }
}

#[test]
fn every_history_ends_and_both_ends_agree() {
    let cases = std::env::var("PACKHORSE_HISTORIES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(HISTORIES);
    let mut runner = TestRunner::new(Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    });
    let histories = proptest::collection::vec((any::<u8>(), any::<u8>()), 0..60);
    let tried = runner.run(&histories, |history| {
        let mut world = World::new();
        for (what, pick) in history {
            world.turn(what, pick);
        }
        world.settle();
        Ok(())
    });
    tried.unwrap();
}

#[test]
fn a_report_counts_only_for_its_own_generation() {
    let mut row = new_row();
    row.generation = 3;
    let report = |generation, state, body| Event::Reported {
        generation,
        state,
        body,
    };
    for never_asked in [-1, 4] {
        let fault = step(
            &row,
            report(never_asked, State::Planning, Body::default()),
            1,
        )
        .unwrap_err();
        assert_eq!(fault.code, Code::Integrity);
    }
    assert_eq!(
        step(&row, report(2, State::Failed, Body::default()), 1)
            .unwrap()
            .row,
        None,
        "a late one"
    );
    let fault: Fault = step(&row, report(3, State::Done, Body::default()), 1).unwrap_err();
    assert!(fault.message.contains("receipt"), "{fault}");
    let done = Body {
        receipt: Some(receipt(&row)),
        ..Body::default()
    };
    let after = step(&row, report(3, State::Done, done.clone()), 7)
        .unwrap()
        .row
        .unwrap();
    assert_eq!((after.state, after.finished_ms), (State::Done, Some(7)));
    assert_eq!(
        step(&after, report(3, State::Done, done), 8).unwrap().row,
        None,
        "said twice"
    );
    assert_eq!(
        step(&after, report(3, State::Transferring, Body::default()), 8)
            .unwrap()
            .row,
        None,
        "said before"
    );
}

#[test]
fn a_paused_transfer_stays_paused_until_the_site_has_received_the_request() {
    let ask = |row: &TransferRow, action| step(row, Event::Asked(action), 1).unwrap().row.unwrap();
    let paused = ask(&new_row(), Action::Pause);
    assert_eq!(
        (paused.state, paused.want, paused.body.reason),
        (State::Paused, Want::Pause, Some(Reason::PausedByUser))
    );
    let moving = Event::Reported {
        generation: 0,
        state: State::Transferring,
        body: Body::default(),
    };
    assert_eq!(step(&paused, moving, 2).unwrap().row, None);
    let resumed = ask(&paused, Action::Resume);
    assert_eq!(
        (resumed.state, resumed.want, resumed.body.reason),
        (State::Queued, Want::Run, None)
    );
    let cancelled = ask(&resumed, Action::Cancel);
    assert_eq!(
        (cancelled.state, cancelled.finished_ms),
        (State::Cancelled, Some(1))
    );
    // A repeated request gets the same answer; one that is paused is resumed, not tried again.
    assert!(resumed.takes(Action::Retry, false) && !paused.takes(Action::Retry, false));
    let open = step(&resumed, Event::Asked(Action::Retry), 3).unwrap();
    assert_eq!((open.row, open.effects.len()), (None, 0));
    let again = ask(&cancelled, Action::Retry);
    assert_eq!(
        (again.state, again.generation, again.finished_ms),
        (State::Queued, 1, None)
    );
}

#[test]
fn a_newer_generation_starts_only_what_has_ended() {
    let want = |row: &TransferRow, want, generation| {
        step(
            row,
            Event::Wanted {
                want,
                generation,
                after: Vec::new(),
            },
            1,
        )
        .unwrap()
    };
    let mut row = new_row();
    row.state = State::Transferring;
    let next = want(&row, Want::Run, 1);
    let after = next.row.unwrap();
    assert_eq!(
        (after.state, after.generation, next.effects),
        (State::Transferring, 1, vec![Effect::Run]),
        "what runs goes on"
    );
    row.state = State::Failed;
    let after = want(&row, Want::Run, 1).row.unwrap();
    assert_eq!((after.state, after.generation), (State::Queued, 1));
    let cancel = want(&row, Want::Cancel, 0);
    assert_eq!(
        cancel.effects,
        [Effect::End(Want::Cancel)],
        "what a failed transfer staged is removed"
    );
    row.state = State::Done;
    assert_eq!(
        want(&row, Want::Cancel, 0).effects,
        [],
        "what is done cannot be cancelled"
    );
}

#[test]
fn only_an_ended_transfer_is_marked_as_removed() {
    let removed = |row: &TransferRow, at_ms| step(row, Event::Removed { at_ms }, 9).unwrap();
    let nothing = Step {
        row: None,
        effects: Vec::new(),
    };
    let mut row = new_row();
    for state in [
        State::Queued,
        State::Planning,
        State::Transferring,
        State::Committing,
        State::Paused,
    ] {
        row.state = state;
        assert_eq!(removed(&row, 7), nothing, "{state:?}");
    }
    row.state = State::Done;
    let step = removed(&row, 7);
    let marked = step.row.unwrap();
    assert_eq!((marked.removed_ms, &step.effects[..]), (Some(7), &[][..]));
    row.removed_ms = Some(7);
    assert_eq!(row, marked, "nothing else changes");
    assert_eq!(removed(&marked, 8), nothing, "only once");
}
