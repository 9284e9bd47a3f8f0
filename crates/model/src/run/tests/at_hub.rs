//! The whole run, as the hub sees it.

use super::*;
use crate::run::RunState;
use crate::run::hub::Finish;
use crate::run::site::Phase;

#[test]
fn a_run_at_the_hub_passes_all_states() {
    let run = HubRun::new(spec());
    let (run, effects) = hub(
        &run,
        HubEvent::Looked {
            delivered: false,
            inputs: vec![],
            home: None,
        },
    );
    assert_eq!(
        (run.state, effects),
        (RunState::Delivering, vec![HubEffect::Borrow])
    );
    let waits = HubEvent::Looked {
        delivered: true,
        inputs: vec![input(State::Queued, Some("site b is not connected"))],
        home: None,
    };
    let (run, _) = hub(&run, waits);
    assert!(
        run.message
            .as_ref()
            .unwrap()
            .contains("site b is not connected"),
        "{run:?}"
    );
    let (run, _) = hub(&run, looked(State::Done));
    assert_eq!(
        (run.state, run.message.clone(), run.want()),
        (RunState::Waiting, None, Want::Train)
    );

    let mut there = SiteRun::new(desired(Want::Train));
    there.phase = Phase::Training;
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(run.state, RunState::Training);
    (there.phase, there.has_output) = (Phase::Trained, true);
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(
        (run.state, run.want()),
        (RunState::Publishing, Want::Publish)
    );
    let (run, _) = hub(&run, HubEvent::Published(model()));
    assert_eq!(
        (run.state, run.want()),
        (RunState::Returning, Want::Release)
    );
    let (run, effects) = hub(&run, looked(State::Done));
    assert_eq!(effects, [HubEffect::SendHome]);
    let home = |state| HubEvent::Looked {
        delivered: true,
        inputs: vec![],
        home: Some(input(state, None)),
    };
    let (run, effects) = hub(&run, home(State::Transferring));
    assert_eq!((run.state, effects), (RunState::Returning, vec![]));
    let (run, _) = hub(&run, home(State::Done));
    assert_eq!(
        (run.state, run.is_open()),
        (RunState::Done, true),
        "b has not said that it cleaned up"
    );
    there.released = true;
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert!(!run.is_open());
}

#[test]
fn a_failed_trainer_ends_the_run_and_its_output_is_stored() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let mut there = SiteRun::new(desired(Want::Train));
    (there.phase, there.ended) = (Phase::Failed, Some(ended(3)));
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(
        (run.state, run.want(), run.message.as_deref()),
        (RunState::Failed, Want::Stop, Some("it ended with 3"))
    );
    assert_eq!(run.site.unwrap().ended.unwrap().tail.as_str(), "last words");
}

#[test]
fn a_failed_publish_of_the_model_is_reported_although_the_trainer_succeeded() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let publishing = SiteRun {
        phase: Phase::Publishing,
        ended: Some(ended(0)),
        ..SiteRun::new(desired(Want::Publish))
    };
    let (there, _) = site(
        &publishing,
        Event::NotPublished {
            why: "the name is taken".into(),
            again: false,
        },
    );
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(
        (run.state, run.message.as_deref()),
        (RunState::Failed, Some("the name is taken"))
    );
    assert_eq!(there.report().words(), Some("the name is taken"));
    assert_eq!(
        publishing.report().words(),
        Some("it ended with 0"),
        "as long as there is nothing worse to say"
    );
}

#[test]
fn the_reason_of_a_wait_during_training_is_reported() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let calling = SiteRun {
        phase: Phase::Training,
        by_platform: true,
        ..SiteRun::new(desired(Want::Train))
    };
    let (calling, _) = site(
        &calling,
        Event::NotStarted("the platform answers 503".into()),
    );
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(calling.report())));
    let (run, _) = hub(&run, looked(State::Done));
    assert_eq!(
        (run.state, run.message.as_deref()),
        (RunState::Training, Some("the platform answers 503"))
    );
    let (called, _) = site(&calling, Event::Called);
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(called.report())));
    let (run, _) = hub(&run, looked(State::Done));
    assert_eq!((run.message, run.next), (None, None));
}

#[test]
fn a_trainer_that_leaves_nothing_fails_the_run() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let mut there = SiteRun::new(desired(Want::Train));
    there.phase = Phase::Trained;
    let (failed, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(failed.state, RunState::Failed);
    // Unless it published by itself before it ended.
    let (run, _) = hub(&run, HubEvent::Published(model()));
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(run.state, RunState::Returning);
}

#[test]
fn only_the_expected_model_is_accepted_and_only_once() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let other = Model {
        artifact: "model/other:1".parse().unwrap(),
        ..model()
    };
    assert_eq!(
        hub::step(&run, HubEvent::Published(other), 1)
            .unwrap_err()
            .code,
        Code::Conflict
    );
    let (run, _) = hub(&run, HubEvent::Published(model()));
    let (same, _) = hub(&run, HubEvent::Published(model()));
    assert_eq!(run, same);
    let second = Model {
        artifact: "model/m:2".parse().unwrap(),
        ..model()
    };
    assert_eq!(
        hub::step(&run, HubEvent::Published(second), 1)
            .unwrap_err()
            .code,
        Code::Conflict
    );
}

#[test]
fn time_and_people_end_a_run_but_not_one_that_has_its_model() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Transferring));
    let (late, _) = hub::step(&run, looked(State::Transferring), 1000).unwrap();
    assert_eq!((late.state, late.want()), (RunState::Failed, Want::Stop));
    let (_, effects) = hub(&late, looked(State::Transferring));
    assert_eq!(effects, [HubEffect::Abandon]);
    let (cancelled, _) = hub(&run, HubEvent::Cancel);
    assert_eq!(
        (cancelled.state, cancelled.want()),
        (RunState::Cancelled, Want::Stop)
    );
    assert!(hub::step(&late, HubEvent::Cancel, 1).is_err());
    let (returning, _) = hub(&run, HubEvent::Published(model()));
    let (returning, effects) = hub::step(&returning, looked(State::Done), 5000).unwrap();
    assert_eq!(
        (returning.state, effects),
        (RunState::Returning, vec![HubEffect::SendHome])
    );
}

#[test]
fn only_a_platform_says_that_it_is_finished() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let finish = |run: &HubRun| hub::step(run, HubEvent::Finish(Finish { failed: None }), 1);
    assert!(
        finish(&HubRun::new(spec())).is_err(),
        "it cannot have begun"
    );
    let mut there = SiteRun::new(desired(Want::Train));
    there.phase = Phase::Training;
    let (command, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert!(finish(&command).is_err());
    there.by_platform = true;
    let (platform, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(finish(&platform).unwrap().0.state, RunState::Publishing);
    let no_gpu = HubEvent::Finish(Finish {
        failed: Some("no GPU".into()),
    });
    let (failed, _) = hub(&platform, no_gpu.clone());
    assert_eq!(
        (failed.state, failed.message.as_deref()),
        (RunState::Failed, Some("the training platform says: no GPU"))
    );
    // Said before the hub has heard that it began: it holds from then on, and of a command it never
    // does.
    let began = |run: &HubRun, by_platform| {
        let there = SiteRun {
            phase: Phase::Training,
            by_platform,
            ..SiteRun::new(desired(Want::Train))
        };
        hub(run, HubEvent::Reported(Box::new(there.report()))).0
    };
    let (early, _) = finish(&run).unwrap();
    assert_eq!(
        (early.state, early.want()),
        (RunState::Waiting, Want::Train)
    );
    assert_eq!(
        (began(&early, true).state, began(&early, false).state),
        (RunState::Publishing, RunState::Training)
    );
    let (early, _) = hub(&run, no_gpu);
    assert_eq!(began(&early, true).state, RunState::Failed);
    // What a site says before it has looked tells nothing of who trains there.
    let new = SiteRun::new(desired(Want::Train)).report();
    let command = RunReport {
        by_command: true,
        ..new.clone()
    };
    let (waits, _) = hub(&run, HubEvent::Reported(Box::new(command)));
    let fault = finish(&waits).unwrap_err();
    assert!(
        waits.state == RunState::Waiting && fault.message.contains("is a command"),
        "{fault}"
    );
    let (waits, _) = hub(&run, HubEvent::Reported(Box::new(new)));
    let (early, _) = finish(&waits).unwrap();
    assert_eq!(
        (began(&early, true).state, began(&early, false).state),
        (RunState::Publishing, RunState::Training)
    );
}
