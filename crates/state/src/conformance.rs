//! The conformance suite of engines: what every database must do. Each engine runs it in its own
//! tests, on an empty catalogue for each case, through [`catalogue_suite`].

pub(crate) mod artifacts;
pub(crate) mod events;
pub(crate) mod lists;
pub(crate) mod sites;
pub(crate) mod transfers;

use base::names::SiteName;
use base::peer::Peer;
use content::manifest::{KindInfo, Root, Totals};
use model::transfer::State;
use transport::identity::Claim;

use crate::{Body, Catalogue, Part, TransferRow, Want};

/// Defines one test for each case. `$open` is an async function that returns an empty catalogue,
/// after what must live as long.
macro_rules! catalogue_suite {
    ($open:path) => {
        crate::conformance::catalogue_suite! { $open;
            artifacts::an_artifact_never_changes,
            artifacts::what_is_published_while_it_is_given_back_stays,
            artifacts::what_is_read_in_a_folder_is_found,
            artifacts::what_changed_where_it_was_published_is_an_event_once,
            artifacts::of_what_changed_the_newest_sound_version_from_the_same_place_is_known,
            artifacts::the_hub_believes_of_each_site_what_changed_of_its_own,
            events::event_numbers_have_no_gap_and_a_reader_misses_none,
            events::a_cursor_from_which_changes_would_be_missed_is_refused,
            events::a_change_wakes_only_those_that_wait_for_its_subject,
            events::with_many_sites_a_change_for_one_is_read_by_one,
            lists::lists_go_on_behind_any_row,
            lists::whoever_follows_by_a_cursor_misses_none_of_many_that_change_at_once,
            sites::a_token_is_good_once_and_for_a_while,
            sites::a_publisher_is_no_site,
            sites::the_list_of_a_site_and_the_labels_of_another_decide_whether_it_receives,
            sites::the_origins_of_content_are_those_of_what_was_delivered,
            transfers::delivering_twice_is_one_transfer_and_a_cursor_shows_what_is_new,
            transfers::labels_wait_for_their_dataset_at_the_same_site,
            transfers::what_a_run_borrowed_goes_and_what_others_want_stays,
            transfers::what_a_run_may_be_giving_back_is_brought_again,
            transfers::a_transfer_knows_whether_it_landed_before_it_was_begun_again,
        }
    };
    ($open:path; $($subject:ident::$case:ident,)*) => {
        $(
            #[tokio::test]
            async fn $case() {
                let (_keep, catalogue) = $open().await;
                crate::conformance::$subject::$case(catalogue).await;
            }
        )*
    };
}
pub(crate) use catalogue_suite;

pub(crate) fn root(bytes: u64) -> Root {
    let totals = Totals {
        bytes,
        ..Totals::default()
    };
    let chunking = content::chunk::DEFAULT_CHUNKING;
    Root {
        format: 1,
        kind: base::names::Kind::Model,
        info: KindInfo::Files,
        chunking,
        totals,
        depth: 0,
        pages: vec![],
    }
}

/// What a site reports of a transfer that is done.
pub(crate) fn signed() -> Body {
    serde_json::from_str(r#"{"receipt":{"statement":"s","signature":"x","certificate":"y"}}"#)
        .unwrap()
}

/// What a hub asks of site b.
pub(crate) fn wanted(id: &str, artifact: &str, generation: i64) -> TransferRow {
    TransferRow {
        id: id.parse().unwrap(),
        delivery: "d-1".parse().unwrap(),
        artifact: artifact.parse().unwrap(),
        digest: root(1).digest(),
        site: "b".parse().unwrap(),
        want: Want::Run,
        generation,
        state: State::Queued,
        body: Body::default(),
        created_ms: 1,
        updated_ms: 0,
        finished_ms: None,
        cursor: 0,
        after: Vec::new(),
        removed_ms: None,
    }
}

pub(crate) async fn join(catalogue: &Catalogue, name: &str, labels: &[(&str, &str)]) -> SiteName {
    let site: SiteName = name.parse().unwrap();
    let labels = labels
        .iter()
        .map(|&(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    catalogue
        .add_token(name, &[1; 32], &Peer::Site(site.clone()), &labels, 60)
        .await
        .unwrap();
    catalogue
        .redeem_token(name, &[1; 32], &Claim::Site(site.clone()), &[7; 32])
        .await
        .unwrap();
    site
}

/// An artifact with the root of [`root`]`(1)` to these sites.
pub(crate) fn part(name: &str, sites: &[SiteName]) -> Part {
    Part {
        artifact: name.parse().unwrap(),
        digest: root(1).digest(),
        total: 1,
        needs: None,
        sites: sites.to_vec(),
    }
}
