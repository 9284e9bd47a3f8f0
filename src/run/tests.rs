//! The two machines, each alone and both together over a line that loses and repeats what it likes.

use super::hub::{Effect as HubEffect, Event as HubEvent, Finish, Run as HubRun, Seen as SeenTransfer};
use super::site::{Effect, Event, Phase, Process, Run as SiteRun, Seen, Trainer, may_go};
use super::*;
use crate::api::types::{RunState, State};
use crate::chunk::Hash;
use crate::fault::Code;
use crate::limits::{TRAINER_CALL_OFF_MAX, TRAINER_STARTS_MAX};

fn spec() -> Spec {
    let input = |artifact: &str, n: u8| Input { artifact: artifact.parse().unwrap(), digest: Hash([n; 32]), bytes: 10 };
    Spec {
        name: "r".parse().unwrap(),
        id: "r-1".into(),
        from: "a".parse().unwrap(),
        on: "b".parse().unwrap(),
        inputs: vec![input("dataset/x:1", 1), input("labels/x:1", 2)],
        expect: "model/m".parse().unwrap(),
        delivery: "d-1".into(),
        created_ms: 0,
        deadline_ms: 1000,
    }
}

fn model() -> Model {
    Model { artifact: "model/m:r".parse().unwrap(), digest: Hash([9; 32]) }
}

fn ended(code: i32) -> Ended {
    Ended { exit_code: Some(code), signal: None, message: format!("it ended with {code}"), tail: "last words".into(), ended_ms: 5 }
}

fn input(state: State, message: Option<&str>) -> SeenTransfer {
    SeenTransfer { id: "t-1".into(), state, message: message.map(Into::into) }
}

fn looked(state: State) -> HubEvent {
    HubEvent::Looked { delivered: true, inputs: vec![input(state, None)], home: None }
}

#[track_caller]
fn hub(run: &HubRun, event: HubEvent) -> (HubRun, Vec<HubEffect>) {
    hub::step(run, event, 1).unwrap()
}

fn borrowed() -> Vec<Borrowed> {
    vec![Borrowed { transfer: "t-1".into(), artifact: "dataset/x:1".parse().unwrap(), digest: Hash([1; 32]), generation: Some(0) }]
}

fn removed() -> Event {
    Event::Removed { transfer: "t-1".into(), stays: None }
}

fn desired(want: Want) -> DesiredRun {
    DesiredRun { spec: spec(), want, borrowed: borrowed(), model: None, ready: true }
}

fn seen(process: Process) -> Seen {
    let trainer = Trainer::Command;
    Seen { missing: None, turn: true, trainer, process, has_output: true, offering: false, kept: None, checked: true }
}

fn site(run: &SiteRun, event: Event) -> (SiteRun, Vec<Effect>) {
    site::step(run, event, 1)
}

#[test]
fn what_is_expected_is_a_model() {
    let any: Expect = "model/m".parse().unwrap();
    assert!(any.accepts(&"model/m:7".parse().unwrap()) && !any.accepts(&"model/n:7".parse().unwrap()));
    assert_eq!(any.reference(&"r".parse().unwrap()).unwrap().to_string(), "model/m:r");
    let one: Expect = "model/m:2".parse().unwrap();
    assert!(one.accepts(&"model/m:2".parse().unwrap()) && !one.accepts(&"model/m:3".parse().unwrap()));
    assert_eq!(one.to_string(), "model/m:2");
    for bad in ["dataset/m", "model/", "model/M", "m", "model/m:"] {
        assert_eq!(bad.parse::<Expect>().unwrap_err().code, Code::Usage, "{bad}");
    }
}

#[test]
fn a_run_at_the_hub_goes_all_the_way() {
    let run = HubRun::new(spec());
    let (run, effects) = hub(&run, HubEvent::Looked { delivered: false, inputs: vec![], home: None });
    assert_eq!((run.state, effects), (RunState::Delivering, vec![HubEffect::Borrow]));
    let waits = HubEvent::Looked { delivered: true, inputs: vec![input(State::Queued, Some("site b is not connected"))], home: None };
    let (run, _) = hub(&run, waits);
    assert!(run.message.as_ref().unwrap().contains("site b is not connected"), "{run:?}");
    let (run, _) = hub(&run, looked(State::Done));
    assert_eq!((run.state, run.message.clone(), run.want()), (RunState::Waiting, None, Want::Train));

    let mut there = SiteRun::new(desired(Want::Train));
    there.phase = Phase::Training;
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(run.state, RunState::Training);
    (there.phase, there.has_output) = (Phase::Trained, true);
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!((run.state, run.want()), (RunState::Publishing, Want::Publish));
    let (run, _) = hub(&run, HubEvent::Published(model()));
    assert_eq!((run.state, run.want()), (RunState::Returning, Want::Release));
    let (run, effects) = hub(&run, looked(State::Done));
    assert_eq!(effects, [HubEffect::SendHome]);
    let home = |state| HubEvent::Looked { delivered: true, inputs: vec![], home: Some(input(state, None)) };
    let (run, effects) = hub(&run, home(State::Transferring));
    assert_eq!((run.state, effects), (RunState::Returning, vec![]));
    let (run, _) = hub(&run, home(State::Done));
    assert_eq!((run.state, run.is_open()), (RunState::Done, true), "b has not said that it cleaned up");
    there.released = true;
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert!(!run.is_open());
}

#[test]
fn a_trainer_that_fails_ends_the_run_and_its_words_are_kept() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let mut there = SiteRun::new(desired(Want::Train));
    (there.phase, there.ended) = (Phase::Failed, Some(ended(3)));
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!((run.state, run.want(), run.message.as_deref()), (RunState::Failed, Want::Stop, Some("it ended with 3")));
    assert_eq!(run.site.unwrap().ended.unwrap().tail, "last words");
}

#[test]
fn a_model_that_could_not_be_published_is_told_though_the_trainer_ended_well() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let publishing = SiteRun { phase: Phase::Publishing, ended: Some(ended(0)), ..SiteRun::new(desired(Want::Publish)) };
    let (there, _) = site(&publishing, Event::NotPublished { why: "the name is taken".into(), again: false });
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!((run.state, run.message.as_deref()), (RunState::Failed, Some("the name is taken")));
    assert_eq!(there.report().words(), Some("the name is taken"));
    assert_eq!(publishing.report().words(), Some("it ended with 0"), "as long as there is nothing worse to say");
}

#[test]
fn what_a_site_waits_for_while_it_trains_is_told() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let calling = SiteRun { phase: Phase::Training, by_platform: true, ..SiteRun::new(desired(Want::Train)) };
    let (calling, _) = site(&calling, Event::NotStarted("the platform answers 503".into()));
    let (run, _) = hub(&run, HubEvent::Reported(Box::new(calling.report())));
    let (run, _) = hub(&run, looked(State::Done));
    assert_eq!((run.state, run.message.as_deref()), (RunState::Training, Some("the platform answers 503")));
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
fn only_the_expected_model_is_taken_and_once() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let other = Model { artifact: "model/other:1".parse().unwrap(), ..model() };
    assert_eq!(hub::step(&run, HubEvent::Published(other), 1).unwrap_err().code, Code::Conflict);
    let (run, _) = hub(&run, HubEvent::Published(model()));
    let (same, _) = hub(&run, HubEvent::Published(model()));
    assert_eq!(run, same);
    let second = Model { artifact: "model/m:2".parse().unwrap(), ..model() };
    assert_eq!(hub::step(&run, HubEvent::Published(second), 1).unwrap_err().code, Code::Conflict);
}

#[test]
fn time_and_people_end_a_run_but_not_one_that_has_its_model() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Transferring));
    let (late, _) = hub::step(&run, looked(State::Transferring), 1000).unwrap();
    assert_eq!((late.state, late.want()), (RunState::Failed, Want::Stop));
    let (_, effects) = hub(&late, looked(State::Transferring));
    assert_eq!(effects, [HubEffect::Abandon]);
    let (cancelled, _) = hub(&run, HubEvent::Cancel);
    assert_eq!((cancelled.state, cancelled.want()), (RunState::Cancelled, Want::Stop));
    assert!(hub::step(&late, HubEvent::Cancel, 1).is_err());
    let (returning, _) = hub(&run, HubEvent::Published(model()));
    let (returning, effects) = hub::step(&returning, looked(State::Done), 5000).unwrap();
    assert_eq!((returning.state, effects), (RunState::Returning, vec![HubEffect::SendHome]));
}

#[test]
fn only_a_platform_says_that_it_is_finished() {
    let (run, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let finish = |run: &HubRun| hub::step(run, HubEvent::Finish(Finish { failed: None }), 1);
    assert!(finish(&HubRun::new(spec())).is_err(), "it cannot have begun");
    let mut there = SiteRun::new(desired(Want::Train));
    there.phase = Phase::Training;
    let (command, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert!(finish(&command).is_err());
    there.by_platform = true;
    let (platform, _) = hub(&run, HubEvent::Reported(Box::new(there.report())));
    assert_eq!(finish(&platform).unwrap().0.state, RunState::Publishing);
    let no_gpu = HubEvent::Finish(Finish { failed: Some("no GPU".into()) });
    let (failed, _) = hub(&platform, no_gpu.clone());
    assert_eq!((failed.state, failed.message.as_deref()), (RunState::Failed, Some("the training platform says: no GPU")));
    // Said before the hub has heard that it began: it holds from then on, and of a command it never does.
    let began = |run: &HubRun, by_platform| {
        let there = SiteRun { phase: Phase::Training, by_platform, ..SiteRun::new(desired(Want::Train)) };
        hub(run, HubEvent::Reported(Box::new(there.report()))).0
    };
    let (early, _) = finish(&run).unwrap();
    assert_eq!((early.state, early.want()), (RunState::Waiting, Want::Train));
    assert_eq!((began(&early, true).state, began(&early, false).state), (RunState::Publishing, RunState::Training));
    let (early, _) = hub(&run, no_gpu);
    assert_eq!(began(&early, true).state, RunState::Failed);
    // What a site says before it has looked tells nothing of who trains there.
    let new = SiteRun::new(desired(Want::Train)).report();
    let (waits, _) = hub(&run, HubEvent::Reported(Box::new(new)));
    let (early, _) = finish(&waits).unwrap();
    assert_eq!((began(&early, true).state, began(&early, false).state), (RunState::Publishing, RunState::Training));
}

#[test]
fn a_site_trains_publishes_and_cleans_up() {
    let run = SiteRun::new(desired(Want::Train));
    let missing = Seen { missing: Some("dataset/x:1".into()), ..seen(Process::Absent) };
    let (run, effects) = site(&run, Event::Looked(missing));
    assert_eq!((run.phase, effects, run.message.as_deref()), (Phase::Waiting, vec![], Some("waits for dataset/x:1")));
    let (run, effects) = site(&run, Event::Looked(Seen { turn: false, ..seen(Process::Absent) }));
    assert_eq!((run.phase, effects), (Phase::Waiting, vec![]));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!((run.phase, run.starts, effects), (Phase::Training, 1, vec![Effect::Start]));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Running)));
    assert_eq!((run.phase, effects), (Phase::Training, vec![]));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((run.phase, effects), (Phase::Trained, vec![]));
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Publish))));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((run.phase, effects), (Phase::Publishing, vec![Effect::Publish]));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!(effects, [Effect::Publish], "due until it is seen to be done");
    let (run, _) = site(&run, Event::Published(model()));
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Release))));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((run.released, effects), (false, vec![Effect::Remove(borrowed())]));
    let (run, _) = site(&run, removed());
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((run.released, effects), (true, vec![]));
}

#[test]
fn nothing_begins_before_the_hub_has_seen_every_input_arrive() {
    // All of it is listed at the site, and may be gone from its disk.
    let told = |ready| Event::Wanted(Box::new(DesiredRun { ready, ..desired(Want::Train) }));
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), told(false));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!((run.phase, effects), (Phase::Waiting, vec![]));
    let (run, _) = site(&run, told(true));
    assert_eq!(site(&run, Event::Looked(seen(Process::Absent))).1, [Effect::Start]);
    let delivering = HubRun::new(spec());
    assert!(!delivering.is_ready() && hub(&delivering, looked(State::Done)).0.is_ready());
    // An older hub does not know the word.
    let mut text = serde_json::to_value(desired(Want::Train)).unwrap();
    text.as_object_mut().unwrap().remove("ready");
    text["borrowed"][0].as_object_mut().unwrap().remove("generation");
    let desired: DesiredRun = serde_json::from_value(text).unwrap();
    assert!(desired.ready && desired.borrowed[0].generation.is_none());
}

#[test]
fn nothing_begins_before_the_inputs_themselves_were_looked_at() {
    let unchecked = |process| Event::Looked(Seen { checked: false, ..seen(process) });
    for trainer in [Trainer::Command, Trainer::Platform] {
        let look = |checked| Event::Looked(Seen { checked, trainer, ..seen(Process::Absent) });
        let (run, effects) = site(&SiteRun::new(desired(Want::Train)), look(false));
        assert_eq!((run.phase, run.starts, effects), (Phase::Waiting, 0, vec![Effect::Check]));
        // Its folder is away: it waits, and costs no start.
        let (run, _) = site(&run, Event::NotYet("waits for dataset/x:1: its folder is away".into()));
        let (run, effects) = site(&run, look(false));
        assert_eq!((run.phase, effects), (Phase::Waiting, vec![Effect::Check]));
        assert_eq!(run.message.as_deref(), Some("waits for dataset/x:1: its folder is away"));
        let (run, effects) = site(&run, look(true));
        assert_eq!((run.phase, run.starts, effects), (Phase::Training, 1, vec![Effect::Start]));
        assert_eq!(run.message, None);
    }
    // It was edited: that does not pass.
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), unchecked(Process::Absent));
    let (failed, _) = site(&run, Event::NotStarted("dataset/x:1 is no longer what was published".into()));
    assert_eq!(failed.phase, Phase::Failed);
    // A trainer that vanished is not started anew on what cannot be looked at either.
    let (run, _) = site(&run, Event::Looked(seen(Process::Absent)));
    let (run, effects) = site(&run, unchecked(Process::Absent));
    assert_eq!((run.phase, run.starts, effects), (Phase::Training, 1, vec![Effect::Check]));
    assert_eq!(site(&run, Event::Looked(seen(Process::Absent))).0.starts, 2);
}

#[test]
fn what_another_run_uses_stays_and_so_does_what_the_hub_no_longer_means() {
    let over = SiteRun { phase: Phase::Trained, want: Want::Release, ..SiteRun::new(desired(Want::Release)) };
    let named = |name: &str, phase, want| {
        let spec = Spec { name: name.parse().unwrap(), ..spec() };
        SiteRun { spec, phase, want, ..over.clone() }
    };
    let may = |others: &[SiteRun], what: &Borrowed| {
        let open: Vec<SiteRun> = others.iter().cloned().chain([over.clone()]).collect();
        may_go(&open, &over.spec.name, what)
    };
    let ours = borrowed().remove(0);
    assert!(may(&[], &ours));
    assert!(may(&[named("s", Phase::Failed, Want::Stop), named("q", Phase::Waiting, Want::Stop)], &ours));
    assert!(!may(&[named("s", Phase::Waiting, Want::Train)], &ours), "it may begin at any moment");
    assert!(!may(&[named("s", Phase::Training, Want::Release)], &ours), "it published by itself, and runs on");
    let mut other = named("s", Phase::Training, Want::Train);
    other.spec.inputs.retain(|input| input.artifact != ours.artifact);
    assert!(may(&[other], &ours), "it reads something else");
    assert!(!may(&[], &Borrowed { generation: Some(1), ..ours.clone() }), "brought anew since");
    assert!(!may_go(&[], &over.spec.name, &ours), "nobody knows the run");

    // Once its process is gone a run uses nothing, whatever came of it.
    for (want, process) in [(Want::Release, Process::Absent), (Want::Stop, Process::Ended(ended(1)))] {
        let wanted = DesiredRun { model: Some(model()), ..desired(want) };
        let run = SiteRun { phase: Phase::Training, want, ..SiteRun::new(wanted) };
        let (run, effects) = site(&run, Event::Looked(seen(process)));
        assert_eq!((run.phase, effects), (Phase::Trained, vec![Effect::Remove(borrowed())]));
    }
}

#[test]
fn what_cannot_be_given_back_is_told_and_tried_again() {
    let ended_run = || SiteRun { phase: Phase::Failed, message: Some("it ended with 3".into()), ..SiteRun::new(desired(Want::Stop)) };
    let failed = HubRun { state: RunState::Failed, message: Some("it ended with 3".into()), ..HubRun::new(spec()) };
    let told = |run: &SiteRun| hub(&failed, HubEvent::Reported(Box::new(run.report()))).0.told().unwrap();
    let (run, _) = site(&ended_run(), Event::NotRemoved { transfer: "t-1".into(), why: "dataset/x:1: the NAS is away".into() });
    assert_eq!(told(&run), "it ended with 3; at b: dataset/x:1: the NAS is away");
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!((run.released, effects), (false, vec![Effect::Remove(borrowed())]));
    let (run, _) = site(&run, removed());
    assert_eq!(told(&run), "it ended with 3");
    // What stays for good holds nobody up, and is told to the end.
    let (run, _) = site(&ended_run(), Event::Removed { transfer: "t-1".into(), stays: Some("image/x:1 stays".into()) });
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Stop))));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!((run.released, effects), (true, vec![]));
    assert_eq!(told(&run), "it ended with 3; at b: image/x:1 stays");
}

#[test]
fn a_trainer_that_vanishes_is_started_again_a_few_times() {
    let (mut run, _) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(seen(Process::Absent)));
    for start in 2..=TRAINER_STARTS_MAX {
        let (next, effects) = site(&run, Event::Looked(seen(Process::Absent)));
        assert_eq!((next.starts, effects), (start, vec![Effect::Start]));
        run = next;
    }
    let (run, effects) = site(&run, Event::Looked(seen(Process::Absent)));
    assert_eq!((run.phase, effects), (Phase::Failed, vec![]));
}

#[test]
fn nothing_overtakes_or_wipes_a_model_that_the_hub_has_not_heard_of() {
    let offering = |process| Seen { offering: true, ..seen(process) };
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(seen(Process::Absent)));
    // It is not started anew, which would begin with an empty folder; nor is it said to have ended.
    let (gone, effects) = site(&run, Event::Looked(offering(Process::Absent)));
    assert_eq!((gone.phase, gone.starts, effects), (Phase::Training, 1, vec![]));
    let none = Seen { has_output: false, ..offering(Process::Ended(ended(0))) };
    let (held, effects) = site(&run, Event::Looked(none));
    assert_eq!((held.phase, &held.ended, effects), (Phase::Training, &Some(ended(0)), vec![]));
    let (kept, _) = hub(&HubRun::new(spec()), looked(State::Done));
    let (kept, _) = hub(&kept, HubEvent::Reported(Box::new(held.report())));
    assert_eq!(kept.state, RunState::Training);
    // The hub heard of it.
    let (heard, _) = site(&held, Event::Wanted(Box::new(DesiredRun { model: Some(model()), ..desired(Want::Release) })));
    let (heard, effects) = site(&heard, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((heard.phase, effects), (Phase::Trained, vec![Effect::Remove(borrowed())]));
    // Or refused it: what is in the output folder counts.
    let (refused, _) = site(&held, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((refused.phase, refused.message), (Phase::Trained, None));
    // The same while the output is being published, and time ends it all the same.
    let publishing = SiteRun { phase: Phase::Publishing, want: Want::Publish, ..held };
    let (publishing, effects) = site(&publishing, Event::Looked(offering(Process::Ended(ended(0)))));
    assert_eq!((publishing.phase, effects), (Phase::Publishing, vec![]));
    let (again, effects) = site(&publishing, Event::Looked(seen(Process::Ended(ended(0)))));
    assert_eq!((again.phase, effects), (Phase::Publishing, vec![Effect::Publish]));
    let (late, _) = site::step(&publishing, Event::Looked(offering(Process::Ended(ended(0)))), 1000);
    assert_eq!(late.phase, Phase::Failed);
}

#[test]
fn a_start_wipes_nothing_that_was_published_out_of_the_folder() {
    let kept = |process| Seen { kept: Some("model/m:r".into()), ..seen(process) };
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(seen(Process::Absent)));
    // The hub has heard of the model and says so in a moment: the machine went down in between.
    let (gone, effects) = site(&run, Event::Looked(kept(Process::Absent)));
    assert_eq!((gone.phase, gone.starts, effects), (Phase::Training, 1, vec![]));
    let (heard, _) = site(&gone, Event::Wanted(Box::new(DesiredRun { model: Some(model()), ..desired(Want::Release) })));
    let (heard, effects) = site(&heard, Event::Looked(kept(Process::Absent)));
    assert_eq!((heard.phase, effects), (Phase::Trained, vec![Effect::Remove(borrowed())]));
    // One that ended well publishes what it left, whatever else it published on its way.
    let (ended_well, _) = site(&run, Event::Looked(kept(Process::Ended(ended(0)))));
    assert_eq!(ended_well.phase, Phase::Trained);
    // A folder that an older run of this name left.
    let (failed, effects) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(kept(Process::Absent)));
    assert_eq!((failed.phase, effects), (Phase::Failed, vec![]));
}

#[test]
fn stopping_ends_the_trainer_before_anything_is_removed() {
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(seen(Process::Absent)));
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Stop))));
    let (run, effects) = site(&run, Event::Looked(seen(Process::Running)));
    assert_eq!((run.phase, effects), (Phase::Training, vec![Effect::Stop]));
    let killed = Ended { exit_code: None, signal: Some(15), ..ended(0) };
    let (run, effects) = site(&run, Event::Looked(seen(Process::Ended(killed.clone()))));
    assert_eq!((run.phase, run.ended, effects), (Phase::Failed, Some(killed), vec![Effect::Remove(borrowed())]));
}

#[test]
fn when_time_is_up_a_site_cleans_up_though_it_hears_nothing() {
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(seen(Process::Absent)));
    let (run, effects) = site::step(&run, Event::Looked(seen(Process::Running)), 1000);
    assert_eq!(effects, [Effect::Stop]);
    let (run, effects) = site::step(&run, Event::Looked(seen(Process::Absent)), 1001);
    assert_eq!((run.phase, effects), (Phase::Failed, vec![Effect::Remove(borrowed())]));
    let (run, _) = site(&run, removed());
    let (run, effects) = site::step(&run, Event::Looked(seen(Process::Absent)), 1002);
    assert_eq!((run.released, effects), (false, vec![]), "the hub may still have something to say");
}

#[test]
fn a_site_without_a_trainer_says_so_before_anything_moves() {
    let nobody = Seen { trainer: Trainer::None, missing: Some("dataset/x:1".into()), ..seen(Process::Absent) };
    let (run, effects) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(nobody));
    assert_eq!((run.phase, effects), (Phase::Failed, vec![]));
    assert!(run.message.unwrap().contains("[train]"));
}

#[test]
fn a_platform_is_called_until_it_answers() {
    let platform = || Seen { trainer: Trainer::Platform, ..seen(Process::Absent) };
    let (run, effects) = site(&SiteRun::new(desired(Want::Train)), Event::Looked(platform()));
    assert_eq!((run.by_platform, effects), (true, vec![Effect::Start]));
    let (run, _) = site(&run, Event::NotStarted("connection refused".into()));
    let (run, effects) = site(&run, Event::Looked(platform()));
    assert_eq!((run.starts, effects), (1, vec![Effect::Start]), "a call is no start");
    let (run, _) = site(&run, Event::Called);
    let (run, effects) = site(&run, Event::Looked(platform()));
    assert_eq!((run.phase, effects), (Phase::Training, vec![]));
    let (run, _) = site(&run, Event::Wanted(Box::new(desired(Want::Publish))));
    let (run, effects) = site(&run, Event::Looked(Seen { has_output: false, ..platform() }));
    assert_eq!((run.phase, effects), (Phase::Failed, vec![]));
}

#[test]
fn a_platform_is_told_until_it_hears_that_its_run_is_over_without_a_model() {
    let look = || Event::Looked(Seen { trainer: Trainer::Platform, ..seen(Process::Absent) });
    let (run, _) = site(&SiteRun::new(desired(Want::Train)), look());
    let (run, _) = site(&run, Event::Called);
    let remove = Effect::Remove(borrowed());
    let (late, effects) = site::step(&run, look(), 1000);
    assert_eq!((late.phase, effects), (Phase::Failed, vec![Effect::Stop, remove.clone()]));
    // It did not hear. What was borrowed need not wait for that, nor need the hub.
    assert_eq!(site::step(&late, look(), 1001).1, [Effect::Stop, remove.clone()]);
    let (told, _) = site(&late, Event::Wanted(Box::new(desired(Want::Stop))));
    let (given, _) = site(&told, removed());
    let (given, effects) = site::step(&given, look(), 1002);
    assert_eq!((given.released, given.is_open(), effects), (true, true, vec![Effect::Stop]));
    let (heard, _) = site(&given, Event::CalledOff);
    assert!(!heard.is_open());
    assert!(site::step(&heard, look(), 1003).1.is_empty());
    // One that never hears is told for some hours.
    let hours = TRAINER_CALL_OFF_MAX.as_millis() as i64;
    assert_eq!(site::step(&given, look(), 999 + hours).1, [Effect::Stop]);
    let (left, effects) = site::step(&given, look(), 1000 + hours);
    assert_eq!((left.is_open(), effects), (false, vec![]));
    // It published by itself, or was never called.
    let (done, _) = site(&run, Event::Wanted(Box::new(DesiredRun { model: Some(model()), ..desired(Want::Release) })));
    assert_eq!(site(&done, look()).1, std::slice::from_ref(&remove));
    assert_eq!(site(&SiteRun::new(desired(Want::Stop)), look()).1, [remove]);
}

/// Both machines, and a world that does what they ask; messages are lost and repeated, and either side may at any moment
/// begin anew from what it has written.
mod together {
    use proptest::prelude::*;

    use super::*;

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
            let Ok((run, effects)) = hub::step(&self.hub, event, 1) else { return };
            self.hub = run;
            for effect in effects {
                match effect {
                    HubEffect::Borrow => self.delivered = true,
                    HubEffect::SendHome => self.home = Some(self.home.unwrap_or(State::Queued)),
                    HubEffect::Abandon => {
                        if self.input != State::Done {
                            self.input = State::Cancelled;
                        }
                        self.home = self.home.map(|home| if home == State::Done { home } else { State::Cancelled });
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
                    Effect::Stop => self.process = Process::Ended(Ended { exit_code: None, signal: Some(15), ..ended(0) }),
                    Effect::Publish => {
                        self.hub_event(HubEvent::Published(model()));
                        if self.hub.model.is_some() {
                            self.site_event(Event::Published(model()));
                        }
                    }
                    Effect::Remove(list) => {
                        assert_ne!(self.process, Process::Running, "nothing is taken from under a trainer");
                        if std::mem::take(&mut self.stuck) {
                            for b in list {
                                self.site_event(Event::NotRemoved { transfer: b.transfer, why: "it is held".into() });
                            }
                        } else if matches!(self.input, State::Done | State::Cancelled) {
                            self.removed = true;
                            list.into_iter().for_each(|b| self.site_event(Event::Removed { transfer: b.transfer, stays: None }));
                        }
                    }
                }
            }
        }

        fn turn(&mut self, what: u8) {
            match what % 9 {
                0 => {
                    let home = self.home.map(|state| input(state, None));
                    self.hub_event(HubEvent::Looked { delivered: self.delivered, inputs: vec![input(self.input, None)], home });
                }
                1 if self.delivered && self.input == State::Queued => self.input = State::Done,
                2 if self.home == Some(State::Queued) => self.home = Some(State::Done),
                3 => {
                    let (model, ready) = (self.hub.model.clone(), self.hub.is_ready());
                    let wanted = DesiredRun { want: self.hub.want(), model, ready, ..desired(Want::Train) };
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
                    let missing = (self.input != State::Done && !self.stale).then(|| "dataset/x:1".to_owned());
                    let process = self.process.clone();
                    let checked = std::mem::take(&mut self.checked);
                    self.site_event(Event::Looked(Seen { missing, checked, ..seen(process) }));
                }
                7 if self.process == Process::Running => self.process = Process::Ended(ended(self.exit)),
                8 if self.cancelled => self.hub_event(HubEvent::Cancel),
                _ => {}
            }
        }
    }

    proptest! {
        #[test]
        fn every_run_ends_and_gives_back(
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
}
