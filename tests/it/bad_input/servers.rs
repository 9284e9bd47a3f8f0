//! Databases and registries that are offline or refuse a request.

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data::{self, Photo};
use crate::support::images;
use crate::support::labels::{self, Reader, coco_rows};
use crate::support::postgres::{Postgres, ROLE};
use crate::support::registry::{PASSWORD, Registry};
use crate::support::{Scratch, limit, secs};

/// Publishes a small label set for a dataset that stays at the hub. Returns the rows that must
/// arrive.
fn publish_labels(hub: &Hub, scratch: &Scratch, version: &str) -> Vec<labels::Row> {
    let dataset = data::dataset(&scratch.join(&format!("dataset-{version}")), 8);
    let photos: Vec<Photo> = dataset.photos.clone();
    let marks = labels::marks(&photos, 3);
    let document = labels::coco(&photos, &marks);
    let file = scratch.join(&format!("labels-{version}.json"));
    labels::write_json(&file, &document);
    let dataset_reference = format!("dataset/d:{version}");
    hub.publish(&dataset.root, &dataset_reference, &[]);
    hub.publish(
        &file,
        &format!("labels/l:{version}"),
        &["--for", &dataset_reference],
    );
    coco_rows(&document, &marks, &dataset.root, &format!("l:{version}"))
}

#[test]
fn a_transfer_waits_for_an_offline_database() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut postgres = Postgres::start_new(&scratch);
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        labels_sink: Some(postgres.sink(&scratch, "labels")),
        ..SiteSpec::default()
    };
    let mut site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let rows = publish_labels(&hub, &scratch, "v1");

    postgres.stop();
    let id = hub.deliver(&["labels/l:v1"], "chengdu").remove(0);
    let waiting = hub.wait_transfer(&id, "waiting for the database", secs(60), |t| {
        t.has_reason(&["sink_unavailable"])
    });
    assert!(
        waiting.next.is_some() && waiting.message.is_some(),
        "{waiting:#?}"
    );
    // Other sinks are not delayed.
    data::model(&scratch.join("model"), 100_000);
    hub.publish(
        &scratch.join("model"),
        "model/m:v1",
        &["--to", "chengdu", "--wait"],
    );
    // The site starts without the database.
    site.stop();
    site.start_alive();

    postgres.start();
    hub.wait_done(&id, secs(120));
    assert_eq!(Reader::Postgres(&postgres, "labels").current("l"), rows);
}

#[test]
fn missing_database_permissions_fail_the_transfer_with_the_reason() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let postgres = Postgres::start_new(&scratch);
    postgres.query("postgres", "ALTER DATABASE labels OWNER TO admin");
    postgres.query("labels", "REVOKE CREATE ON DATABASE labels FROM PUBLIC");
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        labels_sink: Some(postgres.sink(&scratch, "labels")),
        ..SiteSpec::default()
    };
    let mut site = Site::new(scratch.path(), &hub, "chengdu", &spec);
    site.join(&hub, &[]);
    site.start_alive();
    let rows = publish_labels(&hub, &scratch, "v1");
    let id = hub.deliver(&["labels/l:v1"], "chengdu").remove(0);
    let failed = hub.wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
    assert!(failed.has_reason(&["sink_denied"]), "{failed:#?}");
    assert!(
        !failed.message.unwrap_or_default().contains("läb"),
        "a message never holds a secret"
    );

    postgres.query(
        "postgres",
        &format!("ALTER DATABASE labels OWNER TO {ROLE}"),
    );
    hub.cli(&["retry", &id]).expect(0);
    hub.wait_done(&id, secs(60));
    assert_eq!(Reader::Postgres(&postgres, "labels").current("l"), rows);

    // A password that is no longer valid. The site detects this at the next delivery.
    postgres.query("postgres", &format!("ALTER ROLE {ROLE} PASSWORD 'another'"));
    postgres.query(
        "postgres",
        &format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'"),
    );
    publish_labels(&hub, &scratch, "v2");
    let id = hub.deliver(&["labels/l:v2"], "chengdu").remove(0);
    let failed = hub.wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
    assert!(failed.has_reason(&["sink_denied"]), "{failed:#?}");
    assert_eq!(
        Reader::Postgres(&postgres, "labels").current("l"),
        rows,
        "readers keep the earlier version"
    );
}

#[test]
fn a_transfer_waits_for_an_offline_registry() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    let mut registry = Registry::basic(&scratch, "registry");
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        images_sink: Some(registry.sink(&scratch)),
        ..SiteSpec::default()
    };
    let _site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    hub.publish(&images::small().join("oci.tar"), "image/app:v1", &[]);
    registry.stop();
    let id = hub.deliver(&["image/app:v1"], "chengdu").remove(0);
    let waiting = hub.wait_transfer(&id, "waiting for the registry", secs(60), |t| {
        t.has_reason(&["sink_unavailable"])
    });
    assert!(
        waiting
            .message
            .is_some_and(|m| m.contains(&registry.host())),
        "the message names it"
    );
    registry.start();
    hub.wait_done(&id, secs(120));
    let digest = hub.json(&["show", "image/app:v1"])["info"]["digest"].clone();
    assert_eq!(registry.digest("operators/app:v1"), digest);
}

#[test]
fn a_refusal_by_the_registry_fails_the_transfer_with_the_reason() {
    let _limit = limit(secs(200));
    let scratch = Scratch::new();
    for registry in [
        Registry::basic(&scratch, "basic"),
        Registry::bearer(&scratch, "bearer"),
    ] {
        let hub = Hub::start_new(&scratch.folder(&format!("with-{}", registry.host())));
        let images_sink = registry.sink(&scratch);
        let password = images_sink
            .split("password_file = \"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap()
            .to_owned();
        std::fs::write(&password, "wrong").unwrap();
        let spec = SiteSpec {
            images_sink: Some(images_sink),
            ..SiteSpec::default()
        };
        let dir = hub.config.parent().unwrap().to_owned();
        let mut site = Site::new(&dir, &hub, "chengdu", &spec);
        site.join(&hub, &[]);
        site.start_alive();
        hub.publish(&images::small().join("oci.tar"), "image/app:v1", &[]);
        let id = hub.deliver(&["image/app:v1"], "chengdu").remove(0);
        let failed = hub.wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
        assert!(failed.has_reason(&["sink_denied"]), "{failed:#?}");
        assert!(
            failed.next.is_some_and(|n| n.contains("password")),
            "the next step names the cause"
        );

        std::fs::write(&password, PASSWORD).unwrap();
        site.stop();
        site.start();
        hub.cli(&["retry", &id]).expect(0);
        hub.wait_done(&id, secs(60));
    }
}
