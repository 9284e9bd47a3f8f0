//! Tests of the rows of artifacts.

use base::fault::Code;
use base::names::{ArtifactRef, SiteName};

use super::root;
use crate::{Catalogue, Offer, what_changed};
use std::path::Path;

pub(crate) async fn an_artifact_never_changes(catalogue: Catalogue) {
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    assert!(catalogue.add_artifact(&name, &root(1), None).await.unwrap());
    assert!(!catalogue.add_artifact(&name, &root(1), None).await.unwrap());
    assert_eq!(
        catalogue
            .add_artifact(&name, &root(2), None)
            .await
            .unwrap_err()
            .code,
        Code::Conflict
    );
    assert_eq!(
        catalogue.artifact(&name).await.unwrap().digest,
        root(1).digest()
    );
}

pub(crate) async fn an_artifact_that_is_published_during_its_removal_stays(catalogue: Catalogue) {
    let names: Vec<ArtifactRef> = ["model/m:1", "model/m:2", "model/m:3"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect();
    let [arrived, own] =
        ["/nas/m", "/home/m"].map(|path| sink::StorageLocation::Folder { path: path.into() });
    for name in &names {
        catalogue.add_artifact(name, &root(1), None).await.unwrap();
        catalogue
            .set_place(name, Some(&arrived), Some("/nas/m"))
            .await
            .unwrap();
    }
    let publish = async |name: &ArtifactRef| {
        catalogue
            .set_published(name, &own, "/home/m", 7, &Offer::default())
            .await
            .unwrap();
    };
    // Published before the removal, during the removal, and not published.
    publish(&names[0]).await;
    assert!(!catalogue.leave(&names[0]).await.unwrap());
    assert!(catalogue.artifact(&names[0]).await.unwrap().place.is_some());
    assert!(catalogue.leave(&names[1]).await.unwrap() && catalogue.leave(&names[2]).await.unwrap());
    publish(&names[1]).await;
    // The hub may have confirmed the offer already.
    catalogue.offered(&names[1]).await.unwrap();
    for name in &names[1..] {
        catalogue.remove_left(name).await.unwrap();
    }
    let there = catalogue.artifact(&names[1]).await.unwrap();
    assert_eq!((there.published, there.place.as_ref()), (true, Some(&own)));
    assert_eq!(
        catalogue.artifact(&names[2]).await.unwrap_err().code,
        Code::NotFound
    );
}

pub(crate) async fn an_artifact_is_found_by_the_folder_of_its_storage_location(
    catalogue: Catalogue,
) {
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    catalogue.add_artifact(&name, &root(1), None).await.unwrap();
    let place = sink::StorageLocation::Folder {
        path: "/data/runs/r/output".into(),
    };
    catalogue
        .set_place(&name, Some(&place), Some(""))
        .await
        .unwrap();
    let found = async |folder: &str| catalogue.published_in(Path::new(folder)).await.unwrap();
    assert_eq!(found("/data/runs/r").await, None, "it was delivered there");
    catalogue.set_place(&name, None, None).await.unwrap();
    catalogue
        .set_published(&name, &place, "", 7, &Offer::default())
        .await
        .unwrap();
    for folder in ["/data/runs/r", "/data/runs/r/output"] {
        assert_eq!(found(folder).await, Some(name.clone()), "{folder}");
    }
    for folder in ["/data/runs/r/output/a", "/data/runs/r/out", "/data/runs/x"] {
        assert_eq!(found(folder).await, None, "{folder}");
    }
}

pub(crate) async fn a_change_of_published_content_is_recorded_as_an_event_once(
    catalogue: Catalogue,
) {
    let names: Vec<ArtifactRef> = ["model/m:1", "model/m:2", "model/m:3"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect();
    let place = sink::StorageLocation::Folder {
        path: "/nas".into(),
    };
    for name in &names {
        catalogue.add_artifact(name, &root(1), None).await.unwrap();
    }
    for name in &names[..2] {
        catalogue
            .set_published(name, &place, "/nas", 7, &Offer::default())
            .await
            .unwrap();
    }
    let published = names[..2].iter().map(|name| (name.clone(), place.clone()));
    assert_eq!(
        catalogue.published().await.unwrap(),
        published.collect::<Vec<_>>()
    );
    assert_eq!(catalogue.artifact(&names[0]).await.unwrap().published_ms, 7);
    let before = catalogue.cursor().await.unwrap();
    assert!(
        !catalogue.set_changed(&names[0], None).await.unwrap(),
        "it was unchanged"
    );
    assert!(
        catalogue
            .set_changed(&names[0], Some("a is gone"))
            .await
            .unwrap()
    );
    assert!(
        !catalogue
            .set_changed(&names[0], Some("a is gone"))
            .await
            .unwrap()
    );
    assert!(
        catalogue
            .set_changed(&names[0], Some("b is gone"))
            .await
            .unwrap()
    );
    assert_eq!(catalogue.cursor().await.unwrap(), before + 2);
    assert_eq!(
        catalogue
            .artifact(&names[0])
            .await
            .unwrap()
            .changed
            .as_deref(),
        Some("b is gone")
    );
    // The change is reported to the hub only after the hub has confirmed the artifact.
    assert!(catalogue.changed_here().await.unwrap().is_empty());
    catalogue.offered(&names[0]).await.unwrap();
    assert_eq!(
        catalogue.changed_here().await.unwrap(),
        [(names[0].clone(), "b is gone".into())]
    );
    assert!(catalogue.set_changed(&names[0], None).await.unwrap());
    assert!(catalogue.changed_here().await.unwrap().is_empty());
}

pub(crate) async fn a_changed_artifact_has_the_newest_unchanged_version_from_the_same_location(
    catalogue: Catalogue,
) {
    // In the order of their names: the location and time of the publish, whether it changed, and
    // the newer version from the same location.
    let all = [
        ("model/m:1", "a", 1, true, Some("model/m:3")),
        ("model/m:2", "a", 2, false, None),
        ("model/m:3", "a", 4, false, None),
        ("model/m:4", "a", 3, false, None),
        ("model/m:5", "a", 4, true, None),
        ("model/m:6", "b", 5, false, None),
        ("model/n:1", "a", 0, true, None),
    ];
    for (name, _, _, changed, _) in all {
        let name = name.parse().unwrap();
        catalogue.add_artifact(&name, &root(1), None).await.unwrap();
        catalogue
            .set_changed(&name, changed.then_some("a is gone"))
            .await
            .unwrap();
    }
    let rows = catalogue.artifacts().await.unwrap();
    let published = rows
        .into_iter()
        .zip(all)
        .map(|(row, (_, place, at_ms, ..))| (place, at_ms, row.artifact, row.changed));
    let found: Vec<_> = what_changed(published)
        .into_iter()
        .map(|c| (c.artifact, c.place, c.how, c.newer))
        .collect();
    let expected = all
        .into_iter()
        .filter(|(_, _, _, changed, _)| *changed)
        .map(|(name, place, _, _, newer)| {
            (
                name.parse::<ArtifactRef>().unwrap(),
                place,
                "a is gone".to_owned(),
                newer.map(|newer| newer.parse().unwrap()),
            )
        });
    assert_eq!(found, expected.collect::<Vec<_>>());
}

pub(crate) async fn the_hub_accepts_the_changes_that_a_site_reports_only_for_its_own_artifacts(
    catalogue: Catalogue,
) {
    let sites: Vec<SiteName> = vec!["a".parse().unwrap(), "b".parse().unwrap()];
    let names: Vec<ArtifactRef> = ["model/a:1", "model/a:2", "model/b:1", "model/hub:1"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect();
    for (name, origin) in
        names
            .iter()
            .zip([Some(&sites[0]), Some(&sites[0]), Some(&sites[1]), None])
    {
        catalogue
            .add_artifact(name, &root(1), origin)
            .await
            .unwrap();
    }
    let tell = async |site: usize, of: &[usize]| {
        let all: Vec<(ArtifactRef, base::text::Message)> = of
            .iter()
            .map(|&i| (names[i].clone(), format!("{i} is gone").into()))
            .collect();
        catalogue.set_changed_at(&sites[site], &all).await.unwrap()
    };
    let check = async |expected: [bool; 4]| {
        for (i, expected) in expected.into_iter().enumerate() {
            let changed = catalogue.artifact(&names[i]).await.unwrap().changed;
            assert_eq!(
                changed,
                expected.then(|| format!("{i} is gone")),
                "{}",
                names[i]
            );
        }
    };
    assert!(!tell(0, &[]).await);
    assert!(tell(1, &[2]).await);
    assert!(tell(0, &[0, 1, 2, 3]).await);
    check([true, true, true, false]).await;
    assert!(!tell(0, &[0, 1]).await);
    assert!(tell(0, &[1]).await);
    check([false, true, true, false]).await;
    assert!(tell(1, &[]).await);
    check([false, true, false, false]).await;
    // The hub now stores the content itself: changes at the site do not matter any more.
    catalogue.take_over(&names[1]).await.unwrap();
    check([false; 4]).await;
}
