//! Access tokens of the API.

use base::fault::Code;
use model::grant::{GrantScope, Role};

use crate::{AccessRow, Catalogue};

fn token(name: &str, id: &str) -> AccessRow {
    AccessRow {
        id: id.into(),
        name: name.into(),
        secret_hash: [7; 32],
        role: Role::Viewer,
        scope: GrantScope {
            artifacts: Some(vec!["dataset/line3-*".parse().unwrap()]),
            sites: Some("chengdu,xian".parse().unwrap()),
        },
        created_ms: 1,
        created_by: "admin".into(),
        rotated_ms: None,
        expires_ms: Some(1000),
        used_ms: None,
        revoked_ms: None,
    }
}

pub(crate) async fn a_token_is_stored_rotated_and_revoked(catalogue: Catalogue) {
    let (one, two) = (token("one", "aaaa"), token("two", "bbbb"));
    catalogue.add_access_token(&two).await.unwrap();
    catalogue.add_access_token(&one).await.unwrap();
    assert_eq!(
        catalogue.access_tokens().await.unwrap(),
        [one.clone(), two.clone()]
    );
    let fault = catalogue.add_access_token(&token("one", "cccc")).await;
    assert_eq!(fault.unwrap_err().code, Code::Conflict);

    let used = [("aaaa".to_owned(), 55), ("gone".to_owned(), 66)];
    catalogue.access_tokens_used(&used).await.unwrap();
    assert_eq!(
        catalogue.access_tokens().await.unwrap()[0].used_ms,
        Some(55)
    );

    let rotated = catalogue
        .rotate_access_token("one", "dddd", &[8; 32], None)
        .await
        .unwrap();
    assert!(rotated.rotated_ms.is_some());
    assert_eq!(
        rotated,
        AccessRow {
            id: "dddd".into(),
            secret_hash: [8; 32],
            expires_ms: None,
            rotated_ms: rotated.rotated_ms,
            ..one
        },
        "the new secret was never used"
    );
    let revoked = catalogue.revoke_access_token("one").await.unwrap();
    assert!(revoked.revoked_ms.is_some());
    assert_eq!(
        catalogue.revoke_access_token("one").await.unwrap(),
        revoked,
        "the time of the first revocation stays"
    );
    let fault = catalogue
        .rotate_access_token("one", "eeee", &[9; 32], None)
        .await;
    assert_eq!(fault.unwrap_err().code, Code::Conflict);
    for missing in [
        catalogue.revoke_access_token("none").await,
        catalogue
            .rotate_access_token("none", "ffff", &[9; 32], None)
            .await,
    ] {
        assert_eq!(missing.unwrap_err().code, Code::NotFound);
    }
    // A new token may have the name of a revoked one.
    catalogue
        .add_access_token(&token("one", "gggg"))
        .await
        .unwrap();
    let all = catalogue.access_tokens().await.unwrap();
    assert_eq!((all.len(), all[0].id.as_str()), (2, "gggg"));
}
