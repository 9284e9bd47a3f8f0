//! Sites, publishers and join tokens; whom sites share with.

use std::time::Duration;

use base::fault::Code;
use base::names::{ArtifactRef, SiteName};
use transport::identity::{Claim, Holder};

use super::{join, root, under};
use crate::{Catalogue, Forbids, Part};

pub(crate) async fn a_token_is_good_once_and_for_a_while(catalogue: Catalogue) {
    let name: SiteName = "west".parse().unwrap();
    let (site, claim) = (Holder::Site(name.clone()), Claim::Site(name.clone()));
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
            .unwrap(),
        site
    );
    // Its answer may have been lost: the same key may ask again, and no other, until the site was
    // here.
    assert_eq!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap(),
        site
    );
    assert!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[8; 32])
            .await
            .unwrap_err()
            .message
            .contains("used")
    );
    catalogue.site_seen(&name, None).await.unwrap();
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
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert!(
        catalogue
            .redeem_token("b", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap_err()
            .message
            .contains("expired")
    );
}

pub(crate) async fn a_publisher_is_no_site(catalogue: Catalogue) {
    let name: SiteName = "office".parse().unwrap();
    let publisher = Holder::Publisher(name.clone());
    catalogue
        .add_token("a", &[1; 32], &publisher, &Default::default(), 60)
        .await
        .unwrap();
    // A site that shows a publisher's token is refused, and the token stays good.
    let fault = catalogue
        .redeem_token("a", &[1; 32], &Claim::Site(name.clone()), &[7; 32])
        .await
        .unwrap_err();
    assert!(fault.message.contains("is for a publisher"), "{fault}");
    assert!(!catalogue.publisher_seen(&name).await.unwrap());
    assert_eq!(
        catalogue
            .redeem_token("a", &[1; 32], &Claim::Publisher, &[7; 32])
            .await
            .unwrap(),
        publisher
    );
    assert!(catalogue.publisher_seen(&name).await.unwrap());
    assert!(catalogue.sites().await.unwrap().is_empty());
    assert_eq!(
        catalogue
            .select_sites(&"all".parse().unwrap())
            .await
            .unwrap_err()
            .code,
        Code::NotFound
    );
    // Nor can a site take its name, or a publisher that of a site.
    let site = Holder::Site(name);
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
            &Holder::Site("west".parse().unwrap()),
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

pub(crate) async fn the_hub_says_who_may_have_what_sites_publish_and_a_site_can_only_narrow_it(
    catalogue: Catalogue,
) {
    let sites = [
        join(&catalogue, "a", &[]).await,
        join(&catalogue, "b", &[]).await,
        join(&catalogue, "c", &[("line", "3")]).await,
        join(&catalogue, "d", &[("line", "4")]).await,
    ];
    // Of what a published: to a itself, b, c and d.
    let check = async |catalogue: &Catalogue, expected: [Option<Forbids>; 4]| {
        for (site, expected) in sites.iter().zip(expected) {
            assert_eq!(
                catalogue.forbidden_by(&sites[0], site).await.unwrap(),
                expected,
                "{site}"
            );
            assert_eq!(
                catalogue.shares_with(&sites[0], site).await.unwrap(),
                expected.is_none(),
                "{site}"
            );
        }
    };
    let (hub, origin) = (Some(Forbids::Hub), Some(Forbids::Origin));
    let policy = under(&catalogue, &["b", "line=3"]);
    check(&catalogue, [None; 4]).await;
    check(&policy, [None, None, None, hub]).await;
    check(&under(&catalogue, &["all"]), [None; 4]).await;
    check(&under(&catalogue, &[]), [None, hub, hub, hub]).await;

    catalogue
        .set_share(&sites[0], Some(&["b".to_owned(), "d".to_owned()]))
        .await
        .unwrap();
    check(&catalogue, [None, None, origin, None]).await;
    check(&policy, [None, None, origin, hub]).await;
    catalogue.set_share(&sites[0], Some(&[])).await.unwrap();
    check(&policy, [None, origin, origin, hub]).await;
    // That was a's list: what b publishes goes as far as the hub lets it.
    assert!(policy.shares_with(&sites[1], &sites[2]).await.unwrap());
    assert!(!policy.shares_with(&sites[1], &sites[0]).await.unwrap());
}

pub(crate) async fn the_hubs_policy_ends_open_transfers_of_what_sites_published_and_no_others(
    catalogue: Catalogue,
) {
    let sites = [
        join(&catalogue, "a", &[]).await,
        join(&catalogue, "b", &[]).await,
        join(&catalogue, "c", &[]).await,
    ];
    let published = [
        ("model/of-a:1", root(1), Some(&sites[0])),
        ("model/of-hub:1", root(2), None),
    ];
    for (name, root, origin) in &published {
        let artifact: ArtifactRef = name.parse().unwrap();
        catalogue
            .add_artifact(&artifact, root, *origin)
            .await
            .unwrap();
        let part = Part {
            artifact,
            digest: root.digest(),
            total: 1,
            needs: None,
            sites: sites.to_vec(),
        };
        catalogue
            .deliver(
                &name.replace(['/', ':'], "-").parse().unwrap(),
                None,
                &[part],
                &[],
            )
            .await
            .unwrap();
    }
    // To a, b and c.
    let check = async |catalogue: &Catalogue, of_a: [bool; 3]| {
        for (site, of_a) in sites.iter().zip(of_a) {
            assert_eq!(
                catalogue.is_shared(site, root(1).digest()).await.unwrap(),
                of_a,
                "{site}"
            );
            assert!(
                catalogue.is_shared(site, root(2).digest()).await.unwrap(),
                "the hub's own is no site's to keep from {site}"
            );
        }
    };
    check(&catalogue, [true; 3]).await;
    check(&under(&catalogue, &["b"]), [true, true, false]).await;
    check(&under(&catalogue, &[]), [true, false, false]).await;
}
