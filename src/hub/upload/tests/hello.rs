//! What the first message of a site changes at the hub.

use std::time::{Duration, Instant};

use super::{Bench, Uploaded, wire};
use crate::config::Congestion;
use base::names::SiteName;
use base::omitted::Category;
use model::protocol::{CONTROL, FromSite};
use transport::identity::Claim;
use transport::{Link, RecvHalf, SendHalf};

/// A site that is connected and has said nothing.
struct Silent {
    link: Link,
    send: SendHalf,
    _recv: RecvHalf,
}

impl Silent {
    async fn connect(bench: &Bench, name: &str) -> Self {
        let claim = Claim::Site(name.parse().unwrap());
        let token = bench.token(Some(name), None).await;
        let link = bench.dial(&bench.join(&token, &claim).await).await;
        let (mut send, _recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
        send.write_all(&[CONTROL]).await.unwrap();
        Self { link, send, _recv }
    }

    /// Sends this first message, and waits until the hub has stored its version.
    async fn say(&mut self, bench: &Bench, hello: &FromSite) {
        let FromSite::Hello { version, .. } = hello else {
            unreachable!("not a first message: {hello:?}");
        };
        let version = serde_json::to_value(version).unwrap();
        wire::send(&mut self.send, hello).await.unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while bench.hub.inner.catalogue.sites().await.unwrap()[0]
            .version
            .as_deref()
            != version.as_str()
        {
            assert!(Instant::now() < until, "the hub did not receive {version}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!self.link.is_closed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hub_uses_the_congestion_control_that_a_site_requests() {
    let bench = Bench::start().await;
    let west: SiteName = "west".parse().unwrap();
    let mut site = Silent::connect(&bench, "west").await;
    let used = || {
        bench
            .hub
            .inner
            .links
            .of(&west)
            .and_then(|link| link.congestion())
    };
    for (congestion, then) in [
        (Congestion::Cubic, Congestion::Cubic),
        (Congestion::Bbr, Congestion::Bbr),
        // `auto` keeps the earlier setting.
        (Congestion::Auto, Congestion::Bbr),
    ] {
        let hello = FromSite::Hello {
            version: format!("{congestion:?}").as_str().into(),
            share: None,
            train: None,
            congestion,
            changes: false,
            manifest_format: 1,
            reason: None,
        };
        site.say(&bench, &hello).await;
        assert_eq!(used(), Some(then), "{congestion:?}");
    }
}

/// A site of an earlier version refuses a manifest with attributes. Nothing that a publish writes by
/// default may exclude it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modification_times_are_kept_once_all_sites_read_them() {
    let bench = Bench::start().await;
    let source = bench.source("a", 1000, 1);
    let token = bench.token(None, Some("office")).await;
    let format = async |reference: &str, uploaded: Uploaded| {
        let artifact = reference.parse().unwrap();
        let row = bench.hub.inner.catalogue.artifact(&artifact).await.unwrap();
        let published = uploaded.published;
        let is_said = published
            .note
            .is_some_and(|note| note.contains("times are not kept"))
            && published
                .omitted
                .iter()
                .any(|omitted| omitted.what == Category::Times);
        assert_eq!(is_said, row.root.format == 1, "{:?}", published.omitted);
        row.root.format
    };
    let publish = async |reference: &'static str| {
        let published = bench.publish(&source, reference, Some(&token)).await;
        format(reference, published.unwrap()).await
    };
    assert_eq!(publish("model/a:v1").await, 2, "there is no site");
    let mut site = Silent::connect(&bench, "west").await;
    assert_eq!(publish("model/a:v2").await, 2, "the site has said nothing");
    let earlier = r#"{"hello":{"version":"0.1"}}"#;
    site.say(&bench, &serde_json::from_str(earlier).unwrap())
        .await;
    assert_eq!(
        publish("model/a:v3").await,
        1,
        "a site of an earlier version"
    );
    site.say(&bench, &super::hello(true)).await;
    assert_eq!(publish("model/a:v4").await, 2, "after its upgrade");
}
