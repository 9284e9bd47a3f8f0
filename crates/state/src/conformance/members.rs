//! Tests of the certificates of sites and publishers, and of their revocation and removal.

use std::collections::BTreeMap;

use base::clock;
use base::fault::Code;
use base::names::SiteName;
use base::peer::Peer;
use model::policy::Standing;
use model::transfer::State;
use transport::identity::{Claim, LEAF_VALIDITY, Serial};

use super::{join, part, root, signed};
use crate::{Body, Catalogue, Member, TransferRow};

async fn member(catalogue: &Catalogue, who: &Peer) -> Member {
    catalogue.member(who).await.unwrap().unwrap()
}

/// Joins with a token of this id, and a key of its own.
async fn enrol(catalogue: &Catalogue, id: &str, site: &SiteName, key: u8) -> Serial {
    let who = Peer::Site(site.clone());
    catalogue
        .add_token(id, &[1; 32], &who, &BTreeMap::new(), 60)
        .await
        .unwrap();
    let claim = Claim::Site(site.clone());
    let key_hash = [key; 32];
    let redeemed = catalogue.redeem_token(id, &[1; 32], &claim, &key_hash);
    redeemed.await.unwrap().1
}

pub(crate) async fn of_a_name_only_the_newest_certificate_is_accepted(catalogue: Catalogue) {
    let site: SiteName = "west".parse().unwrap();
    let who = Peer::Site(site.clone());
    assert_eq!(catalogue.member(&who).await.unwrap(), None);
    let first = enrol(&catalogue, "a", &site, 1).await;
    catalogue.confirm(&who, &first).await.unwrap();
    let now = clock::now_ms();
    let row = member(&catalogue, &who).await;
    assert_eq!(row.serial.as_ref(), Some(&first));
    assert!(row.confirmed_ms.is_some() && row.changed.is_none());
    let left_ms = row.expires_ms.unwrap() - now;
    assert!(
        (left_ms - LEAF_VALIDITY.as_millis() as i64).abs() < 60_000,
        "{left_ms}"
    );
    assert_eq!(row.standing(&first, now), Standing::Current);
    // It is enrolled again: the old certificate is not accepted any more, and gets no new one.
    let second = enrol(&catalogue, "b", &site, 2).await;
    let row = member(&catalogue, &who).await;
    assert_eq!(row.standing(&first, now), Standing::Superseded);
    assert_eq!(row.standing(&second, now), Standing::Current);
    assert_eq!((row.confirmed_ms, row.previous), (None, None));
    let fault = catalogue.renew(&who, &first).await.unwrap_err();
    assert_eq!(fault.code, Code::NotAllowed);
    catalogue.confirm(&who, &first).await.unwrap();
    assert_eq!(member(&catalogue, &who).await.confirmed_ms, None);
    // A publisher of the same name would be another member.
    let other = Peer::Publisher("west".parse().unwrap());
    assert_eq!(catalogue.member(&other).await.unwrap(), None);
    assert_eq!(
        catalogue.renew(&other, &second).await.unwrap_err().code,
        Code::NotFound
    );
}

pub(crate) async fn a_renewal_keeps_the_certificate_before_it_until_the_new_one_was_seen(
    catalogue: Catalogue,
) {
    let site: SiteName = "west".parse().unwrap();
    let who = Peer::Site(site.clone());
    let first = enrol(&catalogue, "a", &site, 1).await;
    catalogue.confirm(&who, &first).await.unwrap();
    let day = 24 * 3600 * 1000;
    // The answer is lost twice: each time the site asks again over its connection with the first.
    let lost = catalogue.renew(&who, &first).await.unwrap();
    let second = catalogue.renew(&who, &first).await.unwrap();
    let now = clock::now_ms();
    let row = member(&catalogue, &who).await;
    assert_eq!(row.standing(&lost, now), Standing::Superseded);
    assert_eq!(row.standing(&first, now + 6 * day), Standing::Current);
    assert_eq!(row.standing(&first, now + 8 * day), Standing::Superseded);
    assert_eq!(row.standing(&second, now + 8 * day), Standing::Current);
    // The hub sees the second: the first has served its time.
    catalogue.confirm(&who, &second).await.unwrap();
    let row = member(&catalogue, &who).await;
    assert_eq!(row.standing(&first, now), Standing::Superseded);
    assert_eq!(row.standing(&second, now), Standing::Current);
    let confirmed = row.confirmed_ms;
    catalogue.confirm(&who, &second).await.unwrap();
    assert_eq!(member(&catalogue, &who).await.confirmed_ms, confirmed);
    // The hub is restored from a backup of before, and the site presents what it got since.
    let later = Serial::next(Some(&second), 0);
    catalogue.confirm(&who, &later).await.unwrap();
    let row = member(&catalogue, &who).await;
    assert_eq!(row.serial.as_ref(), Some(&later));
    assert_eq!(row.standing(&second, now), Standing::Superseded);
    let after = Serial::next(Some(&later), u64::MAX / 2);
    let next = catalogue.renew(&who, &after).await.unwrap();
    assert!(next.is_newer_than(&after));
}

pub(crate) async fn a_revoked_member_is_refused_and_not_selected_until_it_is_restored(
    catalogue: Catalogue,
) {
    let (a, b) = (
        join(&catalogue, "a", &[("line", "3")]).await,
        join(&catalogue, "b", &[("line", "3")]).await,
    );
    let who = Peer::Site(a.clone());
    let serial = member(&catalogue, &who).await.serial.unwrap();
    catalogue
        .add_token("unused", &[1; 32], &who, &BTreeMap::new(), 60)
        .await
        .unwrap();
    let cursor = catalogue.cursor().await.unwrap();
    catalogue
        .revoke(&who, "admin", Some("stolen"), true)
        .await
        .unwrap();
    assert!(catalogue.cursor().await.unwrap() > cursor, "it is an event");
    let row = member(&catalogue, &who).await;
    let revocation = row.revoked.clone().unwrap();
    assert_eq!(
        (revocation.by.as_str(), revocation.why.as_deref()),
        ("admin", Some("stolen"))
    );
    let changed = row.changed.clone().unwrap();
    assert_eq!(
        (changed.what.as_str(), changed.by.as_str()),
        ("revoked", "admin")
    );
    assert_eq!(row.standing(&serial, clock::now_ms()), Standing::Revoked);
    // A second revocation does not change who it was.
    catalogue.revoke(&who, "other", None, true).await.unwrap();
    assert_eq!(member(&catalogue, &who).await, row);
    assert_eq!(
        catalogue.renew(&who, &serial).await.unwrap_err().code,
        Code::NotAllowed
    );
    // No token lets it in: neither one from before nor a new one.
    let claim = Claim::Site(a.clone());
    let redeemed = catalogue
        .redeem_token("unused", &[1; 32], &claim, &[9; 32])
        .await;
    assert_eq!(redeemed.unwrap_err().code, Code::NotAllowed);
    // Its own key may still ask again for a lost answer otherwise.
    let redeemed = catalogue
        .redeem_token("a", &[1; 32], &claim, &[7; 32])
        .await;
    assert!(redeemed.unwrap_err().message.contains("revoked"));
    let added = catalogue
        .add_token("new", &[1; 32], &who, &BTreeMap::new(), 60)
        .await;
    assert_eq!(added.unwrap_err().code, Code::Conflict);
    for selector in ["all", "line=3"] {
        let selected = catalogue.select_sites(&selector.parse().unwrap()).await;
        assert_eq!(selected.unwrap(), std::slice::from_ref(&b), "{selector}");
    }
    let named = catalogue
        .select_sites(&"b,a".parse().unwrap())
        .await
        .unwrap_err();
    assert!(named.code == Code::Conflict && named.next.contains("packhorse site restore a"));

    catalogue.restore(&who, "admin").await.unwrap();
    let row = member(&catalogue, &who).await;
    assert_eq!(row.standing(&serial, clock::now_ms()), Standing::Current);
    assert_eq!(row.changed.clone().unwrap().what, "restored");
    assert_eq!(
        catalogue
            .select_sites(&"all".parse().unwrap())
            .await
            .unwrap()
            .len(),
        2
    );
    let redeemed = catalogue
        .redeem_token("unused", &[1; 32], &claim, &[9; 32])
        .await;
    assert!(redeemed.unwrap_err().message.contains("expired"));
    let unknown = Peer::Site("nobody".parse().unwrap());
    for result in [
        catalogue.revoke(&unknown, "admin", None, false).await,
        catalogue.restore(&unknown, "admin").await,
    ] {
        assert_eq!(result.unwrap_err().code, Code::NotFound);
    }
}

pub(crate) async fn labels_are_changed_and_selected_by_at_once(catalogue: Catalogue) {
    let site = join(&catalogue, "a", &[("line", "3"), ("region", "west")]).await;
    let set = [
        ("line".to_owned(), "4".to_owned()),
        ("new".to_owned(), "x".to_owned()),
    ]
    .into();
    let unset = ["region".to_owned(), "absent".to_owned()];
    catalogue
        .set_labels(&site, &set, &unset, "admin", true)
        .await
        .unwrap();
    let row = catalogue.site("a").await.unwrap().unwrap();
    assert_eq!(row.labels, set);
    assert_eq!(row.member.changed.clone().unwrap().what, "set");
    assert!(
        catalogue
            .select_sites(&"line=3".parse().unwrap())
            .await
            .is_err()
    );
    assert_eq!(
        catalogue
            .select_sites(&"line=4".parse().unwrap())
            .await
            .unwrap(),
        [site.clone()]
    );
    // The same labels again are no change.
    let cursor = catalogue.cursor().await.unwrap();
    catalogue
        .set_labels(&site, &set, &unset, "other", true)
        .await
        .unwrap();
    assert_eq!(catalogue.cursor().await.unwrap(), cursor);
    assert_eq!(
        catalogue.site("a").await.unwrap().unwrap().member,
        row.member
    );
}

pub(crate) async fn a_site_is_not_removed_while_something_would_be_lost(catalogue: Catalogue) {
    let (a, b) = (
        join(&catalogue, "a", &[]).await,
        join(&catalogue, "b", &[]).await,
    );
    let who = Peer::Site(a.clone());
    let old = member(&catalogue, &who).await.serial.unwrap();
    let artifact = "model/m:1".parse().unwrap();
    catalogue
        .add_artifact(&artifact, &root(1), Some(&a))
        .await
        .unwrap();
    let open = catalogue
        .deliver(
            &"d-1".parse().unwrap(),
            None,
            &[part("model/m:1", std::slice::from_ref(&a))],
            &[],
        )
        .await
        .unwrap();
    let losses = catalogue.losses(&a).await.unwrap();
    assert_eq!((losses.open_transfers, losses.last_copies.len()), (1, 1));
    let fault = catalogue
        .remove_member(&who, "admin", false)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::Conflict);
    for word in ["1 transfers to it", "model/m:1", "site a cannot be removed"] {
        assert!(fault.message.contains(word), "{fault}");
    }
    assert!(catalogue.site("a").await.unwrap().is_some());
    // Another site has the content, and the transfer ends with a receipt.
    let to_b = catalogue
        .deliver(
            &"d-2".parse().unwrap(),
            None,
            &[part("model/m:1", std::slice::from_ref(&b))],
            &[],
        )
        .await
        .unwrap();
    for id in open.iter().chain(&to_b) {
        catalogue
            .update_transfer(id, 0, State::Done, &signed())
            .await
            .unwrap();
    }
    assert_eq!(catalogue.losses(&a).await.unwrap(), Default::default());
    catalogue.remove_member(&who, "admin", false).await.unwrap();
    assert!(catalogue.site("a").await.unwrap().is_none());
    assert_eq!(catalogue.member(&who).await.unwrap(), None);
    let kept: TransferRow = catalogue.transfer(&open[0]).await.unwrap();
    let receipt = |body: &Body| body.receipt.is_some();
    assert!(receipt(&kept.body) && kept.site == a, "its receipt stays");
    // The name is used again: the old certificate stays invalid.
    let new = enrol(&catalogue, "again", &a, 5).await;
    let row = member(&catalogue, &who).await;
    assert_eq!(row.standing(&old, 0), Standing::Superseded);
    assert_eq!(
        (row.standing(&new, 0), row.changed),
        (Standing::Current, None)
    );
    // With force, everything goes.
    catalogue
        .deliver(
            &"d-3".parse().unwrap(),
            None,
            &[part("model/m:1", std::slice::from_ref(&b))],
            &[],
        )
        .await
        .unwrap();
    catalogue
        .remove_member(&Peer::Site(b), "admin", true)
        .await
        .unwrap();
    assert_eq!(catalogue.sites().await.unwrap().len(), 1);
}

pub(crate) async fn of_a_hundred_joins_with_one_token_one_succeeds(catalogue: Catalogue) {
    let site: SiteName = "west".parse().unwrap();
    let who = Peer::Site(site.clone());
    catalogue
        .add_token("a", &[1; 32], &who, &BTreeMap::new(), 60)
        .await
        .unwrap();
    let claim = Claim::Site(site);
    let joins = (0..100u8).map(|key| {
        let (catalogue, claim) = (catalogue.clone(), claim.clone());
        async move {
            catalogue
                .redeem_token("a", &[1; 32], &claim, &[key; 32])
                .await
        }
    });
    let mut redeemed = Vec::new();
    for join in joins.map(tokio::spawn).collect::<Vec<_>>() {
        match join.await.unwrap() {
            Ok((_, serial)) => redeemed.push(serial),
            Err(fault) => assert!(fault.message.contains("was used already"), "{fault}"),
        }
    }
    assert_eq!(redeemed.len(), 1);
    assert_eq!(member(&catalogue, &who).await.serial, redeemed.pop());
}
