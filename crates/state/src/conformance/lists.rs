//! Tests of lists and of readers that follow a cursor.

use base::fault::Code;
use base::names::{ArtifactRef, SiteName};
use base::peer::Peer;
use model::paging::Room;
use model::transfer::TransferQuery;
use transport::identity::Claim;

use super::root;
use crate::{Catalogue, Part, TransferRow};

pub(crate) async fn a_list_continues_after_any_row(catalogue: Catalogue) {
    let artifact: ArtifactRef = "dataset/a:1".parse().unwrap();
    catalogue
        .add_artifact(&artifact, &root(1), None)
        .await
        .unwrap();
    let row = catalogue.artifact(&artifact).await.unwrap();
    for n in 0..7 {
        let part = Part::new(&row, &[format!("site-{n}").parse().unwrap()]);
        catalogue
            .deliver(&format!("d-{n}").parse().unwrap(), None, &[part], &[])
            .await
            .unwrap();
    }
    let ids = |rows: &[TransferRow]| {
        rows.iter()
            .map(|row| row.id.to_string())
            .collect::<Vec<_>>()
    };
    let all = ids(&catalogue
        .transfers(&TransferQuery::default())
        .await
        .unwrap()
        .0);
    let everything = TransferQuery::default();
    let room = |rows| Room {
        rows,
        bytes: 1 << 20,
    };
    let view = |row: &TransferRow| row.id.to_string();
    for (n, id) in all.iter().enumerate() {
        let (page, _) = catalogue
            .transfer_page(&everything, Some(id), room(3), view)
            .await
            .unwrap();
        let rest = &all[n + 1..(n + 4).min(all.len())];
        assert_eq!(
            page.rows.iter().collect::<Vec<_>>(),
            rest.iter().collect::<Vec<_>>()
        );
        assert_eq!(page.next, (n + 4 < all.len()).then(|| rest[2].clone()));
    }
    assert!(
        catalogue
            .transfer_page(&everything, Some("t-0"), room(3), view)
            .await
            .unwrap()
            .0
            .rows
            .is_empty()
    );
    // Pages limited by bytes have one row each. Queries with ids are ordered by time of creation.
    let ids_of = TransferQuery {
        id: Some(all.join(",")),
        ..TransferQuery::default()
    };
    let (mut seen, mut behind) = (Vec::new(), None);
    loop {
        let (page, _) = catalogue
            .transfer_page(
                &ids_of,
                behind.as_deref(),
                Room { rows: 9, bytes: 10 },
                view,
            )
            .await
            .unwrap();
        assert!(page.rows.len() <= 1);
        seen.extend(page.rows);
        let Some(next) = page.next else { break };
        behind = Some(next);
    }
    let mut oldest_first = all.clone();
    oldest_first.sort();
    assert_eq!(seen, oldest_first);
    let unknown = TransferQuery {
        id: Some(format!("{},t-0", all[0])),
        ..TransferQuery::default()
    };
    assert_eq!(
        catalogue
            .transfer_page(&unknown, None, room(3), view)
            .await
            .unwrap_err()
            .code,
        Code::NotFound
    );
    let deliveries = async |behind: Option<String>, limit, by_transfers| {
        let rows = catalogue
            .deliveries(behind.as_deref(), limit, by_transfers)
            .await
            .unwrap();
        rows.into_iter()
            .map(|row| row.id.to_string())
            .collect::<Vec<_>>()
    };
    for by_transfers in [false, true] {
        let all = deliveries(None, 100, by_transfers).await;
        assert_eq!(all.len(), 7);
        for (n, id) in all.iter().enumerate() {
            assert_eq!(
                deliveries(Some(id.clone()), 3, by_transfers).await,
                all[n + 1..(n + 4).min(all.len())]
            );
        }
    }
    assert_eq!(
        catalogue
            .artifact_page(None, room(3), |row| row.artifact.clone())
            .await
            .unwrap()
            .rows
            .len(),
        1
    );
    assert_eq!(
        catalogue.artifact_names_settled().await.unwrap(),
        std::slice::from_ref(&artifact)
    );
    let counted = catalogue.counted_transfers().await.unwrap();
    assert_eq!(counted.iter().map(|some| some.transfers).sum::<i64>(), 7);
    let bytes = row.root.totals.bytes;
    assert_eq!(
        catalogue
            .published_by(&Peer::Publisher("office".parse().unwrap()))
            .await
            .unwrap(),
        (0, 0)
    );
    catalogue
        .set_publisher(&artifact, &"office".parse().unwrap())
        .await
        .unwrap();
    assert_eq!(
        catalogue
            .published_by(&Peer::Publisher("office".parse().unwrap()))
            .await
            .unwrap(),
        (1, bytes)
    );
}

pub(crate) async fn a_reader_that_follows_a_cursor_misses_none_of_many_simultaneous_changes(
    catalogue: Catalogue,
) {
    let (artifacts, site): (Vec<ArtifactRef>, SiteName) = (
        (0..9)
            .map(|n| format!("dataset/a:{n}").parse().unwrap())
            .collect(),
        "west".parse().unwrap(),
    );
    let mut parts = Vec::new();
    for artifact in &artifacts {
        catalogue
            .add_artifact(artifact, &root(1), None)
            .await
            .unwrap();
        parts.push(Part::new(
            &catalogue.artifact(artifact).await.unwrap(),
            std::slice::from_ref(&site),
        ));
    }
    let ids = catalogue
        .deliver(&"d-1".parse().unwrap(), None, &parts, &[])
        .await
        .unwrap();
    let before = catalogue.cursor().await.unwrap();
    catalogue
        .add_token(
            "t",
            &[1; 32],
            &Peer::Site(site.clone()),
            &Default::default(),
            60,
        )
        .await
        .unwrap();
    catalogue
        .redeem_token("t", &[1; 32], &Claim::Site(site.clone()), &[7; 32])
        .await
        .unwrap();
    catalogue.site_seen(&site, true, 1, None).await.unwrap();
    let (mut since, mut seen) = (before, Vec::new());
    loop {
        let query = TransferQuery {
            since: Some(since),
            ..TransferQuery::default()
        };
        let (page, cursor) = catalogue
            .transfer_page(
                &query,
                None,
                Room {
                    rows: 2,
                    bytes: 1 << 20,
                },
                |row| row.id.to_string(),
            )
            .await
            .unwrap();
        assert!(page.rows.len() <= 2);
        seen.extend(page.rows);
        since = cursor;
        if page.next.is_none() {
            break;
        }
    }
    assert_eq!(
        seen,
        ids.iter().map(ToString::to_string).collect::<Vec<_>>()
    );
    assert_eq!(
        since,
        catalogue.cursor().await.unwrap(),
        "the event of the site comes after them"
    );
    assert!(
        catalogue
            .events(before, 100)
            .await
            .unwrap()
            .iter()
            .any(|event| event.what == "site" && event.name == "west")
    );
}
