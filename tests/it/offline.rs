//! Deliveries that wait, or are paused, cancelled and retried; cursors and selectors; the output of
//! `--wait`.

use serde_json::Value;

use crate::support::daemon::{Hub, Site, SiteSpec, Transfer, ids};
use crate::support::data;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs, wait_for};

/// A folder with a small file.
fn little(scratch: &Scratch, name: &str) -> std::path::PathBuf {
    let root = scratch.join(name);
    data::write(
        &root.join("数据.bin"),
        &data::noise(&mut data::rng(name), 300_000),
    );
    root
}

#[test]
fn an_offline_site_receives_the_artifact_when_it_connects() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let mut site = Site::new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    site.join(&hub, &[]);
    let source = little(&scratch, "model");
    let published = hub.publish(&source, "model/m:v1", &["--to", "chengdu"]);
    let id = ids(&published).remove(0);
    let waiting = hub.transfer(&id);
    assert_eq!(
        (waiting.state.as_str(), waiting.reason.as_deref()),
        ("queued", Some("site_offline")),
        "{waiting:#?}"
    );
    assert!(
        waiting.next.is_some_and(|n| !n.is_empty()),
        "the output of a wait has a next step"
    );

    // The delivery survives a restart of the hub.
    hub.stop();
    hub.start();
    assert_eq!(hub.transfer(&id).state, "queued");
    hub.kill();
    hub.start();
    assert_eq!(hub.transfer(&id).state, "queued");

    site.start();
    hub.wait_done(&id, secs(60));
    assert_same(&source, &site.folder("model/m:v1"));
}

#[test]
fn waiting_has_a_deadline() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    site.join(&hub, &[]);
    hub.publish(&little(&scratch, "model"), "model/m:v1", &[]);
    let late = hub
        .cli(&[
            "deliver",
            "model/m:v1",
            "--to",
            "chengdu",
            "--wait",
            "--timeout",
            "2s",
        ])
        .expect(11);
    assert!(
        late.err.contains("chengdu"),
        "the output names the missing sites: {}",
        late.err
    );
    let open = hub.transfers(&[]);
    assert!(
        open.len() == 1 && open[0].state == "queued",
        "the transfers continue: {open:#?}"
    );
}

#[test]
fn a_transfer_is_paused_resumed_cancelled_and_retried() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let (line, site) = Site::start_behind(scratch.path(), &hub, "chengdu");
    let source = scratch.join("model");
    data::model(&source, 24 << 20);
    hub.publish(&source, "model/m:v1", &[]);
    // So that it cannot complete before it is paused.
    line.hold_at(line.down() + (14 << 20));
    let id = hub.deliver(&["model/m:v1"], "chengdu").remove(0);
    hub.wait_transfer(&id, "on its way", secs(30), |t| t.bytes.received > 3 << 20);

    hub.cli(&["pause", &id]).expect(0);
    line.throttle(3 << 20);
    line.hold_at(0);
    let held = hub.wait_transfer(&id, "paused", secs(10), |t| t.state == "paused");
    assert_eq!(held.reason.as_deref(), Some("paused_by_user"));
    line.wait_quiet(secs(20));
    let quiet = hub.transfer(&id).bytes;
    assert!(quiet.committed > 0, "something is durable: {quiet:?}");
    hub.stop();
    hub.start();
    hub.wait_online("chengdu", true, secs(75));
    assert_eq!(
        hub.transfer(&id).state,
        "paused",
        "a paused transfer stays paused after a restart"
    );

    line.hold_at(line.down() + (6 << 20));
    hub.cli(&["resume", &id]).expect(0);
    // No counter ever decreases, neither during planning nor later: committed content is reused.
    hub.wait_transfer(&id, "running again", secs(30), |t| {
        let (was, now) = (quiet, t.bytes);
        let pairs = [
            (was.committed, now.committed),
            (was.received, now.received),
            (was.resumed, now.resumed),
            (was.wire, now.wire),
        ];
        assert!(
            pairs.iter().all(|(was, now)| now >= was),
            "progress decreased: {was:?} then {now:?}"
        );
        t.state == "transferring" && now.received > was.received && now.resumed >= was.committed
    });

    hub.cli(&["cancel", &id]).expect(0);
    line.hold_at(0);
    let gone = hub.wait_transfer(&id, "cancelled", secs(10), |t| t.state == "cancelled");
    assert_eq!(gone.reason.as_deref(), Some("cancelled_by_user"));
    wait_for("the site cleans its staging", secs(20), || {
        site.leftovers().is_empty().then_some(())
    });
    assert!(!site.folder("model/m:v1").exists());

    line.throttle(0);
    hub.cli(&["retry", &id]).expect(0);
    hub.wait_done(&id, secs(60));
    assert_same(&source, &site.folder("model/m:v1"));

    hub.cli(&["pause", &id]).expect(6);
    hub.cli(&["pause", "no-such-transfer"]).expect(5);
    hub.cli(&["status", "no-such-transfer"]).expect(5);
}

/// The largest cursor in a list.
fn cursor(transfers: &[Transfer]) -> String {
    transfers
        .iter()
        .map(|t| t.cursor)
        .max()
        .expect("a list with transfers")
        .to_string()
}

#[test]
fn a_cursor_stays_valid_after_restarts() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let mut site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    hub.publish(
        &little(&scratch, "one"),
        "model/one:v1",
        &["--to", "all", "--wait"],
    );
    let all = hub.transfers(&["--since", "0"]);
    assert_eq!(all.len(), 1);
    let at_hub = cursor(&all);
    assert!(
        hub.transfers(&["--since", &at_hub]).is_empty(),
        "nothing has changed since"
    );
    let at_site = cursor(&site.transfers(&["--since", "0"]));

    hub.kill();
    hub.start();
    site.stop();
    site.start();
    hub.wait_online("chengdu", true, secs(75));
    assert!(
        hub.transfers(&["--since", &at_hub]).is_empty(),
        "a restart does not change a transfer"
    );

    hub.publish(
        &little(&scratch, "two"),
        "model/two:v1",
        &["--to", "all", "--wait"],
    );
    for (daemon, since) in [(&*hub, &at_hub), (&*site, &at_site)] {
        let news = daemon.transfers(&["--since", since]);
        assert_eq!(news.len(), 1, "only new changes: {news:#?}");
        assert_eq!(news[0].artifact, "model/two:v1");
    }
    let lines = hub.cli(&["status", "-o", "ndjson"]).expect(0).out;
    let parsed: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(parsed.len(), 2, "one object per line: {lines}");
    let table = hub.cli(&["status"]).expect(0).out;
    assert!(
        table.contains("model/one:v1") && table.contains("chengdu") && !table.contains('\u{1b}'),
        "{table}"
    );
}

#[test]
fn sites_are_chosen_by_name_label_and_all() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let sites = [
        ("chengdu", ["region=west", "line=1"]),
        ("wuhan", ["region=east", "line=2"]),
        ("hefei", ["region=east", "line=3"]),
    ];
    for (name, labels) in &sites {
        Site::new(scratch.path(), &hub, name, &SiteSpec::default()).join(&hub, labels);
    }
    let listed = hub.json(&["sites"]);
    assert_eq!(listed.as_array().unwrap().len(), 3);
    assert_eq!(
        listed
            .as_array()
            .unwrap()
            .iter()
            .find(|s| s["name"] == "wuhan")
            .unwrap()["labels"]["region"],
        "east"
    );

    for (i, (to, expected)) in [
        ("chengdu", vec!["chengdu"]),
        ("hefei,chengdu", vec!["chengdu", "hefei"]),
        ("all", vec!["chengdu", "hefei", "wuhan"]),
        ("region=east", vec!["hefei", "wuhan"]),
        ("region=east,line!=3", vec!["wuhan"]),
        ("region!=west", vec!["hefei", "wuhan"]),
    ]
    .into_iter()
    .enumerate()
    {
        let reference = format!("model/m{i}:v1");
        let published = hub.publish(
            &little(&scratch, &format!("m{i}")),
            &reference,
            &["--to", to],
        );
        let mut chosen: Vec<String> = ids(&published)
            .iter()
            .map(|id| hub.transfer(id).site)
            .collect();
        chosen.sort();
        assert_eq!(chosen, expected, "{to}");
    }
    for (to, code) in [
        ("beijing", 5),
        ("chengdu,beijing", 5),
        ("region=north", 5),
        ("chengdu,region=west", 2),
        ("", 2),
        ("Chengdu", 2),
    ] {
        let before = hub.transfers(&[]).len();
        let refused = hub
            .cli(&["deliver", "model/m0:v1", "--to", to])
            .expect(code);
        assert!(!refused.err.is_empty(), "the reason is reported");
        assert_eq!(
            hub.transfers(&[]).len(),
            before,
            "no transfer starts if a site is wrong: {to}"
        );
    }
    hub.cli(&["deliver", "model/none:v1", "--to", "all"])
        .expect(5)
        .says(&["model/none:v1"]);
    hub.cli(&["publish", "/", "--as", "model/never:v1", "--to", "beijing"])
        .expect(5)
        .says(&["beijing"]);
    hub.cli(&["show", "model/never:v1"]).expect(5);
}

#[test]
fn a_reference_has_only_one_content() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let source = little(&scratch, "model");
    let first = hub.publish(&source, "model/m:v1", &[]);
    assert_eq!(first["unchanged"], false);
    let again = hub.publish(&source, "model/m:v1", &[]);
    assert_eq!(
        (&again["digest"], &again["unchanged"]),
        (&first["digest"], &Value::Bool(true))
    );
    assert_eq!(again["stored"], 0, "nothing is stored twice");
    data::write(&source.join("more.bin"), b"other content");
    hub.cli(&["publish", source.to_str().unwrap(), "--as", "model/m:v1"])
        .expect(6)
        .says(&["model/m:v1"]);
    assert_eq!(
        hub.json(&["show", "model/m:v1"])["digest"],
        first["digest"],
        "the first content is unchanged"
    );
    let second = hub.publish(&source, "model/m:v2", &[]);
    assert_ne!(second["digest"], first["digest"]);
    assert_eq!(hub.artifacts().len(), 2);
}

#[test]
fn a_failure_at_some_sites_has_exit_code_seven() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let good = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let bad = Site::start_new(scratch.path(), &hub, "wuhan", &SiteSpec::default());
    // A user put other files at the version's folder: packhorse never replaces them.
    data::write(&bad.folder("model/m:v1").join("foreign.txt"), b"in the way");
    let answer = hub.cli(&[
        "publish",
        little(&scratch, "model").to_str().unwrap(),
        "--as",
        "model/m:v1",
        "--to",
        "all",
        "--wait",
        "-o",
        "json",
    ]);
    let answer = answer.expect(7);
    assert!(
        answer.err.contains("wuhan"),
        "the output names the site: {}",
        answer.err
    );
    let states: Vec<(String, String)> = hub
        .transfers(&[])
        .into_iter()
        .map(|t| (t.site, t.state))
        .collect();
    assert!(
        states.contains(&("chengdu".into(), "done".into()))
            && states.contains(&("wuhan".into(), "failed".into())),
        "{states:?}"
    );
    assert!(good.folder("model/m:v1").is_dir());

    assert!(bad.folder("model/m:v1").join("foreign.txt").exists());
    std::fs::remove_dir_all(bad.folder("model/m:v1")).unwrap();
    let failed = hub
        .transfers(&[])
        .into_iter()
        .find(|t| t.state == "failed")
        .unwrap();
    assert!(
        failed.message.is_some() && failed.next.is_some(),
        "a failure has a reason and a next step: {failed:#?}"
    );
    hub.cli(&["retry", &failed.id]).expect(0);
    hub.wait_done(&failed.id, secs(60));
}

#[test]
fn a_plan_transmits_no_content() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    hub.publish(&little(&scratch, "model"), "model/m:v1", &[]);
    let plan = hub.json(&["plan", "model/m:v1", "--to", "all"]);
    assert_eq!(plan.as_array().unwrap().len(), 1, "{plan}");
    assert_eq!(
        (&plan[0]["site"], &plan[0]["total"]),
        (&Value::from("chengdu"), &Value::from(300_000))
    );
    assert!(
        plan[0]["missing"].as_u64().is_some_and(|m| m >= 300_000),
        "{plan}"
    );
    assert!(hub.transfers(&[]).is_empty() && !site.folder("model/m:v1").exists());
    hub.deliver_and_wait("model/m:v1", "chengdu", secs(60));
    let plan = hub.json(&["plan", "model/m:v1", "--to", "chengdu"]);
    assert_eq!(
        plan[0]["missing"], 0,
        "content that the site has costs nothing: {plan}"
    );
}

#[test]
fn an_artifact_is_transported_on_a_disk() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let other_dir = scratch.folder("other");
    let other = Hub::start_new(&other_dir);
    let source = data::dataset(&scratch.join("dataset"), 30).root;
    let published = hub.publish(&source, "dataset/d:v1", &[]);
    let file = scratch.join("artifacts.pack");
    hub.cli(&["export", "dataset/d:v1", "--out", file.to_str().unwrap()])
        .expect(0);
    other.cli(&["import", file.to_str().unwrap()]).expect(0);
    assert_eq!(
        other.json(&["show", "dataset/d:v1"])["digest"],
        published["digest"]
    );
    other.cli(&["verify", "dataset/d:v1"]).expect(0);

    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let third = Hub::start_new(&scratch.folder("third"));
    third.cli(&["import", file.to_str().unwrap()]).expect(8);
    assert!(
        third.artifacts().is_empty(),
        "nothing is imported from a damaged file"
    );
}

#[test]
fn a_transfer_resumes_after_a_machine_was_suspended() {
    let _limit = limit(secs(150));
    let scratch = Scratch::new();
    // In one pair the site is suspended, in the other the hub, at the same time and for longer than
    // a silent connection is kept.
    let pairs: Vec<_> = ["site", "hub"]
        .map(|who| {
            let dir = scratch.folder(who);
            let hub = Hub::start_new(&dir);
            let (line, site) = Site::start_behind(&dir, &hub, "chengdu");
            let source = dir.join("model");
            data::model(&source, 24 << 20);
            hub.publish(&source, "model/m:v1", &[]);
            line.hold_at(line.down() + (22 << 20));
            let id = hub.deliver(&["model/m:v1"], "chengdu").remove(0);
            let seen = hub.wait_transfer(&id, "on its way", secs(60), |t| {
                t.bytes.committed >= 14 << 20
            });
            (hub, site, line, source, id, seen)
        })
        .into();
    let [(hub_awake, site_asleep, ..), (hub_asleep, site_awake, ..)] = &pairs[..] else {
        unreachable!()
    };
    site_asleep.freeze();
    hub_asleep.freeze();
    hub_awake.wait_online("chengdu", false, secs(60));
    wait_for("the site closes the connection", secs(60), || {
        site_awake
            .log()
            .contains("the connection to the hub ended")
            .then_some(())
    });
    site_asleep.thaw();
    hub_asleep.thaw();
    for (hub, site, line, source, id, seen) in &pairs {
        line.hold_at(0);
        let done = hub.wait_done(id, secs(60));
        assert!(
            done.bytes.resumed + done.bytes.received >= seen.bytes.total,
            "{:?}",
            done.bytes
        );
        assert_same(source, &site.folder("model/m:v1"));
        assert_eq!(site.leftovers(), Vec::<std::path::PathBuf>::new());
    }
}
