//! Tests of sites, publishers, join tokens and sharing lists.

use base::clock;
use base::fault::Code;
use base::names::{ArtifactRef, PublisherName, SiteName, SiteSelector};
use base::peer::Peer;
use transport::identity::Claim;

use super::{join, root};
use crate::{Catalogue, Part, SharingRow};

pub(crate) async fn what_was_heard_of_sites_is_stored_and_is_no_event(catalogue: Catalogue) {
    let site = join(&catalogue, "west", &[]).await;
    let seen = async || {
        catalogue
            .site(site.as_str())
            .await
            .unwrap()
            .unwrap()
            .seen_ms
    };
    catalogue.site_seen(&site, true, 2_000, None).await.unwrap();
    let cursor = catalogue.cursor().await.unwrap();
    let unknown = "east".parse().unwrap();
    let heard = [(site.clone(), 3_000), (unknown, 3_000)];
    catalogue.sites_heard(&heard).await.unwrap();
    assert_eq!(seen().await, Some(3_000));
    // A look that was overtaken changes nothing.
    catalogue
        .sites_heard(&[(site.clone(), 2_500)])
        .await
        .unwrap();
    assert_eq!(seen().await, Some(3_000));
    assert_eq!(catalogue.cursor().await.unwrap(), cursor);
    assert_eq!(catalogue.sites().await.unwrap().len(), 1);
}

pub(crate) async fn a_token_can_be_used_once_and_expires(catalogue: Catalogue) {
    let name: SiteName = "west".parse().unwrap();
    let (site, claim) = (Peer::Site(name.clone()), Claim::Site(name.clone()));
    catalogue
        .add_token("a", &[1; 32], &site, &Default::default(), 60)
        .await
        .unwrap();
    assert_eq!(
        catalogue
            .redeem_token("a", &[2; 32], &claim, &[7; 32])
            .await
            .unwrap_err()
            .code,
        Code::NotAllowed
    );
    assert_eq!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap()
            .0,
        site
    );
    // The answer may have been lost: the same key, and no other, may ask again until the site has
    // connected.
    let (again, serial) = catalogue
        .redeem_token("a", &[1; 32], &claim, &[7; 32])
        .await
        .unwrap();
    assert_eq!(again, site);
    assert!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[8; 32])
            .await
            .unwrap_err()
            .message
            .contains("used")
    );
    // It is seen over the connection of an earlier certificate.
    catalogue
        .site_seen(&name, true, clock::now_ms() + 1, None)
        .await
        .unwrap();
    let (_, newest) = catalogue
        .redeem_token("a", &[1; 32], &claim, &[7; 32])
        .await
        .unwrap();
    assert!(newest.is_newer_than(&serial));
    catalogue.confirm(&site, &newest).await.unwrap();
    assert!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap_err()
            .message
            .contains("used")
    );
    catalogue
        .add_token("b", &[1; 32], &site, &Default::default(), 0)
        .await
        .unwrap();
    // It expired at once: with the next millisecond.
    let issued = clock::now_ms();
    while clock::now_ms() <= issued {
        tokio::task::yield_now().await;
    }
    assert!(
        catalogue
            .redeem_token("b", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap_err()
            .message
            .contains("expired")
    );
}

pub(crate) async fn the_manifests_that_all_sites_read(catalogue: Catalogue) {
    assert_eq!(catalogue.manifest_format().await.unwrap(), None);
    let west = join(&catalogue, "west", &[]).await;
    let east = join(&catalogue, "east", &[]).await;
    assert_eq!(
        catalogue.manifest_format().await.unwrap(),
        None,
        "no site has said its version"
    );
    catalogue.set_manifest_format(&west, 2).await.unwrap();
    catalogue
        .site_seen(&west, true, 1, Some("2.0"))
        .await
        .unwrap();
    assert_eq!(catalogue.manifest_format().await.unwrap(), Some(2));
    catalogue
        .site_seen(&east, true, 1, Some("1.0"))
        .await
        .unwrap();
    assert_eq!(
        catalogue.manifest_format().await.unwrap(),
        Some(1),
        "an earlier version says no format"
    );
    catalogue.set_manifest_format(&east, 3).await.unwrap();
    assert_eq!(catalogue.manifest_format().await.unwrap(), Some(2));
}

pub(crate) async fn a_publisher_is_not_a_site(catalogue: Catalogue) {
    let name: SiteName = "office".parse().unwrap();
    let publisher_name: PublisherName = "office".parse().unwrap();
    let publisher = Peer::Publisher(publisher_name.clone());
    catalogue
        .add_token("a", &[1; 32], &publisher, &Default::default(), 60)
        .await
        .unwrap();
    // A site that presents a publisher's token is refused, and the token stays valid.
    let fault = catalogue
        .redeem_token("a", &[1; 32], &Claim::Site(name.clone()), &[7; 32])
        .await
        .unwrap_err();
    assert!(fault.message.contains("is for a publisher"), "{fault}");
    assert!(!catalogue.publisher_seen(&publisher_name).await.unwrap());
    assert_eq!(
        catalogue
            .redeem_token("a", &[1; 32], &Claim::Publisher, &[7; 32])
            .await
            .unwrap()
            .0,
        publisher
    );
    assert!(catalogue.publisher_seen(&publisher_name).await.unwrap());
    assert!(catalogue.sites().await.unwrap().is_empty());
    assert_eq!(
        catalogue
            .select_sites(&"all".parse().unwrap())
            .await
            .unwrap_err()
            .code,
        Code::NotFound
    );
    // A site cannot use the name of a publisher, and a publisher cannot use the name of a site.
    let site = Peer::Site(name);
    assert_eq!(
        catalogue
            .add_token("b", &[1; 32], &site, &Default::default(), 60)
            .await
            .unwrap_err()
            .code,
        Code::Conflict
    );
    catalogue
        .add_token(
            "c",
            &[1; 32],
            &Peer::Site("west".parse().unwrap()),
            &Default::default(),
            60,
        )
        .await
        .unwrap();
    assert_eq!(
        catalogue
            .redeem_token("c", &[1; 32], &Claim::Publisher, &[7; 32])
            .await
            .unwrap_err()
            .code,
        Code::NotAllowed
    );
}

pub(crate) async fn the_sharing_list_of_a_site_and_the_labels_of_another_decide_whether_it_receives(
    catalogue: Catalogue,
) {
    let a = join(&catalogue, "a", &[]).await;
    let c = join(&catalogue, "c", &[("line", "3")]).await;
    let labels = [("line".to_owned(), "3".to_owned())].into();
    let share: Vec<SiteSelector> = vec!["b,d".parse().unwrap(), "line=3".parse().unwrap()];
    let list = ["b,d".to_owned(), "line=3".to_owned(), "b,,".to_owned()];
    let row = catalogue.sharing(&a, &c).await.unwrap();
    let expected = SharingRow {
        share: None,
        labels,
    };
    assert_eq!(row, expected);
    catalogue.set_share(&a, Some(&list)).await.unwrap();
    let row = catalogue.sharing(&a, &c).await.unwrap();
    assert_eq!(
        row.share,
        Some(share),
        "an entry that cannot be parsed allows no site"
    );
    // This list was that of a.
    let row = catalogue.sharing(&c, &a).await.unwrap();
    assert_eq!(row, SharingRow::default());
    catalogue.set_share(&a, Some(&[])).await.unwrap();
    let row = catalogue.sharing(&a, &c).await.unwrap();
    assert_eq!(row.share, Some(Vec::new()));
}

pub(crate) async fn the_origins_of_content_are_the_origins_of_the_delivered_artifacts(
    catalogue: Catalogue,
) {
    let a = join(&catalogue, "a", &[]).await;
    let b = join(&catalogue, "b", &[]).await;
    // The same content under three names; the third is not delivered.
    let named = [
        ("model/of-a:1", Some(&a)),
        ("model/of-hub:1", None),
        ("model/of-b:1", Some(&b)),
    ];
    let mut transfers = Vec::new();
    for (name, origin) in named {
        let artifact: ArtifactRef = name.parse().unwrap();
        let root = root(1);
        let added = catalogue.add_artifact(&artifact, &root, origin).await;
        assert!(added.unwrap());
        if name == "model/of-b:1" {
            break;
        }
        let part = Part {
            artifact,
            digest: root.digest(),
            total: 1,
            needs: None,
            sites: vec![b.clone()],
        };
        let id = name.replace(['/', ':'], "-").parse().unwrap();
        transfers.extend(catalogue.deliver(&id, None, &[part], &[]).await.unwrap());
    }
    let origins = async |site: &SiteName| {
        let found = catalogue.origins_for(site, root(1).digest()).await;
        let mut found = found.unwrap();
        found.sort();
        found
    };
    assert_eq!(origins(&b).await, [None, Some(a.clone())]);
    assert_eq!(origins(&a).await, []);
    let cancelled = catalogue.act(&transfers[1], model::transfer::Action::Cancel);
    cancelled.await.unwrap();
    let left = origins(&b).await;
    assert_eq!(left, [Some(a)], "a cancelled transfer does not count");
}
