//! Harbor's answers: quota, immutable tag, missing project, read-only mode, expired token, 429, and
//! a proxy's 413. Each must lead to the right state, reason and next step, and to success once its
//! cause is removed.

use crate::support::daemon::{Hub, Site, SiteSpec, Transfer};
use crate::support::harbor::{Harbor, Seen, error, is_manifest_put, is_manifest_read, is_push};
use crate::support::images;
use crate::support::{Scratch, limit, secs};

/// A hub and a site whose images go to the Harbor simulator.
struct World {
    hub: Hub,
    _site: Site,
    harbor: Harbor,
    scratch: Scratch,
}

impl World {
    fn start() -> Self {
        Self::start_with("operators", "")
    }

    /// Starts with this project in the URL, and with additional lines in `[sink.images]`.
    fn start_with(project: &str, more: &str) -> Self {
        let scratch = Scratch::new();
        let harbor = Harbor::start();
        let hub = Hub::start_new(scratch.path());
        let sink = format!("{}\n{more}", harbor.sink(&scratch, project));
        let mut site = Site::new(
            scratch.path(),
            &hub,
            "chengdu",
            &SiteSpec {
                images_sink: Some(sink),
                ..SiteSpec::default()
            },
        );
        site.join(&hub, &[]);
        // The site need not be ready: a missing project may make it not ready.
        site.start_alive();
        hub.wait_online("chengdu", true, secs(20));
        hub.publish(&images::small().join("docker.tar"), "image/app:v1", &[]);
        Self {
            hub,
            _site: site,
            harbor,
            scratch,
        }
    }

    fn deliver(&self) -> String {
        self.hub.deliver(&["image/app:v1"], "chengdu").remove(0)
    }

    fn digest(&self) -> String {
        self.hub.json(&["show", "image/app:v1"])["info"]["digest"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// Waits until the transfer has one of these reasons, with a message for the user.
    #[track_caller]
    fn wait_reason(&self, id: &str, reasons: &[&str]) -> Transfer {
        let limit = secs(60);
        let seen =
            crate::support::wait_for(&format!("the reason is one of {reasons:?}"), limit, || {
                let t = self.hub.transfer(id);
                assert_ne!(t.state, "done", "{t:#?}");
                t.has_reason(reasons).then_some(t)
            });
        assert!(
            seen.message.as_ref().is_some_and(|m| !m.is_empty())
                && seen.next.as_ref().is_some_and(|n| !n.is_empty()),
            "{seen:#?}"
        );
        seen
    }

    /// Waits for the end, and checks the image in the registry.
    #[track_caller]
    fn check_done(&self, id: &str, limit: u64) -> Transfer {
        let done = self.hub.wait_done(id, secs(limit));
        assert_eq!(self.harbor.digest("operators/app:v1"), Some(self.digest()));
        done
    }
}

fn says(t: &Transfer, word: &str) -> bool {
    t.message.as_ref().is_some_and(|m| m.contains(word))
}

#[test]
fn a_full_quota_delays_the_transfer_until_there_is_room() {
    let _limit = limit(secs(200));
    let world = World::start();
    let quota = "adding 2.3 MiB of storage resource, which when updated to current usage of 9.9 MiB will exceed the configured upper limit of 10.0 MiB.";
    world.harbor.always(is_push, 403, &error("DENIED", quota));
    let id = world.deliver();
    let held = world.wait_reason(&id, &["no_space"]);
    assert_ne!(
        held.state, "failed",
        "the transfer waits and has not failed: {held:#?}"
    );
    assert!(says(&held, "upper limit"), "{held:#?}");
    world.harbor.heal();
    world.check_done(&id, 120);
}

#[test]
fn an_immutable_tag_with_another_image_is_refused() {
    let _limit = limit(secs(120));
    let world = World::start();
    world.harbor.put_manifest(
        "operators/app:v1",
        "application/vnd.oci.image.manifest.v1+json",
        b"{\"schemaVersion\":2}",
    );
    world.harbor.make_immutable();
    let id = world.deliver();
    let failed = world
        .hub
        .wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
    assert!(
        failed.has_reason(&["sink_refused"]) && failed.next.is_some(),
        "{failed:#?}"
    );
}

#[test]
fn an_immutable_tag_with_the_same_image_is_a_success() {
    let _limit = limit(secs(120));
    let world = World::start();
    let first = world.deliver();
    world.check_done(&first, 60);
    world.harbor.make_immutable();
    // A second site with the same registry finds the tag that the first site pushed.
    let second = Site::start_new(
        &world.scratch.folder("second"),
        &world.hub,
        "wuhan",
        &SiteSpec {
            images_sink: Some(world.harbor.sink(&world.scratch, "operators")),
            ..SiteSpec::default()
        },
    );
    let done = world
        .hub
        .deliver_and_wait("image/app:v1", "wuhan", secs(60));
    assert_eq!(done.site, second.name);
    assert!(
        done.bytes.wire < done.bytes.total / 2,
        "the registry has the blobs, so they are not transmitted: {:?}",
        done.bytes
    );
}

#[test]
fn a_policy_that_blocks_pulls_causes_no_failure() {
    let _limit = limit(secs(120));
    let world = World::start();
    let why =
        "current image without vulnerability scanning cannot be pulled due to configured policy";
    world
        .harbor
        .always(is_manifest_read, 412, &error("PROJECTPOLICYVIOLATION", why));
    let id = world.deliver();
    world.check_done(&id, 60);
    let shown = world.hub.json(&["status", &id])[0].clone();
    assert!(
        shown["note"]
            .as_str()
            .is_some_and(|note| note.contains("policy")),
        "{shown}"
    );
    let verified = world
        ._site
        .cli(&["verify", "image/app:v1"])
        .expect(4)
        .says(&["was not verified", "no blob could be read"]);
    assert!(!verified.out.contains("sound"), "{}", verified.out);
}

#[test]
fn a_missing_project_is_reported_and_not_created() {
    let _limit = limit(secs(120));
    let world = World::start_with("nowhere", "");
    let id = world.deliver();
    let failed = world
        .hub
        .wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
    assert!(
        failed.has_reason(&["sink_denied", "sink_refused"]) && says(&failed, "nowhere"),
        "{failed:#?}"
    );
    assert!(
        failed.next.is_some_and(|n| n.contains("project")),
        "the next step is to create it"
    );
    assert!(!world.harbor.has_project("nowhere"));
}

#[test]
fn a_missing_project_is_created_if_the_configuration_allows_it() {
    let _limit = limit(secs(120));
    let world = World::start_with("nowhere", "create_project = true");
    let id = world.deliver();
    world.hub.wait_done(&id, secs(60));
    assert!(world.harbor.has_project("nowhere"));
    assert_eq!(world.harbor.digest("nowhere/app:v1"), Some(world.digest()));
}

#[test]
fn the_site_waits_while_the_registry_is_read_only() {
    let _limit = limit(secs(240));
    let world = World::start();
    world.harbor.always(
        is_push,
        403,
        &error(
            "DENIED",
            "The system is in read only mode. Any modification is prohibited.",
        ),
    );
    let id = world.deliver();
    let waiting = world.wait_reason(&id, &["sink_unavailable"]);
    assert!(
        waiting.state != "failed" && says(&waiting, "read only"),
        "{waiting:#?}"
    );
    world.harbor.heal();
    world.check_done(&id, 150);
}

#[test]
fn an_expired_token_is_renewed_during_the_transfer() {
    let _limit = limit(secs(120));
    let world = World::start();
    world.harbor.expire_tokens_at(is_manifest_put);
    let id = world.deliver();
    let done = world.check_done(&id, 60);
    assert_eq!(
        done.attempts, 1,
        "the renewal is not visible to the user: {done:#?}"
    );
    assert!(
        world
            .harbor
            .seen(|s| s.status == 401 && is_manifest_put(s))
            .len()
            == 1
    );
}

#[test]
fn a_request_refused_with_429_is_repeated_only_after_retry_after() {
    let _limit = limit(secs(150));
    let world = World::start();
    world.harbor.times(
        1,
        is_push,
        429,
        &[("retry-after", "4")],
        &error("TOOMANYREQUESTS", "too many requests"),
    );
    let id = world.deliver();
    world.check_done(&id, 90);
    let pushes = world.harbor.seen(is_push);
    let refused = pushes
        .iter()
        .find(|s| s.status == 429)
        .expect("a request was refused once");
    // Concurrent uploads of other blobs may still arrive; the refused one waits.
    let again = pushes
        .iter()
        .find(|s| s.at > refused.at && s.path == refused.path && s.method == refused.method);
    let pause = again.expect("the request was repeated").at - refused.at;
    assert!(
        pause >= secs(4),
        "Retry-After was 4 s, the request was repeated after {pause:?}"
    );
}

#[test]
fn a_proxy_with_a_size_limit_receives_smaller_pieces() {
    let _limit = limit(secs(180));
    let world = World::start();
    const MOST: usize = 1_500_000;
    let page = "<html>\r\n<head><title>413 Request Entity Too Large</title></head>\r\n<body>nginx</body></html>\r\n";
    world.harbor.always(|s| s.body_len > MOST, 413, page);
    let id = world.deliver();
    world.check_done(&id, 120);
    let took = |s: &Seen| s.status < 300 && s.body_len > 0;
    assert!(
        !world.harbor.seen(|s| s.status == 413).is_empty(),
        "the limit was never reached: the image is too small for this test"
    );
    assert!(
        world
            .harbor
            .seen(|s| took(s) && s.body_len > MOST)
            .is_empty()
    );
}

#[test]
fn a_proxy_that_refuses_every_upload_is_reported() {
    let _limit = limit(secs(180));
    let world = World::start();
    world.harbor.always(
        |s| s.body_len > 10_000,
        413,
        "<html><body><h1>413 Request Entity Too Large</h1></body></html>",
    );
    let id = world.deliver();
    let failed = world
        .hub
        .wait_transfer(&id, "failed", secs(120), |t| t.state == "failed");
    assert!(
        failed.has_reason(&["sink_refused"]) && says(&failed, "413"),
        "{failed:#?}"
    );
    assert!(
        failed
            .next
            .is_some_and(|n| n.contains("limit") || n.contains("client_max_body_size"))
    );
}

#[test]
fn an_occasional_error_page_causes_no_failure() {
    let _limit = limit(secs(150));
    let world = World::start();
    let page = "<html><body><h1>504 Gateway Time-out</h1></body></html>";
    world
        .harbor
        .times(2, |s| is_push(s) && s.method == "PUT", 504, &[], page);
    let id = world.deliver();
    world.check_done(&id, 90);
}

#[test]
fn a_full_disk_of_the_registry_delays_the_transfer() {
    let _limit = limit(secs(200));
    let world = World::start();
    world
        .harbor
        .always(is_push, 507, &error("UNKNOWN", "no space left on device"));
    let id = world.deliver();
    let held = world.wait_reason(&id, &["no_space"]);
    assert_ne!(held.state, "failed", "{held:#?}");
    world.harbor.heal();
    world.check_done(&id, 120);
}
