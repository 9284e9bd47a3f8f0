//! Fair shares of common resources: small artifacts go before large ones on a connection, and a
//! stalled site holds only its own share of the hub.

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::line::Line;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs, wait_for};

/// A size in the largest class: `SIZES` in `transfer/slots.rs`.
const LARGE: u64 = (256 << 20) + 1;

#[test]
fn a_small_artifact_does_not_wait_for_a_large_one() {
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
    // The rest of the file is a hole that is never transmitted during this test: it costs nothing.
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

    // For the large artifact, 32 MiB are requested at once, 12 MiB are read, and 8 MiB wait in the
    // send buffer. A small artifact that waits behind any of these arrives too late. The test
    // counts bytes and uses a slow connection, because a busy machine may pause for seconds.
    line.throttle(1 << 20);
    let transfer = hub.deliver(&["model/large:v1"], "chengdu").remove(0);
    hub.wait_transfer(&transfer, "on its way", secs(60), |t| {
        t.bytes.received >= 2 << 20
    });
    let before = line.down();
    hub.deliver_and_wait("dataset/small:v1", "chengdu", secs(60));
    let overtaken = line.down() - before;
    assert_same(&small, &site.folder("dataset/small:v1"));
    assert!(overtaken < 6 << 20, "{overtaken} bytes were sent before it");
    assert_eq!(hub.transfer(&transfer).state, "transferring");
    hub.cli(&["cancel", &transfer]).expect(0);
}

#[test]
fn a_tiny_artifact_does_not_wait_for_many_small_ones() {
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
    assert_eq!(going_on, MODELS.len(), "it must arrive before them");
    line.throttle(0);
    for id in &begun {
        hub.wait_done(id, secs(60));
    }
}

/// The bytes of one artifact that a site requests at once. A site fetches four artifacts at once,
/// which makes 128 MiB: without a bound they would take the hub's whole budget, or wait in its
/// memory.
const SIZE: usize = 32 << 20;
const MODELS: [&str; 4] = [
    "model/one:v1",
    "model/two:v1",
    "model/three:v1",
    "model/four:v1",
];
/// The allowed growth of the hub's memory for a stalled site: 12 MiB of its budget, 8 MiB of send
/// buffer, and the same again.
const GROWTH: u64 = 48 << 20;

#[test]
fn a_stalled_site_holds_only_its_own_share_of_the_hub() {
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
    // The peak memory of a process that has published nothing and has sent a whole model.
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
        wait_for("the transfers are running", secs(30), || {
            (line.down() - carried > 2 << 20).then_some(())
        });
        // From here on the connection carries almost nothing, for longer than this test lasts.
        line.throttle(64 << 10);
        hub.deliver_and_wait(model, "chengdu", secs(30));
        assert_same(&source(model), &well.folder(model));
        for id in &open {
            let transfer = hub.transfer(id);
            assert!(
                !transfer.is_final(),
                "{name} must be stalled: {transfer:#?}"
            );
        }
        let grown = hub.memory("VmHWM").saturating_sub(peak);
        println!("{name}, {transport}: the hub's memory grew by {grown} bytes");
        assert!(
            grown <= GROWTH,
            "the hub's memory grew by {grown} bytes while {name}, on {transport}, was stalled"
        );
    }
}
