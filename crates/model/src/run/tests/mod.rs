//! The two machines, each alone and both together over a line that loses and repeats what it likes.

mod at_hub;
mod at_site;
mod together;

use super::hub::{Effect as HubEffect, Event as HubEvent, ObservedTransfer, Run as HubRun};
use super::site::{Effect, Event, Observation, Process, Run as SiteRun, Trainer};
use super::*;
use crate::transfer::State;
use base::fault::Code;
use content::chunk::Hash;

fn spec() -> Spec {
    let input = |artifact: &str, n: u8| Input {
        artifact: artifact.parse().unwrap(),
        digest: Hash([n; 32]),
        bytes: 10,
    };
    Spec {
        name: "r".parse().unwrap(),
        id: "r-1".parse().unwrap(),
        from: "a".parse().unwrap(),
        on: "b".parse().unwrap(),
        inputs: vec![input("dataset/x:1", 1), input("labels/x:1", 2)],
        expect: "model/m".parse().unwrap(),
        delivery: "d-1".parse().unwrap(),
        created_ms: 0,
        deadline_ms: 1000,
    }
}

fn model() -> Model {
    Model {
        artifact: "model/m:r".parse().unwrap(),
        digest: Hash([9; 32]),
    }
}

fn ended(code: i32) -> Ended {
    Ended {
        exit_code: Some(code),
        signal: None,
        message: format!("it ended with {code}").into(),
        tail: "last words".into(),
        ended_ms: 5,
    }
}

fn input(state: State, message: Option<&str>) -> ObservedTransfer {
    ObservedTransfer {
        id: "t-1".parse().unwrap(),
        state,
        message: message.map(Into::into),
    }
}

fn looked(state: State) -> HubEvent {
    HubEvent::Looked {
        delivered: true,
        inputs: vec![input(state, None)],
        home: None,
    }
}

#[track_caller]
fn hub(run: &HubRun, event: HubEvent) -> (HubRun, Vec<HubEffect>) {
    hub::step(run, event, 1).unwrap()
}

fn borrowed() -> Vec<Borrowed> {
    vec![Borrowed {
        transfer: "t-1".parse().unwrap(),
        artifact: "dataset/x:1".parse().unwrap(),
        digest: Hash([1; 32]),
        generation: Some(0),
    }]
}

fn removed() -> Event {
    Event::Removed {
        transfer: "t-1".parse().unwrap(),
        stays: None,
    }
}

fn desired(want: Want) -> DesiredRun {
    DesiredRun {
        spec: spec(),
        want,
        borrowed: borrowed(),
        model: None,
        ready: true,
    }
}

fn seen(process: Process) -> Observation {
    let trainer = Trainer::Command;
    Observation {
        missing: None,
        turn: true,
        trainer,
        process,
        has_output: true,
        offering: false,
        kept: None,
        checked: true,
    }
}

fn site(run: &SiteRun, event: Event) -> (SiteRun, Vec<Effect>) {
    site::step(run, event, 1)
}

#[test]
fn what_is_expected_is_a_model() {
    let any: Expect = "model/m".parse().unwrap();
    assert!(
        any.accepts(&"model/m:7".parse().unwrap()) && !any.accepts(&"model/n:7".parse().unwrap())
    );
    assert_eq!(
        any.reference(&"r".parse().unwrap()).unwrap().to_string(),
        "model/m:r"
    );
    let one: Expect = "model/m:2".parse().unwrap();
    assert!(
        one.accepts(&"model/m:2".parse().unwrap()) && !one.accepts(&"model/m:3".parse().unwrap())
    );
    assert_eq!(one.to_string(), "model/m:2");
    for bad in ["dataset/m", "model/", "model/M", "m", "model/m:"] {
        assert_eq!(
            bad.parse::<Expect>().unwrap_err().code,
            Code::Usage,
            "{bad}"
        );
    }
}
