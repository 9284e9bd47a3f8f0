use super::*;
use crate::api::types::{State, TransferQuery};
use crate::fault::Code;
use crate::manifest::{KindInfo, Root, Totals};
use crate::names::{ArtifactRef, SiteName};

async fn catalogue() -> (tempfile::TempDir, Catalogue) {
    let dir = tempfile::tempdir().unwrap();
    let catalogue = Catalogue::open(dir.path()).await.unwrap();
    (dir, catalogue)
}

fn root(bytes: u64) -> Root {
    let totals = Totals { bytes, ..Totals::default() };
    let chunking = crate::chunk::DEFAULT_CHUNKING;
    Root { format: 1, kind: crate::names::Kind::Model, info: KindInfo::Files, chunking, totals, depth: 0, pages: vec![] }
}

#[tokio::test]
async fn an_artifact_never_changes() {
    let (_dir, catalogue) = catalogue().await;
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    assert!(catalogue.add_artifact(&name, &root(1), None).await.unwrap());
    assert!(!catalogue.add_artifact(&name, &root(1), None).await.unwrap());
    assert_eq!(catalogue.add_artifact(&name, &root(2), None).await.unwrap_err().code, Code::Conflict);
    assert_eq!(catalogue.artifact(&name).await.unwrap().digest, root(1).digest());
}

#[tokio::test]
async fn a_token_is_good_once_and_for_a_while() {
    let (_dir, catalogue) = catalogue().await;
    let site: SiteName = "west".parse().unwrap();
    catalogue.add_token("a", &[1; 32], &site, &Default::default(), 60).await.unwrap();
    assert_eq!(catalogue.redeem_token("a", &[2; 32], &site).await.unwrap_err().code, Code::NotAllowed);
    assert_eq!(catalogue.redeem_token("a", &[1; 32], &site).await.unwrap(), site);
    assert!(catalogue.redeem_token("a", &[1; 32], &site).await.unwrap_err().message.contains("used"));
    catalogue.add_token("b", &[1; 32], &site, &Default::default(), 0).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert!(catalogue.redeem_token("b", &[1; 32], &site).await.unwrap_err().message.contains("expired"));
}

#[tokio::test]
async fn delivering_twice_is_one_transfer_and_a_cursor_shows_what_is_new() {
    let (_dir, catalogue) = catalogue().await;
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    let sites: Vec<SiteName> = vec!["a".parse().unwrap(), "b".parse().unwrap()];
    let first = catalogue.deliver("d-1", &name, root(1).digest(), 1, &sites).await.unwrap();
    assert_eq!(catalogue.deliver("d-2", &name, root(1).digest(), 1, &sites).await.unwrap(), first);
    let (all, cursor) = catalogue.transfers(&TransferQuery::default()).await.unwrap();
    assert_eq!(all.len(), 2);
    let since = |c| TransferQuery { since: Some(c), ..Default::default() };
    assert!(catalogue.transfers(&since(cursor)).await.unwrap().0.is_empty());
    catalogue.update_transfer(&first[1], 0, State::Done, &Body::default()).await.unwrap();
    let (news, _) = catalogue.transfers(&since(cursor)).await.unwrap();
    assert_eq!(news.iter().map(|t| &t.id).collect::<Vec<_>>(), [&first[1]]);
    catalogue.update_transfer(&first[1], 0, State::Planning, &Body::default()).await.unwrap();
    assert_eq!(catalogue.transfer(&first[1]).await.unwrap().state, State::Done, "what is done stays done");
    assert!(catalogue.is_entitled(&sites[0], root(1).digest()).await.unwrap());
    assert!(!catalogue.is_entitled(&sites[0], root(2).digest()).await.unwrap());
}
