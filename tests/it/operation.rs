//! What operators do to running daemons: reload, restore from a backup, export labels.

use std::process::Command;

use crate::support::command::{bound, run};
use crate::support::daemon::{Daemon, Hub, Site, SiteSpec};
use crate::support::data::copy_tree;
use crate::support::{Scratch, limit, secs, wait_for};

/// Sends SIGHUP to a daemon.
fn hang_up(daemon: &Daemon) {
    let mut kill: Command = bound("kill");
    run(kill.args(["-HUP", &daemon.pid().to_string()]), secs(10)).expect(0);
}

fn wait_for_log(daemon: &Daemon, words: &str) {
    wait_for(&format!("the log says {words:?}"), secs(30), || {
        daemon.log().contains(words).then_some(())
    });
}

#[test]
fn hangup_reloads_the_log_filter_the_token_and_the_certificate_and_ends_nothing() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let mut site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    assert!(!hub.log().contains(" DEBUG "), "{}", hub.log());

    // A filter that cannot be parsed changes nothing, and the daemon goes on.
    let text = std::fs::read_to_string(&hub.config).unwrap();
    std::fs::write(
        &hub.config,
        format!("{text}[log]\nfilter = \"packhorse=nonsense\"\n"),
    )
    .unwrap();
    hang_up(&hub);
    wait_for_log(&hub, "log.filter: it is not a valid filter");
    std::fs::write(
        &hub.config,
        format!("{text}[log]\nfilter = \"info,packhorse=debug\"\n"),
    )
    .unwrap();
    hang_up(&hub);
    wait_for_log(&hub, "the log filter was read again used=true");
    hub.cli(&["sites"]).expect(0);
    wait_for_log(&hub, "answered a request");
    assert!(hub.is_running());

    // A site that joins again has another certificate.
    hang_up(&site);
    wait_for_log(&site, "the certificate was read again changed=false");
    let token = hub.token("chengdu", &[]);
    let other = scratch.join("chengdu-again.toml");
    let text = std::fs::read_to_string(&site.config).unwrap();
    let data = format!("{}-again", site.data_dir.display());
    let text = text.replace(
        &format!("\"{}\"", site.data_dir.display()),
        &format!("{data:?}"),
    );
    std::fs::write(&other, text).unwrap();
    let mut join = bound(env!("CARGO_BIN_EXE_packhorse"));
    join.args([
        "join",
        "--hub",
        &hub.quic.to_string(),
        "--token",
        &token,
        "--config",
    ]);
    run(join.arg(&other), secs(60)).expect(0);
    std::fs::copy(
        format!("{data}/identity/site.pem"),
        site.data_dir.join("identity/site.pem"),
    )
    .unwrap();
    hang_up(&site);
    wait_for_log(&site, "the certificate was read again changed=true");
    assert!(site.is_running());
    hub.wait_online("chengdu", true, secs(20));
}

#[test]
fn a_site_that_a_restored_hub_does_not_know_reports_it() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    hub.stop();
    let backup = scratch.join("backup");
    copy_tree(&hub.data_dir, &backup);
    hub.start();
    let site = Site::start_new(scratch.path(), &hub, "late", &SiteSpec::default());
    hub.stop();
    std::fs::remove_dir_all(&hub.data_dir).unwrap();
    copy_tree(&backup, &hub.data_dir);
    hub.start();
    let report = wait_for("doctor names the reason", secs(60), || {
        let said = run(&mut site.command(&["doctor"]), secs(60));
        Some(said.out).filter(|out| out.contains("the hub does not know this site"))
    });
    assert!(
        report.contains("packhorse token create --site NAME"),
        "{report}"
    );
    wait_for_log(&hub, "is not registered at this hub");
    wait_for_log(
        &site,
        "the hub refused this site: the hub does not know this site",
    );
}

#[test]
fn the_hub_shows_when_it_last_received_anything_from_a_site() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let mut site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let seen = || {
        let sites = hub.json(&["sites"]);
        sites[0]["last_seen"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let first = seen();
    // Keep-alive packets of an idle connection count.
    let later = wait_for("a later time", secs(60), || {
        Some(seen()).filter(|now| *now > first)
    });
    site.stop();
    hub.wait_online("chengdu", false, secs(30));
    let last = wait_for("the time is stored", secs(30), || {
        Some(seen()).filter(|now| *now >= later)
    });
    // Nothing more is received from it: the worker that notes it has looked again.
    let looked = || {
        let (_, text) = hub.get("/v1/workers");
        let all: serde_json::Value = serde_json::from_str(&text).unwrap();
        let all = all.as_array().unwrap();
        let worker = all.iter().find(|row| row["name"] == "last-seen").unwrap();
        worker["iterations"].as_u64().unwrap()
    };
    let before = looked();
    wait_for("the hub has looked again", secs(30), || {
        (looked() > before).then_some(())
    });
    assert_eq!(seen(), last);
}

#[test]
fn labels_are_exported_at_the_hub_and_at_a_site() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let coco = r#"{"images":[{"id":7,"file_name":"a.png","width":640,"height":480,"split":"train"},{"id":8,"file_name":"b.png","width":640,"height":480}],
        "annotations":[{"id":1,"image_id":7,"category_id":3,"bbox":[10,20,30,40],"area":1200,"iscrowd":0,"attributes":{"by":"检验员"}}],
        "categories":[{"id":3,"name":"划痕","supercategory":"表面"},{"id":9,"name":"未用"}]}"#;
    let source = scratch.join("labels.json");
    std::fs::write(&source, coco).unwrap();
    hub.publish(&source, "labels/line3:v1", &[]);
    let out = scratch.join("coco");
    let export = |daemon: &Daemon, format: &str, out: &std::path::Path| {
        daemon.cli(&[
            "export-labels",
            "labels/line3:v1",
            "--format",
            format,
            "--out",
            out.to_str().unwrap(),
        ])
    };
    export(&hub, "coco", &out).expect(0);
    // What is exported is published again as the same labels, but for their own records.
    hub.publish(&out.join("annotations.json"), "labels/again:v1", &[]);
    let again = scratch.join("coco-again");
    hub.cli(&[
        "export-labels",
        "labels/again:v1",
        "--format",
        "coco",
        "--out",
        again.to_str().unwrap(),
    ])
    .expect(0);
    let text =
        |dir: &std::path::Path| std::fs::read_to_string(dir.join("annotations.json")).unwrap();
    assert_eq!(text(&again), text(&out));
    // A directory that exists is left alone.
    export(&hub, "coco", &out)
        .expect(6)
        .says(&["exists already"]);
    export(&hub, "csv", &hub.data_dir.join("inside")).expect(4);

    hub.deliver_and_wait("labels/line3:v1", "chengdu", secs(60));
    let voc = scratch.join("voc");
    let said = export(&site, "voc", &voc).expect(0).out;
    assert!(
        said.contains("classes without annotations are left out: 1: 未用"),
        "{said}"
    );
    let xml = std::fs::read_to_string(voc.join("Annotations/a.xml")).unwrap();
    assert!(xml.contains("<xmax>40</xmax><ymax>60</ymax>"), "{xml}");
    assert!(voc.join("Annotations/b.xml").exists());
}
