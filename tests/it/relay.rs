//! Site to site through the hub: content that is published at one site arrives at others, whichever
//! daemon is offline in between, and its site sends it only once.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rand::Rng;
use serde_json::json;

use crate::support::command::tool;
use crate::support::daemon::{Hub, Site, SiteSpec, ids};
use crate::support::line::Line;
use crate::support::registry::Registry;
use crate::support::{
    Scratch, data, disk_usage, images, is_root, labels, limit, secs, tool_user, tree, wait_for,
};

const MIB: u64 = 1 << 20;

/// A model of noise, which does not compress.
fn model(folder: &Path, mib: u64) -> PathBuf {
    data::model(folder, (mib * MIB) as usize);
    folder.to_owned()
}

/// The most bytes that A may send for so many unique bytes and so many kills: the documented
/// promise, for any connection.
fn uplink_max(bytes: u64, kills: u64) -> u64 {
    uplink_of(bytes, kills, 64 * MIB)
}

fn uplink_of(bytes: u64, kills: u64, each: u64) -> u64 {
    bytes * 105 / 100 + each * kills + MIB
}

#[test]
fn a_site_sends_its_published_content_only_once_for_all_receivers() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let (line, mut a) = Site::start_behind(dir.path(), &hub, "a");
    let b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let set = data::dataset(&dir.join("set"), 60);
    data::operator(&dir.join("operator"));
    data::write(
        &dir.join("weights.bin"),
        &data::noise(&mut data::rng("weights"), 9 << 20),
    );
    let coco = dir.join("labels.json");
    data::write(
        &coco,
        labels::coco(&set.photos, &labels::marks(&set.photos, 2))
            .to_string()
            .as_bytes(),
    );

    let published = a.publish(&set.root, "dataset/line:v1", &[]);
    assert!(
        published.get("note").is_none(),
        "the hub has the artifact: {published}"
    );
    a.publish(&dir.join("operator"), "operator/detect:v1", &[]);
    a.publish(&dir.join("weights.bin"), "model/detect:v1", &[]);
    a.publish(&coco, "labels/line:v1", &["--for", "dataset/line:v1"]);
    assert!(
        disk_usage(&a.data_dir.join("published")) < MIB,
        "only the canonical label files are written"
    );
    assert_eq!(
        disk_usage(&hub.data_dir.join("relay/packs")),
        0,
        "no bytes were requested yet"
    );
    let shown = hub.json(&["show", "dataset/line:v1"]);
    assert_eq!(shown["origin"], "a");
    assert_eq!(shown["digest"], published["digest"]);
    // A repeated publish has the same result.
    assert_eq!(
        a.publish(&set.root, "dataset/line:v1", &[])["unchanged"],
        true
    );
    data::write(&set.root.join("more.txt"), b"more");
    a.cli(&[
        "publish",
        set.root.to_str().unwrap(),
        "--as",
        "dataset/line:v1",
    ])
    .expect(6);
    std::fs::remove_file(set.root.join("more.txt")).unwrap();

    // Requested at A, which waits for transfers to B.
    let all = [
        "dataset/line:v1",
        "operator/detect:v1",
        "model/detect:v1",
        "labels/line:v1",
    ];
    let args: Vec<&str> = ["deliver"]
        .into_iter()
        .chain(all)
        .chain(["--to", "b", "--wait", "--timeout", "90s"])
        .collect();
    a.cli(&args).expect(0);
    tree::assert_same(&set.root, &b.folder("dataset/line:v1"));
    tree::assert_same(&dir.join("operator"), &b.folder("operator/detect:v1"));
    assert_eq!(
        blake3::hash(&std::fs::read(b.folder("model/detect:v1").join("weights.bin")).unwrap()),
        blake3::hash(&std::fs::read(dir.join("weights.bin")).unwrap()),
    );
    for reference in all {
        a.cli(&["verify", reference]).expect(0);
        b.cli(&["verify", reference]).expect(0);
        hub.cli(&["verify", reference]).expect(0);
    }

    // The second receiver costs A nothing, and A need not be online.
    let sent = line.up();
    let bytes: u64 = [set.root.clone(), dir.join("operator")]
        .iter()
        .map(|f| disk_usage(f))
        .sum::<u64>()
        + (9 << 20);
    assert!(
        sent < uplink_max(bytes, 0) + 2 * MIB,
        "A sent {sent} bytes of {bytes}"
    );
    a.stop();
    let c = Site::start_new(dir.path(), &hub, "c", &SiteSpec::default());
    // B may forward the artifacts that it received.
    let transfers = ids(&b.json(&["deliver", "dataset/line:v1", "model/detect:v1", "--to", "c"]));
    for id in &transfers {
        hub.wait_done(id, secs(60));
    }
    tree::assert_same(&set.root, &c.folder("dataset/line:v1"));
    assert!(
        line.up() - sent < MIB,
        "the hub requested content from A again"
    );
    // The hub's own artifacts cannot be pinned; the artifacts of sites can.
    assert_eq!(hub.json(&["pin", "model/detect:v1"])["pinned"], true);
    assert!(
        hub.json(&["unpin", "model/detect:v1"])
            .get("pinned")
            .is_none()
    );
}

#[test]
fn a_site_shows_all_parts_of_a_delivery_that_it_requested() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let mut hub = Hub::start_new(dir.path());
    let a = Site::start_new(dir.path(), &hub, "a", &SiteSpec::default());
    let b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let c = Site::start_new(dir.path(), &hub, "c", &SiteSpec::default());
    a.publish(&model(&dir.join("one"), 1), "model/one:v1", &[]);
    a.publish(&model(&dir.join("two"), 2), "model/two:v1", &[]);
    let deliver = |to: &str| {
        let answer = a.json(&["deliver", "model/one:v1", "model/two:v1", "--to", to]);
        for id in ids(&answer) {
            hub.wait_done(&id, secs(60));
        }
        (
            answer["delivery"].as_str().unwrap().to_owned(),
            ids(&answer),
        )
    };
    let shows = |site: &Site, delivery: &str, parts: &[String], sites: &[&str]| {
        let shown = site.cli(&["status", delivery]).expect(0).out;
        assert!(
            shown.contains(&format!("{0} of {0} parts", parts.len())),
            "{}: {shown}",
            site.name
        );
        assert!(
            parts.iter().all(|id| shown.contains(id.as_str())),
            "{}: {shown}",
            site.name
        );
        let mut to: Vec<String> = site
            .transfers(&[delivery])
            .into_iter()
            .map(|t| t.site)
            .collect();
        to.sort();
        assert_eq!(to, sites, "{}", site.name);
    };
    let (to_b, at_b) = deliver("b");
    shows(&a, &to_b, &at_b, &["b", "b"]);
    // A transfer to B that is done already is part of the delivery.
    let (to_both, at_both) = deliver("a,b");
    assert!(
        at_both.len() == 4 && at_b.iter().all(|id| at_both.contains(id)),
        "{at_b:?} {at_both:?}"
    );
    shows(&a, &to_both, &at_both, &["a", "a", "b", "b"]);
    shows(&b, &to_both, &at_both, &["a", "a", "b", "b"]);

    // A site that holds none of its artifacts gets the same answer as for a delivery that does not
    // exist.
    let asked = |delivery: &str| {
        let refused = c.cli(&["status", delivery]).expect(5);
        let (code, body) = c.get(&format!("/v1/deliveries/show?id={delivery}"));
        assert_eq!(code, 404, "{body}");
        let (changed, told) = c.get(&format!("/v1/transfers?id={delivery}&since=1000000"));
        assert_eq!(changed, 404, "{told}");
        [refused.err, body, told].map(|text| text.replace(delivery, "DELIVERY"))
    };
    let absent = asked("d-0");
    assert_eq!(asked(&to_b), absent);
    assert_eq!(asked(&to_both), absent);

    // A cursor of the hub has no meaning at A, and vice versa: a client with a foreign cursor
    // receives all transfers.
    let told = |query: &str| a.get_rows(&format!("/v1/transfers?{query}"));
    let own = at_both
        .iter()
        .find(|id| a.transfers(&[id.as_str()])[0].site == "a")
        .unwrap();
    let (of_hub, here) = (told(&format!("id={to_both}")), told(&format!("id={own}")));
    assert_eq!((of_hub.0, here.0), (4, 1));
    assert_eq!(told(&format!("id={own}&since={}", of_hub.1)), here);
    assert_eq!(told(&format!("id={to_both}&since={}", here.1)), of_hub);
    assert_eq!(
        told(&format!("id={own}&since={}", here.1)).0,
        0,
        "with its own cursor there is nothing new"
    );

    // Without the hub, A knows only its own part, and reports that.
    hub.stop();
    let shown = a.cli(&["status", &to_both]).expect(0).out;
    assert!(
        shown.contains("2 of 2 parts") && shown.contains("this site's part only"),
        "{shown}"
    );
    a.cli(&["status", &to_b]).expect(10);
}

#[test]
fn an_artifact_arrives_although_either_end_is_offline_for_a_time() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let mut hub = Hub::start_new(dir.path());
    let (line, mut a) = Site::start_behind(dir.path(), &hub, "a");
    let mut b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let folder = model(&dir.join("model"), 40);
    b.stop();
    hub.wait_online("b", false, secs(40));
    // The hub is offline while A publishes: A sends the offer later.
    hub.stop();
    let published = a.publish(&folder, "model/away:v1", &["--to", "b"]);
    assert!(
        published["note"]
            .as_str()
            .is_some_and(|note| note.contains("hub")),
        "{published}"
    );
    hub.start();
    let transfer = wait_for("the hub has the artifact", secs(40), || {
        hub.transfers(&[]).into_iter().next()
    });
    assert_eq!(transfer.artifact, "model/away:v1");
    assert!(transfer.has_reason(&["site_offline"]), "{transfer:#?}");
    let packs = hub.data_dir.join("relay/packs");
    wait_for("the hub has the complete artifact", secs(60), || {
        (disk_usage(&packs) > 40 * MIB).then_some(())
    });
    wait_for("prefetched", secs(20), || {
        hub.log().contains(": prefetched digest=").then_some(())
    });
    a.stop();
    hub.wait_online("a", false, secs(60));
    b.start();
    hub.wait_done(&transfer.id, secs(60));
    tree::assert_same(&folder, &b.folder("model/away:v1"));
    assert!(
        line.up() < uplink_max(40 * MIB, 0) + MIB,
        "A sent {}",
        line.up()
    );
}

#[test]
fn an_unreadable_source_does_not_block_the_prefetch_of_other_artifacts() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let mut a = Site::start_new(dir.path(), &hub, "a", &SiteSpec::default());
    let mut b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    b.stop();
    hub.wait_online("b", false, secs(40));
    let away = dir.folder("away");
    let all = ["one", "two", "three"];
    let reference = |name: &str| format!("model/{name}:v1");
    for name in all {
        data::write(
            &dir.join(name).join("weights.bin"),
            &data::noise(&mut data::rng(name), 4 << 20),
        );
        a.publish(&dir.join(name), &reference(name), &[]);
    }
    // The first requested artifacts, as many as are prefetched at once, are on a NAS that is not
    // mounted.
    for name in &all[..2] {
        std::fs::rename(dir.join(name), away.join(name)).unwrap();
    }
    let ids: Vec<String> = all
        .iter()
        .flat_map(|name| hub.deliver(&[&reference(name)], "b"))
        .collect();
    let fetched = |count: usize| {
        let what = format!("{count} of {} are prefetched", all.len());
        wait_for(&what, secs(60), || {
            (hub.log().matches(": prefetched digest=").count() >= count).then_some(())
        });
    };
    fetched(1);
    for name in &all[..2] {
        std::fs::rename(away.join(name), dir.join(name)).unwrap();
    }
    fetched(3);
    a.stop();
    hub.wait_online("a", false, secs(40));
    b.start();
    for (name, id) in all.iter().zip(&ids) {
        hub.wait_done(id, secs(60));
        tree::assert_same(&dir.join(name), &b.folder(&reference(name)));
    }
}

#[test]
fn an_offline_source_is_the_reason_and_its_return_resumes_the_transfer() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let mut a = Site::start_new(dir.path(), &hub, "a", &SiteSpec::default());
    let b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let folder = model(&dir.join("model"), 8);
    a.publish(&folder, "model/later:v1", &[]);
    a.stop();
    hub.wait_online("a", false, secs(40));
    let id = hub.deliver(&["model/later:v1"], "b").remove(0);
    let waits = hub.wait_transfer(&id, "waiting", secs(40), |t| {
        t.has_reason(&["waiting_for_source"])
    });
    assert!(
        waits.next.is_some() && waits.message.is_some(),
        "{waits:#?}"
    );
    a.start();
    hub.wait_done(&id, secs(60));
    tree::assert_same(&folder, &b.folder("model/later:v1"));
}

#[test]
fn chunks_are_forwarded_before_the_source_has_sent_a_tenth() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let (line_a, line_b) = (Line::to(hub.quic), Line::to(hub.quic));
    let a = Site::start_new(
        dir.path(),
        &hub,
        "a",
        &SiteSpec {
            through: Some(line_a.address()),
            ..SiteSpec::default()
        },
    );
    let b = Site::start_new(
        dir.path(),
        &hub,
        "b",
        &SiteSpec {
            through: Some(line_b.address()),
            ..SiteSpec::default()
        },
    );
    let folder = model(&dir.join("model"), 128);
    a.publish(&folder, "model/through:v1", &[]);
    // B first fetches the manifest, which is much smaller than this.
    let manifest = 2 * MIB;
    let (sent, received) = (line_a.up(), line_b.down());
    line_a.hold_up_at(sent + 128 * MIB / 10);
    let id = hub.deliver(&["model/through:v1"], "b").remove(0);
    wait_for("B has its first bytes", secs(25), || {
        (line_b.down() - received > manifest).then_some(())
    });
    line_a.hold_up_at(0);
    hub.wait_done(&id, secs(120));
    tree::assert_same(&folder, &b.folder("model/through:v1"));
    let sent = line_a.up() - sent;
    assert!(sent < uplink_max(128 * MIB, 0), "A sent {sent}");
}

#[test]
fn two_simultaneous_receivers_cost_the_source_one_upload() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let (line, a) = Site::start_behind(dir.path(), &hub, "a");
    let others: Vec<Site> = ["b", "c", "d"]
        .iter()
        .map(|name| Site::start_new(dir.path(), &hub, name, &SiteSpec::default()))
        .collect();
    let folder = model(&dir.join("model"), 64);
    a.publish(&folder, "model/many:v1", &[]);
    let sent = line.up();
    for id in hub.deliver(&["model/many:v1"], "b,c,d") {
        hub.wait_done(&id, secs(120));
    }
    for site in &others {
        tree::assert_same(&folder, &site.folder("model/many:v1"));
    }
    let sent = line.up() - sent;
    assert!(
        sent < uplink_max(64 * MIB, 0),
        "A sent {sent} bytes of {}",
        64 * MIB
    );
}

#[test]
fn a_file_that_changed_after_the_publish_fails_the_transfer_and_is_named() {
    let _limit = limit(secs(120));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let a = Site::start_new(dir.path(), &hub, "a", &SiteSpec::default());
    let b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let set = data::dataset(&dir.join("set"), 20);
    a.publish(&set.root, "dataset/line:v1", &[]);
    let coco = dir.join("labels.json");
    data::write(
        &coco,
        labels::coco(&set.photos, &labels::marks(&set.photos, 2))
            .to_string()
            .as_bytes(),
    );
    a.publish(&coco, "labels/line:v1", &["--for", "dataset/line:v1"]);
    let file = set.root.join(&set.photos[7].path);
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    bad[40] ^= 1;
    std::fs::write(&file, bad).unwrap();
    // A client that waits for the labels of this dataset is informed and does not wait any longer.
    let parts = [
        "deliver",
        "dataset/line:v1",
        "labels/line:v1",
        "--to",
        "b",
        "--wait",
        "--timeout",
        "60s",
    ];
    let said = [
        "2 of 2 transfers did not arrive: dataset/line:v1 at b (integrity), labels/line:v1 at b (waits for dataset/line:v1)",
    ];
    hub.cli(&parts).expect(7).says(&said);
    let all = hub.transfers(&[]);
    let failed = all
        .iter()
        .find(|t| t.artifact == "dataset/line:v1")
        .unwrap();
    let waiting = all.iter().find(|t| t.artifact == "labels/line:v1").unwrap();
    assert_eq!(
        (failed.state.as_str(), failed.reason.as_deref()),
        ("failed", Some("integrity"))
    );
    assert!(
        failed
            .message
            .as_deref()
            .is_some_and(|m| m.contains(&set.photos[7].path)),
        "{failed:#?}"
    );
    assert!(
        !b.folder("dataset/line:v1").exists(),
        "no wrong content arrives"
    );
    hub.cli(&[
        "status",
        &format!("{},{}", failed.id, waiting.id),
        "--watch",
    ])
    .expect(7)
    .says(&said);
    // A delivery of only the labels reports it too, at the hub and at the site, with a next step.
    let next = format!("packhorse retry {}", failed.id);
    let alone = [
        "deliver",
        "labels/line:v1",
        "--to",
        "b",
        "--wait",
        "--timeout",
        "60s",
    ];
    for told in [hub.cli(&alone), b.cli(&alone)] {
        told.expect(7).says(&[
            "it waits for dataset/line:v1, which failed (integrity)",
            &set.photos[7].path,
            &next,
        ]);
    }
    // The commands of the next step work at that site.
    let found = a
        .cli(&["verify", "dataset/line:v1"])
        .expect(8)
        .says(&["restore the original content"]);
    assert!(!found.err.contains("--repair"), "{}", found.err);
    a.cli(&["verify", "dataset/line:v1", "--repair"]).expect(2);
    // With the original content, the transfer continues.
    std::fs::write(&file, good).unwrap();
    a.cli(&["verify", "dataset/line:v1"]).expect(0);
    hub.cli(&["retry", &failed.id]).expect(0);
    hub.wait_done(&failed.id, secs(60));
    tree::assert_same(&set.root, &b.folder("dataset/line:v1"));
    // The waiting transfer starts without a command.
    hub.wait_done(&waiting.id, secs(60));
}

#[test]
fn a_transfer_waits_for_a_temporarily_unreadable_file() {
    let _limit = limit(secs(120));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    // A writes only below one folder, whose owner can be changed.
    let own = dir.join("a");
    let spec = SiteSpec {
        root: Some(own.join("nas")),
        labels_sink: Some(format!(
            "url = \"sqlite://{}\"",
            own.join("labels.db").display()
        )),
        images_sink: Some(format!(
            "url = \"oci-layout:{}\"",
            own.join("images").display()
        )),
        ..SiteSpec::default()
    };
    let mut a = Site::new(dir.path(), &hub, "a", &spec);
    a.join(&hub, &[]);
    if is_root() {
        // Root can read everything, so the daemon runs as another user.
        let (user, _) = tool_user("nobody");
        tool("chown", &["-R", &user.to_string(), own.to_str().unwrap()]);
        data::chmod(&a.config, 0o644);
        a.run_as(user);
    }
    a.start();
    hub.wait_online("a", true, secs(20));
    let b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let folder = model(&dir.join("model"), 2);
    a.publish(&folder, "model/later:v1", &[]);
    let file = folder.join("model.safetensors");
    data::chmod(&file, 0);
    let id = hub.deliver(&["model/later:v1"], "b").remove(0);
    let waits = hub.wait_transfer(&id, "waiting", secs(40), |t| {
        t.has_reason(&["waiting_for_source"])
    });
    assert!(
        waits
            .message
            .as_deref()
            .is_some_and(|m| m.contains("model/model.safetensors cannot be read now")),
        "{waits:#?}"
    );
    data::chmod(&file, 0o644);
    hub.wait_done(&id, secs(60));
    tree::assert_same(&folder, &b.folder("model/later:v1"));
}

#[test]
fn a_site_defines_which_sites_may_receive_its_artifacts() {
    let _limit = limit(secs(120));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let more = "[share]\nallow = [\"b\", \"line=3\"]";
    let a = Site::start_new(
        dir.path(),
        &hub,
        "a",
        &SiteSpec {
            more,
            ..SiteSpec::default()
        },
    );
    let b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let c = Site::start_new(
        dir.path(),
        &hub,
        "c",
        &SiteSpec {
            labels: &["line=4"],
            ..SiteSpec::default()
        },
    );
    let d = Site::start_new(
        dir.path(),
        &hub,
        "d",
        &SiteSpec {
            labels: &["line=3"],
            ..SiteSpec::default()
        },
    );
    let folder = model(&dir.join("model"), 1);
    a.publish(&folder, "model/private:v1", &[]);
    // The hub administrator gets the real reason. A site gets the same answer for both artifacts as
    // for one that does not exist.
    for command in ["deliver", "plan"] {
        let refused = hub
            .cli(&[command, "model/private:v1", "--to", "b,c"])
            .expect(4);
        refused.says(&[
            "model/private:v1 is not shared with c",
            "[share] allow of site a",
            "add the site to that list",
        ]);
    }
    // The site that published it gets the real reason too.
    a.cli(&["deliver", "model/private:v1", "--to", "c"])
        .expect(4)
        .says(&["not shared with c: not in the [share] allow of site a"]);
    let asked = |reference: &str| {
        c.cli(&["deliver", reference, "--to", "c"])
            .expect(5)
            .err
            .replace(reference, "REF")
    };
    assert_eq!(
        asked("model/private:v1"),
        asked("model/absent:v1"),
        "one answer for both"
    );
    // `all` means all sites that may receive it.
    let left_out = json!([{
        "artifact": "model/private:v1", "site": "c", "by": "origin", "why": "not in the [share] allow of site a",
    }]);
    let plan = hub.json(&["plan", "model/private:v1", "--to", "all"]);
    assert_eq!(
        (plan.as_array().unwrap().len(), &plan[0]["left_out"]),
        (2, &left_out),
        "{plan}"
    );
    let delivered = hub.json(&["deliver", "model/private:v1", "--to", "all"]);
    assert_eq!(delivered["left_out"], left_out);
    let ids = ids(&delivered);
    assert_eq!(ids.len(), 2, "B and D");
    for command in ["deliver", "plan"] {
        let out = hub
            .cli(&[command, "model/private:v1", "--to", "all"])
            .expect(0)
            .out;
        assert!(out.contains("left out: model/private:v1 is not shared with c: not in the [share] allow of site a"), "{out}");
    }
    for id in &ids {
        hub.wait_done(id, secs(60));
    }
    tree::assert_same(&folder, &b.folder("model/private:v1"));
    tree::assert_same(&folder, &d.folder("model/private:v1"));
    // B cannot forward an artifact that it may not share, and learns neither the reason nor which
    // sites are excluded.
    let refused = b
        .cli(&["deliver", "model/private:v1", "--to", "c"])
        .expect(5)
        .says(&["there is no artifact model/private:v1"]);
    assert!(!refused.err.contains("share"), "{}", refused.err);
    assert!(
        b.json(&["deliver", "model/private:v1", "--to", "all"])
            .get("left_out")
            .is_none()
    );
    assert!(!c.folder("model/private:v1").exists());

    // A name can be used only once, so C learns that it is used. Only sites that may receive the
    // artifact learn its content.
    hub.publish(&folder, "model/hub:v1", &[]);
    let digest = a.publish(&folder, "model/taken:v1", &[])["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    let other = model(&dir.join("other"), 2);
    for reference in ["model/taken:v1", "model/hub:v1"] {
        let refused = c.refuses(
            &other,
            reference,
            &[],
            6,
            &["taken", "another name or version"],
        );
        assert!(!refused.err.contains(&digest), "{}", refused.err);
    }
    d.refuses(
        &other,
        "model/taken:v1",
        &[],
        6,
        &["other content", &digest],
    );
}

#[test]
fn the_hub_defines_which_sites_may_receive_artifacts_of_sites() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let mut hub = Hub::new(dir.path());
    let (both, only_d) = (
        "[share]\nallow = [\"b\", \"line=3\"]\n",
        "[share]\nallow = [\"line=3\"]\n",
    );
    hub.edit_config("[listen]", &format!("{both}[listen]"));
    hub.start();
    // A allows C, but the hub does not. The hub allows D, but A does not.
    let more = "[share]\nallow = [\"b\", \"c\"]";
    let mut a = Site::start_new(
        dir.path(),
        &hub,
        "a",
        &SiteSpec {
            more,
            ..SiteSpec::default()
        },
    );
    let mut b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let c = Site::start_new(
        dir.path(),
        &hub,
        "c",
        &SiteSpec {
            labels: &["line=4"],
            ..SiteSpec::default()
        },
    );
    let mut d = Site::start_new(
        dir.path(),
        &hub,
        "d",
        &SiteSpec {
            labels: &["line=3"],
            ..SiteSpec::default()
        },
    );
    let folder = model(&dir.join("model"), 1);
    a.publish(&folder, "model/private:v1", &[]);
    for (to, whose) in [
        ("c", "the hub's [share] allow"),
        ("d", "the [share] allow of site a"),
    ] {
        hub.cli(&["deliver", "model/private:v1", "--to", to])
            .expect(4)
            .says(&[&format!("not shared with {to}: not in {whose}")]);
    }
    let ids = hub.deliver(&["model/private:v1"], "all");
    assert_eq!(ids.len(), 1, "only B is allowed by both");
    hub.wait_done(&ids[0], secs(60));
    tree::assert_same(&folder, &b.folder("model/private:v1"));
    // The lists do not apply to artifacts that the hub published.
    let own = model(&dir.join("own"), 2);
    hub.publish(&own, "model/own:v1", &[]);
    hub.deliver_and_wait("model/own:v1", "c", secs(60));
    tree::assert_same(&own, &c.folder("model/own:v1"));
    // The operator whose configuration must be changed.
    for (from, whose) in [
        ("c", "configuration of the hub"),
        ("d", "configuration of a"),
    ] {
        let args = [
            "train",
            "start",
            "--name",
            "r",
            "--from",
            from,
            "--on",
            "a",
            "--input",
            "model/own:v1",
            "--expect",
            "model/m",
        ];
        hub.cli(&args)
            .expect(4)
            .says(&[whose, &format!("add {from} to [share] allow")]);
    }

    // After a change of its list, the hub sends nothing more of a running transfer, although it may
    // have all content, and fetches none of the missing content.
    b.stop();
    hub.wait_online("b", false, secs(40));
    let (late, later) = (model(&dir.join("late"), 3), model(&dir.join("later"), 4));
    a.publish(&late, "model/late:v1", &[]);
    a.publish(&later, "model/later:v1", &[]);
    let id = hub.deliver(&["model/late:v1"], "b").remove(0);
    a.stop();
    hub.wait_online("a", false, secs(40));
    let other = hub.deliver(&["model/later:v1"], "b").remove(0);
    hub.stop();
    hub.edit_config(both, only_d);
    hub.start();
    a.start();
    hub.wait_online("a", true, secs(40));
    // What it may give it fetches ahead. By then it has passed over what it may not.
    d.stop();
    hub.wait_online("d", false, secs(40));
    let mut weights = vec![0; 5 * MIB as usize];
    blake3::Hasher::new()
        .update(b"of C")
        .finalize_xof()
        .fill(&mut weights);
    data::write(&dir.join("of-c/weights.bin"), &weights);
    c.publish(&dir.join("of-c"), "model/of-c:v1", &["--to", "d"]);
    let fetched = wait_for("the model of C is fetched ahead", secs(60), || {
        let fetched = hub.metric("packhorse_relay_fetched_bytes");
        (fetched >= 5 * MIB).then_some(fetched)
    });
    assert!(
        fetched < 6 * MIB,
        "it fetched {fetched} bytes, and from A what it will not give"
    );
    b.start();
    for id in [&id, &other] {
        let failed = hub.wait_transfer(id, "failed", secs(60), |t| t.state == "failed");
        assert_eq!(failed.reason.as_deref(), Some("source_gone"), "{failed:#?}");
    }
    assert!(!b.folder("model/late:v1").exists());
    assert!(!d.folder("model/private:v1").exists() && !c.folder("model/private:v1").exists());
    hub.stop();
    hub.edit_config(only_d, both);
    hub.start();
    hub.cli(&["retry", &id]).expect(0);
    hub.wait_done(&id, secs(60));
    tree::assert_same(&late, &b.folder("model/late:v1"));
}

/// The bytes per second that A sends while daemons are killed.
const UPLINK: u64 = 8 * MIB;
/// The bytes that a kill of A or of the hub may cost on that connection.
///
/// At most 20 MiB are requested from A at once: 12 MiB that B may have of the hub's budget
/// (`SITE_SHARE_MAX` in `hub.rs`), and while B is offline 8 requests of 1 MiB
/// (`AHEAD_IN_FLIGHT_MAX` in `hub/prefetch.rs`). A fast connection may have transmitted all of that
/// when the hub dies, hence the promise of 64 MiB. On this connection the bytes arrive in the order
/// of the requests, half a second for these 4 MiB. Each 128 KiB that arrived (`TOGETHER_BYTES` in
/// `relay.rs`) are verified and appended to a pack, and complete frames in a pack survive the
/// process; the flush each second is for a power failure. Lost are an incomplete group, and the
/// buffers of sockets and QUIC. A kill of B costs A nothing: the content that B requests again is
/// at the hub.
const LOST: u64 = 4 * MIB;

/// Ten kills of each daemon. The last kill is that of the hub, after A has sent seven tenths of all
/// content: a start from zero would then exceed the bound by 20 MiB.
#[test]
fn random_kills_of_all_three_daemons_cost_few_bytes() {
    let _limit = limit(secs(300));
    let kills = 30;
    let size = 8 * kills;
    let dir = Scratch::new();
    let mut hub = Hub::start_new(dir.path());
    let (line, mut a) = Site::start_behind(dir.path(), &hub, "a");
    let mut b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let folder = model(&dir.join("model"), size);
    let set = data::dataset(&dir.join("set"), 60);
    let coco = dir.join("labels.json");
    data::write(
        &coco,
        labels::coco(&set.photos, &labels::marks(&set.photos, 2))
            .to_string()
            .as_bytes(),
    );
    a.publish(&folder, "model/kills:v1", &[]);
    let others = [
        a.publish(&set.root, "dataset/kills:v1", &[]),
        a.publish(&coco, "labels/kills:v1", &["--for", "dataset/kills:v1"]),
        a.publish(&images::small().join("oci.tar"), "image/kills:v1", &[]),
    ];
    let bytes = size * MIB
        + others
            .iter()
            .map(|published| published["bytes"].as_u64().unwrap())
            .sum::<u64>();
    line.throttle_up(UPLINK);
    let sent = line.up();
    let mut ids = hub.deliver(&["model/kills:v1"], "b");
    let mut rng = rand::rng();
    let mut moments = Vec::new();
    for round in 0..kills {
        // A random moment in this round's part of the first eight tenths.
        let moment =
            (size * MIB * 8 / 10 * round + rng.random_range(0..size * MIB * 8 / 10)) / kills;
        moments.push(moment >> 20);
        if round == kills / 3 {
            // These artifacts are transferred during the kills too, after those that were requested
            // before.
            ids.extend(hub.deliver(
                &["labels/kills:v1", "image/kills:v1", "dataset/kills:v1"],
                "b",
            ));
        }
        wait_for(&format!("A has sent {moment} bytes"), secs(60), || {
            (line.up() - sent >= moment).then_some(())
        });
        match round % 3 {
            0 => {
                a.kill();
                a.start();
            }
            1 => {
                b.kill();
                b.start();
            }
            _ => {
                hub.kill();
                hub.start();
            }
        }
    }
    line.throttle_up(0);
    for id in &ids {
        hub.wait_done(id, secs(120));
    }
    tree::assert_same(&folder, &b.folder("model/kills:v1"));
    tree::assert_same(&set.root, &b.folder("dataset/kills:v1"));
    for reference in ["labels/kills:v1", "image/kills:v1"] {
        b.cli(&["verify", reference]).expect(0);
    }
    let sent = line.up() - sent;
    assert!(
        sent < uplink_max(bytes, kills),
        "A sent {} MiB of {size} with {kills} kills",
        sent >> 20
    );
    let most = uplink_of(bytes, kills - kills / 3, LOST);
    assert!(
        sent < most,
        "A sent {} MiB of {size}, the limit is {}; kills after {moments:?} MiB",
        sent >> 20,
        most >> 20
    );
    eprintln!("A sent {} MiB of {size} with {kills} kills", sent >> 20);
}

/// The relay budget of the hub in this test: two of its artifacts and a part of a third.
const BUDGET: u64 = 24 * MIB;
const EACH: u64 = 10 * MIB;

#[test]
fn the_relay_budget_is_respected_and_a_pin_prevents_eviction() {
    let _limit = limit(secs(240));
    let dir = Scratch::new();
    let mut hub = Hub::new(dir.path());
    hub.edit_config(
        "[listen]",
        &format!("[relay]\nbudget = \"{}MiB\"\n[listen]", BUDGET / MIB),
    );
    hub.start();
    let mut a = Site::start_new(dir.path(), &hub, "a", &SiteSpec::default());
    let mut b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let c = Site::start_new(dir.path(), &hub, "c", &SiteSpec::default());
    let packs = hub.data_dir.join("relay/packs");
    let names = ["one", "two", "three", "four"];
    let reference = |name: &str| format!("model/{name}:v1");
    for name in names {
        let folder = dir.join(name);
        data::write(
            &folder.join("weights.bin"),
            &data::noise(&mut data::rng(name), EACH as usize),
        );
        a.publish(&folder, &reference(name), &[]);
        hub.deliver_and_wait(&reference(name), "b", secs(60));
        tree::assert_same(&folder, &b.folder(&reference(name)));
        if name == "one" {
            assert_eq!(hub.json(&["pin", "model/one:v1"])["pinned"], true);
        }
        // The third artifact exceeds the budget, and so does the fourth. Within seconds the least
        // recently used one is evicted.
        wait_for("the kept content fits the budget", secs(30), || {
            (disk_usage(&packs) < BUDGET).then_some(())
        });
        assert!(
            disk_usage(&packs) >= EACH,
            "{name}: the pinned artifact uses its space"
        );
    }

    // No site with the content is online. The hub can still send the pinned artifact. A transfer of
    // the evicted artifact waits.
    for site in [&mut a, &mut b] {
        site.stop();
        hub.wait_online(&site.name, false, secs(40));
    }
    hub.deliver_and_wait("model/one:v1", "c", secs(60));
    tree::assert_same(&dir.join("one"), &c.folder("model/one:v1"));
    let id = hub.deliver(&["model/two:v1"], "c").remove(0);
    let waits = hub.wait_transfer(&id, "waiting", secs(60), |t| {
        t.has_reason(&["waiting_for_source"])
    });
    assert!(
        waits.next.is_some() && waits.message.is_some(),
        "{waits:#?}"
    );
    assert!(!c.folder("model/two:v1").exists());
    a.start();
    hub.wait_done(&id, secs(90));
    tree::assert_same(&dir.join("two"), &c.folder("model/two:v1"));
    // The content that the hub no longer has comes from A.
    hub.deliver_and_wait("model/three:v1", "c", secs(60));
    tree::assert_same(&dir.join("three"), &c.folder("model/three:v1"));
    wait_for("the kept content still fits the budget", secs(30), || {
        (disk_usage(&packs) < BUDGET).then_some(())
    });
}

#[test]
fn unused_content_expires_and_a_pin_prevents_that() {
    let _limit = limit(secs(120));
    let dir = Scratch::new();
    let mut hub = Hub::new(dir.path());
    hub.edit_config("[listen]", "[relay]\nkeep = \"1s\"\n[listen]");
    hub.start();
    let mut a = Site::start_new(dir.path(), &hub, "a", &SiteSpec::default());
    let mut b = Site::start_new(dir.path(), &hub, "b", &SiteSpec::default());
    let c = Site::start_new(dir.path(), &hub, "c", &SiteSpec::default());
    let packs = hub.data_dir.join("relay/packs");
    // The older artifact is the pinned one.
    for (name, mib) in [("pinned", 4), ("other", 8)] {
        let (folder, reference) = (dir.join(name), format!("model/{name}:v1"));
        data::write(
            &folder.join("weights.bin"),
            &data::noise(&mut data::rng(name), mib << 20),
        );
        a.publish(&folder, &reference, &[]);
        if name == "pinned" {
            assert_eq!(hub.json(&["pin", &reference])["pinned"], true);
        }
        hub.deliver_and_wait(&reference, "b", secs(60));
    }
    let is_gone = |name: &str| {
        hub.log().contains(&format!(
            "relayed content is evicted artifact=model/{name}:v1"
        ))
    };
    wait_for("the expired artifact is evicted", secs(30), || {
        is_gone("other").then_some(())
    });
    wait_for("its space is free", secs(20), || {
        (disk_usage(&packs) < 6 * MIB).then_some(())
    });

    for site in [&mut a, &mut b] {
        site.stop();
        hub.wait_online(&site.name, false, secs(40));
    }
    hub.deliver_and_wait("model/pinned:v1", "c", secs(60));
    tree::assert_same(&dir.join("pinned"), &c.folder("model/pinned:v1"));
    let id = hub.deliver(&["model/other:v1"], "c").remove(0);
    hub.wait_transfer(&id, "waiting", secs(60), |t| {
        t.has_reason(&["waiting_for_source"])
    });
    assert!(
        !is_gone("pinned"),
        "it is older than the evicted artifact, and pinned"
    );
    assert!(
        hub.json(&["unpin", "model/pinned:v1"])
            .get("pinned")
            .is_none()
    );
    wait_for(
        "an artifact that was unpinned expires too",
        secs(30),
        || is_gone("pinned").then_some(()),
    );
    wait_for("nothing is kept", secs(20), || {
        (disk_usage(&packs) < MIB).then_some(())
    });
}

#[test]
fn a_receiving_site_is_a_source_while_the_origin_is_offline() {
    let _limit = limit(secs(180));
    let dir = Scratch::new();
    let registry = Registry::basic(&dir, "own");
    let mut hub = Hub::new(dir.path());
    hub.edit_config(
        "[listen]",
        "[relay]\nbudget = \"1MiB\"\nkeep = \"1s\"\n[listen]",
    );
    hub.start();
    let line = Line::to(hub.quic);
    let mut a = Site::start_new(dir.path(), &hub, "a", &SiteSpec::default());
    let _b = Site::start_new(
        dir.path(),
        &hub,
        "b",
        &SiteSpec {
            through: Some(line.address()),
            ..SiteSpec::default()
        },
    );
    let c = Site::start_new(dir.path(), &hub, "c", &SiteSpec::default());
    let spec = SiteSpec {
        images_sink: Some(registry.sink(&dir)),
        ..SiteSpec::default()
    };
    let _d = Site::start_new(dir.path(), &hub, "d", &spec);
    let folder = model(&dir.join("model"), 8);
    // No site has the image's layout in the form of the artifact: neither B's layout folder nor D's
    // registry.
    let all = [
        ("model/onward:v1", folder.clone(), "b"),
        ("image/one:v1", images::small().join("oci.tar"), "b"),
        ("image/two:v1", images::small().join("two"), "d"),
    ];
    for (reference, source, to) in &all {
        a.publish(source, reference, &[]);
        hub.deliver_and_wait(reference, to, secs(60));
    }
    a.stop();
    hub.wait_online("a", false, secs(40));
    // No site requests it, so it is evicted.
    for (reference, ..) in &all {
        let gone = format!("relayed content is evicted artifact={reference}");
        wait_for(&gone, secs(30), || hub.log().contains(&gone).then_some(()));
    }
    wait_for("the hub keeps none of its content", secs(30), || {
        (disk_usage(&hub.data_dir.join("relay/packs")) < MIB / 2).then_some(())
    });
    let sent = line.up();
    hub.deliver_and_wait("model/onward:v1", "c", secs(60));
    tree::assert_same(&folder, &c.folder("model/onward:v1"));
    let sent = line.up() - sent;
    assert!(sent > 6 * MIB, "B sent {sent} bytes of {}", 8 * MIB);
    for reference in ["image/one:v1", "image/two:v1"] {
        hub.deliver_and_wait(reference, "c", secs(60));
        c.cli(&["verify", reference]).expect(0);
    }
}

/// The most bytes that A may have sent and B has not received. B requests no more than 60 requests
/// of 1 MiB and a part of a chunk each when the round trip is long (`FETCH_IN_FLIGHT_FAR_MAX` in
/// `limits.rs`), which includes a connection with a queue. A's packets have headers.
const AHEAD_MAX: u64 = 72 * MIB;

#[test]
fn a_slow_receiver_slows_down_its_source_and_does_not_fill_the_hubs_memory() {
    let _limit = limit(secs(120));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let (line_a, line_b) = (Line::to(hub.quic), Line::to(hub.quic));
    let a = Site::start_new(
        dir.path(),
        &hub,
        "a",
        &SiteSpec {
            through: Some(line_a.address()),
            ..SiteSpec::default()
        },
    );
    let _b = Site::start_new(
        dir.path(),
        &hub,
        "b",
        &SiteSpec {
            through: Some(line_b.address()),
            ..SiteSpec::default()
        },
    );
    let mut weights = vec![0; 256 << 20];
    blake3::Hasher::new()
        .update(b"more than fits anywhere")
        .finalize_xof()
        .fill(&mut weights);
    data::write(&dir.join("model/weights.bin"), &weights);
    drop(weights);
    a.publish(&dir.join("model"), "model/slow:v1", &[]);

    line_b.throttle(MIB);
    let (sent, got) = (line_a.up(), line_b.down());
    let id = hub.deliver(&["model/slow:v1"], "b").remove(0);
    let (began, mut ahead) = (Instant::now(), 0);
    // Five seconds of the connection to B, in which A could send everything.
    while line_b.down() - got < 5 * MIB && began.elapsed() < secs(60) {
        // A's counter is read first: bytes that B receives in between only decrease the difference.
        let sent = line_a.up() - sent;
        ahead = ahead.max(sent.saturating_sub(line_b.down() - got));
        thread::sleep(Duration::from_millis(20));
    }
    let got = line_b.down() - got;
    assert!(
        got >= 5 * MIB,
        "B received only {got} bytes: the test proves nothing"
    );
    assert!(
        ahead < AHEAD_MAX,
        "A was {ahead} bytes ahead of B, which received {got}"
    );
    let peak = hub.memory("VmHWM");
    assert!(peak <= 256 * MIB, "the hub had {peak} bytes resident");
    hub.cli(&["cancel", &id]).expect(0);
}

#[test]
fn a_run_cannot_use_an_input_that_is_not_shared_with_the_training_site() {
    let _limit = limit(secs(90));
    let dir = Scratch::new();
    let hub = Hub::start_new(dir.path());
    let more = "[share]\nallow = [\"b\"]";
    let a = Site::start_new(
        dir.path(),
        &hub,
        "a",
        &SiteSpec {
            more,
            ..SiteSpec::default()
        },
    );
    let trains = SiteSpec {
        more: "[train]\ncommand = [\"/bin/true\"]\nallow = [\"all\"]",
        ..SiteSpec::default()
    };
    let b = Site::start_new(dir.path(), &hub, "b", &trains);
    let _c = Site::start_new(dir.path(), &hub, "c", &trains);
    a.publish(&model(&dir.join("model"), 1), "model/private:v1", &[]);
    hub.deliver_and_wait("model/private:v1", "b", secs(60));
    let args = |from: &'static str, on: &'static str, input: &'static str| {
        [
            "train", "start", "--name", "r", "--from", from, "--on", on, "--input", input,
            "--expect", "model/m",
        ]
    };
    hub.cli(&args("b", "c", "model/private:v1"))
        .expect(4)
        .says(&["not shared with c: not in the [share] allow of site a"]);
    // B, which has the artifact, may not use it for a run either.
    b.cli(&args("b", "c", "model/private:v1"))
        .expect(5)
        .says(&["there is no artifact model/private:v1"]);
    hub.cli(&["train", "show", "r"]).expect(5);
    // In the other direction, the input goes to a site that may receive it.
    hub.cli(&args("c", "b", "model/private:v1")).expect(0);
}
