//! Fair shares of what many use: on a line what is small goes before what is large, and at the hub
//! a site that is stuck holds its own part and nobody else's.

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs, wait_for};

/// Larger than all that is small: `SIZES` in `transfer/turn.rs`.
const LARGE: u64 = (256 << 20) + 1;

#[test]
fn what_is_small_does_not_wait_behind_what_is_large() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let (line, site) = Site::start_behind(scratch.path(), &hub, "chengdu");
    assert_eq!(hub.json(&["sites"])[0]["line"], "quic");
    let (large, small) = (scratch.join("large"), scratch.join("small"));
    data::write(
        &large.join("weights.bin"),
        &data::noise(&mut data::rng("large"), 64 << 20),
    );
    // A hole behind what crosses the line while this lasts: it costs nothing.
    std::fs::File::options()
        .write(true)
        .open(large.join("weights.bin"))
        .unwrap()
        .set_len(LARGE)
        .unwrap();
    data::write(
        &small.join("photo.png"),
        &data::noise(&mut data::rng("small"), 40_000),
    );
    hub.publish(&large, "model/large:v1", &[]);
    hub.publish(&small, "dataset/small:v1", &[]);

    // Of the large one 32 MiB are asked for at once, 12 are read and 8 wait to be sent: what waits
    // behind any of that comes too late. By bytes, and slowly, for a busy machine loses seconds.
    line.throttle(1 << 20);
    let transfer = hub.deliver(&["model/large:v1"], "chengdu").remove(0);
    hub.wait_transfer(&transfer, "on its way", secs(60), |t| {
        t.bytes.received >= 2 << 20
    });
    let before = line.down();
    hub.deliver_and_wait("dataset/small:v1", "chengdu", secs(60));
    let overtaken = line.down() - before;
    assert_same(&small, &site.folder("dataset/small:v1"));
    assert!(overtaken < 6 << 20, "{overtaken} bytes went before it");
    assert_eq!(hub.transfer(&transfer).state, "transferring");
    hub.cli(&["cancel", &transfer]).expect(0);
}

#[test]
fn what_is_tiny_does_not_wait_behind_all_that_is_small() {
    let _limit = limit(secs(150));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let (line, site) = Site::start_behind(scratch.path(), &hub, "chengdu");
    let tiny = scratch.join("tiny");
    data::write(
        &tiny.join("photo.png"),
        &data::noise(&mut data::rng("tiny"), 40_000),
    );
    hub.publish(&tiny, "dataset/tiny:v1", &[]);
    for model in MODELS {
        let source = scratch.join(&model.replace([':', '/'], "-"));
        data::write(
            &source.join("weights.bin"),
            &data::noise(&mut data::rng(model), 12 << 20),
        );
        hub.publish(&source, model, &[]);
    }
    line.throttle(1 << 20);
    let begun = hub.deliver(&MODELS, "chengdu");
    for id in &begun {
        hub.wait_transfer(id, "begun", secs(60), |t| t.state == "transferring");
    }
    hub.deliver_and_wait("dataset/tiny:v1", "chengdu", secs(60));
    assert_same(&tiny, &site.folder("dataset/tiny:v1"));
    let going_on = begun
        .iter()
        .filter(|id| !hub.transfer(id).is_final())
        .count();
    assert_eq!(going_on, MODELS.len(), "it was to be here before them");
    line.throttle(0);
    for id in &begun {
        hub.wait_done(id, secs(60));
    }
}

/// All that a site asks for at once of one artifact. Four of them, which is how many it brings at
/// once, are 128 MiB: without a bound they would take the whole of the hub's budget, or wait in its
/// memory.
const SIZE: usize = 32 << 20;
const MODELS: [&str; 4] = [
    "model/one:v1",
    "model/two:v1",
    "model/three:v1",
    "model/four:v1",
];
/// What the hub's memory may grow by for a stuck site: 12 MiB of its budget, 8 MiB that the line
/// holds to send, and as much again.
const GROWTH: u64 = 48 << 20;

#[test]
fn a_stuck_site_holds_its_part_of_the_hub_and_no_more() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let (over_quic, over_tcp) = (Line::to(hub.quic), Line::to(hub.quic));
    let well = Site::start_new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let stuck = [("wuhan", &over_quic, "quic"), ("hefei", &over_tcp, "tcp")];
    let _stuck_sites = stuck.map(|(name, line, transport)| {
        let more = format!("[line]\ntransport = \"{transport}\"\n");
        let spec = SiteSpec {
            through: Some(line.address()),
            more: &more,
            ..SiteSpec::default()
        };
        Site::start_new(scratch.path(), &hub, name, &spec)
    });
    let source = |model: &str| scratch.join(&model.replace([':', '/'], "-"));
    for model in MODELS {
        data::write(
            &source(model).join("weights.bin"),
            &data::noise(&mut data::rng(model), SIZE),
        );
        hub.publish(&source(model), model, &[]);
    }
    // The peak of a process that has published nothing, and that has sent a whole model before.
    hub.stop();
    hub.start();
    for name in ["chengdu", "wuhan", "hefei"] {
        hub.wait_online(name, true, secs(40));
    }
    hub.deliver_and_wait(MODELS[0], "chengdu", secs(60));

    for ((name, line, transport), &model) in stuck.into_iter().zip(&MODELS[1..]) {
        let sites = hub.json(&["sites"]);
        let site = sites
            .as_array()
            .unwrap()
            .iter()
            .find(|site| site["name"] == name)
            .unwrap();
        assert_eq!(site["line"], transport);
        let (peak, carried) = (hub.memory("VmHWM"), line.down());
        line.throttle(512 << 10);
        let open = hub.deliver(&MODELS, name);
        for id in &open {
            hub.wait_transfer(id, "begun", secs(30), |t| t.state == "transferring");
        }
        wait_for("they are on their way", secs(30), || {
            (line.down() - carried > 2 << 20).then_some(())
        });
        // From here on hardly anything, for longer than this test lasts.
        line.throttle(64 << 10);
        hub.deliver_and_wait(model, "chengdu", secs(30));
        assert_same(&source(model), &well.folder(model));
        for id in &open {
            let transfer = hub.transfer(id);
            assert!(
                !transfer.is_final(),
                "{name} was to be stuck: {transfer:#?}"
            );
        }
        let grown = hub.memory("VmHWM").saturating_sub(peak);
        println!("{name}, {transport}: the hub's memory grew by {grown} bytes");
        assert!(
            grown <= GROWTH,
            "the hub's memory grew by {grown} bytes while {name}, on {transport}, was stuck"
        );
    }
}
