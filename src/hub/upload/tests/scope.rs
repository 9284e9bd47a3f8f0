//! What a publisher may do.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_stays_within_the_scope_of_its_token() {
    let bench = Bench::start().await;
    for site in ["west", "east"] {
        let token = bench.token(Some(site), None).await;
        bench
            .join(&token, &Claim::Site(site.parse().unwrap()))
            .await;
    }
    let source = bench.source("a", 1 << 20, 1);
    let token = bench
        .limited_token(
            None,
            Some("office"),
            &["dataset/line3-*", "model/a"],
            Some("west"),
        )
        .await;
    let denied = |result: Result<Uploaded, base::fault::Fault>, words: &str| {
        let fault = result.unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        assert!(fault.message.contains(words), "{fault}");
    };
    denied(
        bench.publish(&source, "model/b:v1", Some(&token)).await,
        "may publish dataset/line3-*, model/a only, not model/b:v1",
    );
    assert!(
        bench
            .hub
            .inner
            .catalogue
            .artifact_names()
            .await
            .unwrap()
            .is_empty()
    );
    bench.publish(&source, "model/a:v1", None).await.unwrap();
    denied(
        bench
            .publish_to(&source, "model/a:v2", Some("east"), None)
            .await,
        "may deliver to west only, not to east",
    );
    denied(
        bench
            .publish_to(&source, "model/a:v2", Some("all"), None)
            .await,
        "not to east",
    );
    let delivered = bench
        .publish_to(&source, "model/a:v2", Some("west"), None)
        .await;
    assert_eq!(delivered.unwrap().published.transfers.len(), 1);
    // Another token brings another scope.
    let token = bench
        .limited_token(None, Some("lab"), &[], Some("none"))
        .await;
    let state = bench.dir.path().join("state");
    base::durable::remove_all(&state).unwrap();
    bench
        .publish(&source, "model/b:v1", Some(&token))
        .await
        .unwrap();
    denied(
        bench
            .publish_to(&source, "model/b:v2", Some("west"), None)
            .await,
        "may deliver to none only, not to west",
    );
    // A token without limits keeps those that the publisher has, also for its earlier certificate; a
    // token that names one limit changes that one.
    let limits = |artifacts: &'static [&'static str], to: Option<&'static str>| {
        let bench = &bench;
        async move {
            let request = TokenRequest {
                site: None,
                publisher: Some("lab".into()),
                labels: Default::default(),
                artifacts: artifacts.iter().map(|text| (*text).into()).collect(),
                deliver_to: to.map(Into::into),
                ttl_seconds: 60,
            };
            let reply = bench.hub.token(request).await.unwrap();
            // The join replaces the certificate; whether this publish is allowed does not matter.
            base::durable::remove_all(&bench.dir.path().join("state")).unwrap();
            let source = bench.source("a", 1 << 20, 1);
            let _ = bench
                .publish(&source, "model/b:v1", Some(&reply.token))
                .await;
            let limits = reply.limits.unwrap();
            (limits.artifacts.map(|a| a.join(",")), limits.deliver_to)
        }
    };
    assert_eq!(limits(&[], None).await, (None, Some("none".into())));
    denied(
        bench
            .publish_to(&source, "model/b:v2", Some("west"), None)
            .await,
        "may deliver to none only, not to west",
    );
    assert_eq!(
        limits(&["model/*"], None).await,
        (Some("model/*".into()), Some("none".into()))
    );
    denied(
        bench.publish(&source, "dataset/c:v1", None).await,
        "may publish model/* only",
    );
    assert_eq!(
        limits(&["*/*"], Some("all")).await,
        (Some("*/*".into()), Some("all".into()))
    );
    bench
        .publish_to(&source, "model/b:v2", Some("west"), None)
        .await
        .unwrap();
    let mut misspelled = TokenRequest {
        site: None,
        publisher: Some("lab".into()),
        labels: Default::default(),
        artifacts: Vec::new(),
        deliver_to: Some("west,wset".into()),
        ttl_seconds: 60,
    };
    let notes = bench.hub.token(misspelled.clone()).await.unwrap().notes;
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].contains("the name wset"), "{notes:?}");
    misspelled.deliver_to = Some("west".into());
    assert!(bench.hub.token(misspelled).await.unwrap().notes.is_empty());
    let request = |artifacts: &[&str], site: Option<&str>| TokenRequest {
        site: site.map(Into::into),
        publisher: site.is_none().then(|| "other".into()),
        labels: Default::default(),
        artifacts: artifacts.iter().map(|text| (*text).into()).collect(),
        deliver_to: None,
        ttl_seconds: 60,
    };
    for wrong in [
        request(&["line3"], None),
        request(&["model/*"], Some("north")),
    ] {
        assert_eq!(bench.hub.token(wrong).await.unwrap_err().code, Code::Usage);
    }
}
