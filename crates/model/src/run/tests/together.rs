//! Both machines, and a world that does what they ask; messages are lost and repeated, and either
//! side may at any moment begin anew from what it has written.

use proptest::prelude::*;

use super::*;
use crate::run::RunState;

struct World {
    hub: HubRun,
    site: Option<SiteRun>,
    delivered: bool,
    input: State,
    home: Option<State>,
    process: Process,
    removed: bool,
    exit: i32,
    cancelled: bool,
    /// The site's catalogue still lists an input that its disk has lost.
    stale: bool,
    /// The first removal fails.
    stuck: bool,
    /// The inputs themselves were looked at since the last look.
    checked: bool,
}

impl World {
    fn hub_event(&mut self, event: HubEvent) {
        let Ok((run, effects)) = hub::step(&self.hub, event, 1) else {
            return;
        };
        self.hub = run;
        for effect in effects {
            match effect {
                HubEffect::Borrow => self.delivered = true,
                HubEffect::SendHome => self.home = Some(self.home.unwrap_or(State::Queued)),
                HubEffect::Abandon => {
                    if self.input != State::Done {
                        self.input = State::Cancelled;
                    }
                    self.home = self.home.map(|home| {
                        if home == State::Done {
                            home
                        } else {
                            State::Cancelled
                        }
                    });
                }
            }
        }
    }

    fn site_event(&mut self, event: Event) {
        let Some(run) = &self.site else { return };
        let (run, effects) = site::step(run, event, 1);
        self.site = Some(run);
        for effect in effects {
            match effect {
                Effect::Check => self.checked = true,
                Effect::Start => {
                    assert_eq!(self.input, State::Done, "nothing trains without its data");
                    assert!(!self.removed, "nor with data that is gone");
                    self.process = Process::Running;
                }
                Effect::Stop => {
                    self.process = Process::Ended(Ended {
                        exit_code: None,
                        signal: Some(15),
                        ..ended(0)
                    });
                }
                Effect::Publish => {
                    self.hub_event(HubEvent::Published(model()));
                    if self.hub.model.is_some() {
                        self.site_event(Event::Published(model()));
                    }
                }
                Effect::Remove(list) => {
                    assert_ne!(
                        self.process,
                        Process::Running,
                        "nothing is taken from under a trainer"
                    );
                    if std::mem::take(&mut self.stuck) {
                        for b in list {
                            self.site_event(Event::NotRemoved {
                                transfer: b.transfer,
                                why: "it is held".into(),
                            });
                        }
                    } else if matches!(self.input, State::Done | State::Cancelled) {
                        self.removed = true;
                        list.into_iter().for_each(|b| {
                            self.site_event(Event::Removed {
                                transfer: b.transfer,
                                stays: None,
                            });
                        });
                    }
                }
            }
        }
    }

    fn turn(&mut self, what: u8) {
        match what % 9 {
            0 => {
                let home = self.home.map(|state| input(state, None));
                self.hub_event(HubEvent::Looked {
                    delivered: self.delivered,
                    inputs: vec![input(self.input, None)],
                    home,
                });
            }
            1 if self.delivered && self.input == State::Queued => self.input = State::Done,
            2 if self.home == Some(State::Queued) => self.home = Some(State::Done),
            3 => {
                let (model, ready) = (self.hub.model.clone(), self.hub.is_ready());
                let wanted = DesiredRun {
                    want: self.hub.want(),
                    model,
                    ready,
                    ..desired(Want::Train)
                };
                if self.site.is_none() {
                    self.site = Some(SiteRun::new(wanted.clone()));
                }
                self.site_event(Event::Wanted(Box::new(wanted)));
            }
            4 => {
                if let Some(site) = &self.site {
                    self.hub_event(HubEvent::Reported(Box::new(site.report())));
                }
            }
            5 | 6 => {
                let missing =
                    (self.input != State::Done && !self.stale).then(|| "dataset/x:1".to_owned());
                let process = self.process.clone();
                let checked = std::mem::take(&mut self.checked);
                self.site_event(Event::Looked(Observation {
                    missing,
                    checked,
                    ..seen(process)
                }));
            }
            7 if self.process == Process::Running => {
                self.process = Process::Ended(ended(self.exit));
            }
            8 if self.cancelled => self.hub_event(HubEvent::Cancel),
            _ => {}
        }
    }
}

proptest! {
    #[test]
    fn every_run_ends_and_its_inputs_are_removed(
        turns in proptest::collection::vec(any::<u8>(), 0..60),
        exit in 0..2i32,
        [cancelled, stale, stuck] in any::<[bool; 3]>(),
    ) {
        let mut world = World {
            hub: HubRun::new(spec()),
            site: None,
            delivered: false,
            input: State::Queued,
            home: None,
            process: Process::Absent,
            removed: false,
            exit,
            cancelled,
            stale,
            stuck,
            checked: false,
        };
        turns.into_iter().for_each(|what| world.turn(what));
        // From wherever that led: when everything works again, it ends.
        for round in 0..40u8 {
            (0..8).for_each(|what| world.turn(what));
            if !world.hub.is_open() {
                break;
            }
            prop_assert!(round < 39, "{:?} {:?}", world.hub, world.site);
        }
        prop_assert!(world.removed && world.site.as_ref().is_some_and(|site| site.released && site.left.is_empty()));
        let wanted = match (exit, cancelled) {
            (0, false) => vec![RunState::Done],
            (0, true) => vec![RunState::Done, RunState::Cancelled],
            (_, false) => vec![RunState::Failed],
            (_, true) => vec![RunState::Failed, RunState::Cancelled],
        };
        prop_assert!(wanted.contains(&world.hub.state), "{:?}", world.hub);
    }
}
