//! The part of the site that trains: what it begins, publishes, stops and gives back, and when.

use super::*;
use crate::run::RunState;
use crate::run::site::{Phase, may_go};
use base::limits::{TRAINER_CALL_OFF_MAX, TRAINER_STARTS_MAX};

#[test]
fn a_site_trains_publishes_and_cleans_up() {
    let run = SiteRun::new(desired(Want::Train));
    let missing = Observation {
        missing: Some("dataset/x:1".into()),
        ..seen(Process::Absent)
    };
    let (run, effects) = site(&run, Event::Looked(missing));
    assert_eq!(
        (run.phase, effects, run.message.as_deref()),
        (Phase::Waiting, vec![], Some("waits for dataset/x:1"))
    );
    let (run, effects) = site(
        &run,
        Event::Looked(Observation {
            turn: false,
            ..seen(Process::Absent)
        }),
    );
    assert_eq!((run.phase, effects), (Phase::Waiting, vec![]));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!(
        (run.phase, run.starts, effects),
        (Phase::Training, 1, vec![Effect::Start])
    );
    let (run, effects) = site(&run, Event::Looked(seen(Process::Running)));
    assert_eq!((run.phase, effects), (Phase::Training, vec![]));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((run.phase, effects), (Phase::Trained, vec![]));
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Publish))));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!(
        (run.phase, effects),
        (Phase::Publishing, vec![Effect::Publish])
    );
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!(
        effects,
        [Effect::Publish],
        "due until it is seen to be done"
    );
    let (run, _) = site(&run, Event::Published(model()));
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Release))));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!(
        (run.released, effects),
        (false, vec![Effect::Remove(borrowed())])
    );
    let (run, _) = site(&run, removed());
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((run.released, effects), (true, vec![]));
}

#[test]
fn no_run_begins_before_the_hub_has_recorded_every_input() {
    // All of it is listed at the site, and may be gone from its disk.
    let told = |ready| {
        Event::Wanted(Box::new(DesiredRun {
            ready,
            ..desired(Want::Train)
        }))
    };
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), told(false));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!((run.phase, effects), (Phase::Waiting, vec![]));
    let (run, _) = site(&run, told(true));
    assert_eq!(
        site(&run, Event::Looked(seen(Process::Absent))).1,
        [Effect::Start]
    );
    let delivering = HubRun::new(spec());
    assert!(!delivering.is_ready() && hub(&delivering, looked(State::Done)).0.is_ready());
    // An older hub does not know the word.
    let mut text = serde_json::to_value(desired(Want::Train)).unwrap();
    text.as_object_mut().unwrap().remove("ready");
    text["borrowed"][0]
        .as_object_mut()
        .unwrap()
        .remove("generation");
    let desired: DesiredRun = serde_json::from_value(text).unwrap();
    assert!(desired.ready && desired.borrowed[0].generation.is_none());
}

#[test]
fn no_run_begins_before_its_inputs_were_checked() {
    let unchecked = |process| {
        Event::Looked(Observation {
            checked: false,
            ..seen(process)
        })
    };
    for trainer in [Trainer::Command, Trainer::Platform] {
        let look = |checked| {
            Event::Looked(Observation {
                checked,
                trainer,
                ..seen(Process::Absent)
            })
        };
        let (run, effects) = site(&SiteRun::new(desired(Want::Train)), look(false));
        assert_eq!(
            (run.phase, run.starts, effects),
            (Phase::Waiting, 0, vec![Effect::Check])
        );
        // Its folder is away: it waits, and costs no start.
        let (run, _) = site(
            &run,
            Event::NotYet("waits for dataset/x:1: its folder is away".into()),
        );
        let (run, effects) = site(&run, look(false));
        assert_eq!((run.phase, effects), (Phase::Waiting, vec![Effect::Check]));
        assert_eq!(
            run.message.as_deref(),
            Some("waits for dataset/x:1: its folder is away")
        );
        let (run, effects) = site(&run, look(true));
        assert_eq!(
            (run.phase, run.starts, effects),
            (Phase::Training, 1, vec![Effect::Start])
        );
        assert_eq!(run.message, None);
    }
    // It was edited: that does not pass.
    let (run, _) = site(
        &SiteRun::new(desired(Want::Train)),
        unchecked(Process::Absent),
    );
    let (failed, _) = site(
        &run,
        Event::NotStarted("dataset/x:1 is no longer what was published".into()),
    );
    assert_eq!(failed.phase, Phase::Failed);
    // A trainer that vanished is not started anew on what cannot be looked at either.
    let (run, _) = site(&run, Event::Looked(seen(Process::Absent)));
    let (run, effects) = site(&run, unchecked(Process::Absent));
    assert_eq!(
        (run.phase, run.starts, effects),
        (Phase::Training, 1, vec![Effect::Check])
    );
    assert_eq!(site(&run, Event::Looked(seen(Process::Absent))).0.starts, 2);
}

#[test]
fn what_another_run_uses_stays_and_so_does_what_the_hub_no_longer_means() {
    let over = SiteRun {
        phase: Phase::Trained,
        want: Want::Release,
        ..SiteRun::new(desired(Want::Release))
    };
    let named = |name: &str, phase, want| {
        let spec = Spec {
            name: name.parse().unwrap(),
            ..spec()
        };
        SiteRun {
            spec,
            phase,
            want,
            ..over.clone()
        }
    };
    let may = |others: &[SiteRun], what: &Borrowed| {
        let open: Vec<SiteRun> = others.iter().cloned().chain([over.clone()]).collect();
        may_go(&open, &over.spec.name, what)
    };
    let ours = borrowed().remove(0);
    assert!(may(&[], &ours));
    assert!(may(
        &[
            named("s", Phase::Failed, Want::Stop),
            named("q", Phase::Waiting, Want::Stop)
        ],
        &ours
    ));
    assert!(
        !may(&[named("s", Phase::Waiting, Want::Train)], &ours),
        "it may begin at any moment"
    );
    assert!(
        !may(&[named("s", Phase::Training, Want::Release)], &ours),
        "it published by itself, and runs on"
    );
    let mut other = named("s", Phase::Training, Want::Train);
    other
        .spec
        .inputs
        .retain(|input| input.artifact != ours.artifact);
    assert!(may(&[other], &ours), "it reads something else");
    assert!(
        !may(
            &[],
            &Borrowed {
                generation: Some(1),
                ..ours.clone()
            }
        ),
        "brought anew since"
    );
    assert!(!may_go(&[], &over.spec.name, &ours), "nobody knows the run");

    // Once its process is gone a run uses nothing, whatever came of it.
    for (want, process) in [
        (Want::Release, Process::Absent),
        (Want::Stop, Process::Ended(ended(1))),
    ] {
        let wanted = DesiredRun {
            model: Some(model()),
            ..desired(want)
        };
        let run = SiteRun {
            phase: Phase::Training,
            want,
            ..SiteRun::new(wanted)
        };
        let (run, effects) = site(&run, Event::Looked(seen(process)));
        assert_eq!(
            (run.phase, effects),
            (Phase::Trained, vec![Effect::Remove(borrowed())])
        );
    }
}

#[test]
fn an_input_that_cannot_be_removed_is_reported_and_retried() {
    let ended_run = || SiteRun {
        phase: Phase::Failed,
        message: Some("it ended with 3".into()),
        ..SiteRun::new(desired(Want::Stop))
    };
    let failed = HubRun {
        state: RunState::Failed,
        message: Some("it ended with 3".into()),
        ..HubRun::new(spec())
    };
    let told = |run: &SiteRun| {
        hub(&failed, HubEvent::Reported(Box::new(run.report())))
            .0
            .message()
            .unwrap()
    };
    let (run, _) = site(
        &ended_run(),
        Event::NotRemoved {
            transfer: "t-1".parse().unwrap(),
            why: "dataset/x:1: the NAS is away".into(),
        },
    );
    assert_eq!(
        told(&run),
        "it ended with 3; at b: dataset/x:1: the NAS is away"
    );
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!(
        (run.released, effects),
        (false, vec![Effect::Remove(borrowed())])
    );
    let (run, _) = site(&run, removed());
    assert_eq!(told(&run), "it ended with 3");
    // What stays for good holds nobody up, and is told to the end.
    let (run, _) = site(
        &ended_run(),
        Event::Removed {
            transfer: "t-1".parse().unwrap(),
            stays: Some("image/x:1 stays".into()),
        },
    );
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Stop))));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!((run.released, effects), (true, vec![]));
    assert_eq!(told(&run), "it ended with 3; at b: image/x:1 stays");
}

#[test]
fn a_trainer_that_vanishes_is_started_again_a_few_times() {
    let (mut run, _) = site(
        &SiteRun::new(desired(Want::Train)),
        Event::Looked(seen(Process::Absent)),
    );
    for start in 2..=TRAINER_STARTS_MAX {
        let (next, effects) = site(&run, Event::Looked(seen(Process::Absent)));
        assert_eq!((next.starts, effects), (start, vec![Effect::Start]));
        run = next;
    }
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!((run.phase, effects), (Phase::Failed, vec![]));
}

#[test]
fn no_event_overtakes_or_removes_a_model_that_the_hub_does_not_know() {
    let offering = |process| Observation {
        offering: true,
        ..seen(process)
    };
    let (run, _) = site(
        &SiteRun::new(desired(Want::Train)),
        Event::Looked(seen(Process::Absent)),
    );
    // It is not started anew, which would begin with an empty folder; nor is it said to have ended.
    let (gone, effects) = site(&run, Event::Looked(offering(Process::Absent)));
    assert_eq!(
        (gone.phase, gone.starts, effects),
        (Phase::Training, 1, vec![])
    );
    let none = Observation {
        has_output: false,
        ..offering(Process::Ended(ended(0)))
    };
    let (held, effects) = site(&run, Event::Looked(none));
    assert_eq!(
        (held.phase, &held.ended, effects),
        (Phase::Training, &Some(ended(0)), vec![])
    );
    let (kept, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let (kept, _) = hub(&kept, HubEvent::Reported(Box::new(held.report())));
    assert_eq!(kept.state, RunState::Training);
    // The hub heard of it.
    let (heard, _) = site(
        &held,
        Event::Wanted(Box::new(DesiredRun {
            model: Some(model()),
            ..desired(Want::Release)
        })),
    );
    let (heard, effects) = site(&heard, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!(
        (heard.phase, effects),
        (Phase::Trained, vec![Effect::Remove(borrowed())])
    );
    // Or refused it: what is in the output folder counts.
    let (refused, _) = site(&held, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((refused.phase, refused.message), (Phase::Trained, None));
    // The same while the output is being published, and time ends it all the same.
    let publishing = SiteRun {
        phase: Phase::Publishing,
        want: Want::Publish,
        ..held
    };
    let (publishing, effects) = site(
        &publishing,
        Event::Looked(offering(Process::Ended(ended(0)))),
    );
    assert_eq!((publishing.phase, effects), (Phase::Publishing, vec![]));
    let (again, effects) = site(&publishing, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!(
        (again.phase, effects),
        (Phase::Publishing, vec![Effect::Publish])
    );
    let (late, _) = site::step(
        &publishing,
        Event::Looked(offering(Process::Ended(ended(0)))),
        1000,
    );
    assert_eq!(late.phase, Phase::Failed);
}

#[test]
fn a_start_wipes_nothing_that_was_published_out_of_the_folder() {
    let kept = |process| Observation {
        kept: Some("model/m:r".into()),
        ..seen(process)
    };
    let (run, _) = site(
        &SiteRun::new(desired(Want::Train)),
        Event::Looked(seen(Process::Absent)),
    );
    // The hub has heard of the model and says so in a moment: the machine went down in between.
    let (gone, effects) = site(&run, Event::Looked(kept(Process::Absent)));
    assert_eq!(
        (gone.phase, gone.starts, effects),
        (Phase::Training, 1, vec![])
    );
    let (heard, _) = site(
        &gone,
        Event::Wanted(Box::new(DesiredRun {
            model: Some(model()),
            ..desired(Want::Release)
        })),
    );
    let (heard, effects) = site(&heard, Event::Looked(kept(Process::Absent)));
    assert_eq!(
        (heard.phase, effects),
        (Phase::Trained, vec![Effect::Remove(borrowed())])
    );
    // One that ended well publishes what it left, whatever else it published on its way.
    let (ended_well, _) = site(&run, Event::Looked(kept(Process::Ended(ended(0)))));
    assert_eq!(ended_well.phase, Phase::Trained);
    // A folder that an older run of this name left.
    let (failed, effects) = site(
        &SiteRun::new(desired(Want::Train)),
        Event::Looked(kept(Process::Absent)),
    );
    assert_eq!((failed.phase, effects), (Phase::Failed, vec![]));
}

#[test]
fn stopping_ends_the_trainer_before_anything_is_removed() {
    let (run, _) = site(
        &SiteRun::new(desired(Want::Train)),
        Event::Looked(seen(Process::Absent)),
    );
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Stop))));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Running)));
    assert_eq!((run.phase, effects), (Phase::Training, vec![Effect::Stop]));
    let killed = Ended {
        exit_code: None,
        signal: Some(15),
        ..ended(0)
    };
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(killed.clone()))));
    assert_eq!(
        (run.phase, run.ended, effects),
        (
            Phase::Failed,
            Some(killed),
            vec![Effect::Remove(borrowed())]
        )
    );
}

#[test]
fn at_the_deadline_a_site_cleans_up_without_a_message_from_the_hub() {
    let (run, _) = site(
        &SiteRun::new(desired(Want::Train)),
        Event::Looked(seen(Process::Absent)),
    );
    let (run, effects) = site::step(&run, Event::Looked(seen(Process::Running)), 1000);
    assert_eq!(effects, [Effect::Stop]);
    let (run, effects) = site::step(&run, Event::Looked(seen(Process::Absent)), 1001);
    assert_eq!(
        (run.phase, effects),
        (Phase::Failed, vec![Effect::Remove(borrowed())])
    );
    let (run, _) = site(&run, removed());
    let (run, effects) = site::step(&run, Event::Looked(seen(Process::Absent)), 1002);
    assert_eq!(
        (run.released, effects),
        (false, vec![]),
        "the hub may still have something to say"
    );
}

#[test]
fn a_site_without_a_trainer_says_so_before_anything_moves() {
    let nobody = Observation {
        trainer: Trainer::None,
        missing: Some("dataset/x:1".into()),
        ..seen(Process::Absent)
    };
    let (run, effects) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(nobody));
    assert_eq!((run.phase, effects), (Phase::Failed, vec![]));
    assert!(run.message.unwrap().contains("[train]"));
}

#[test]
fn no_run_begins_for_a_site_that_may_not_train_here() {
    let refused = |process| {
        Event::Looked(Observation {
            trainer: Trainer::Refused,
            ..seen(process)
        })
    };
    let waiting = SiteRun::new(desired(Want::Train));
    // A command that is gone would be started again, and a platform would be called again.
    let (gone, _) = site(&waiting, Event::Looked(seen(Process::Absent)));
    let (uncalled, _) = site(
        &waiting,
        Event::Looked(Observation {
            trainer: Trainer::Platform,
            ..seen(Process::Absent)
        }),
    );
    for run in [waiting, gone.clone(), uncalled] {
        let (run, effects) = site(&run, refused(Process::Absent));
        assert_eq!((run.phase, effects), (Phase::Failed, vec![]));
        assert!(run.message.unwrap().contains("[train] allow"));
    }
    // What began while it was allowed goes on.
    let (run, effects) = site(&gone, refused(Process::Running));
    assert_eq!((run.phase, effects), (Phase::Training, vec![]));
}

#[test]
fn a_platform_is_called_until_it_answers() {
    let platform = || Observation {
        trainer: Trainer::Platform,
        ..seen(Process::Absent)
    };
    let (run, effects) = site(
        &SiteRun::new(desired(Want::Train)),
        Event::Looked(platform()),
    );
    assert_eq!((run.by_platform, effects), (true, vec![Effect::Start]));
    let (run, _) = site(&run, Event::NotStarted("connection refused".into()));
    let (run, effects) = site(&run, Event::Looked(platform()));
    assert_eq!(
        (run.starts, effects),
        (1, vec![Effect::Start]),
        "a call is no start"
    );
    let (run, _) = site(&run, Event::Called);
    let (run, effects) = site(&run, Event::Looked(platform()));
    assert_eq!((run.phase, effects), (Phase::Training, vec![]));
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Publish))));
    let (run, effects) = site(
        &run,
        Event::Looked(Observation {
            has_output: false,
            ..platform()
        }),
    );
    assert_eq!((run.phase, effects), (Phase::Failed, vec![]));
}

#[test]
fn a_platform_is_informed_until_it_confirms_that_its_run_ended_without_a_model() {
    let look = || {
        Event::Looked(Observation {
            trainer: Trainer::Platform,
            ..seen(Process::Absent)
        })
    };
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), look());
    let (run, _) = site(&run, Event::Called);
    let remove = Effect::Remove(borrowed());
    let (late, effects) = site::step(&run, look(), 1000);
    assert_eq!(
        (late.phase, effects),
        (Phase::Failed, vec![Effect::Stop, remove.clone()])
    );
    // It did not hear. What was borrowed need not wait for that, nor need the hub.
    assert_eq!(
        site::step(&late, look(), 1001).1,
        [Effect::Stop, remove.clone()]
    );
    let (told, _) = site(&late, Event::Wanted(Box::new(desired(Want::Stop))));
    let (given, _) = site(&told, removed());
    let (given, effects) = site::step(&given, look(), 1002);
    assert_eq!(
        (given.released, given.is_open(), effects),
        (true, true, vec![Effect::Stop])
    );
    let (heard, _) = site(&given, Event::CalledOff);
    assert!(!heard.is_open());
    assert!(site::step(&heard, look(), 1003).1.is_empty());
    // One that never hears is told for some hours.
    let hours = TRAINER_CALL_OFF_MAX.as_millis() as i64;
    assert_eq!(site::step(&given, look(), 999 + hours).1, [Effect::Stop]);
    let (left, effects) = site::step(&given, look(), 1000 + hours);
    assert_eq!((left.is_open(), effects), (false, vec![]));
    // It published by itself, or was never called.
    let (done, _) = site(
        &run,
        Event::Wanted(Box::new(DesiredRun {
            model: Some(model()),
            ..desired(Want::Release)
        })),
    );
    assert_eq!(site(&done, look()).1, std::slice::from_ref(&remove));
    assert_eq!(site(&SiteRun::new(desired(Want::Stop)), look()).1, [remove]);
}
