//! The test suite that every engine must pass. Each engine runs it in its own tests through
//! [`catalogue_suite`], with an empty catalogue for each case.

pub(crate) mod access;
pub(crate) mod artifacts;
pub(crate) mod events;
pub(crate) mod lists;
pub(crate) mod members;
pub(crate) mod sites;
pub(crate) mod transfers;

use base::names::SiteName;
use base::peer::Peer;
use content::manifest::{KindInfo, Root, Totals};
use model::transfer::State;
use transport::identity::Claim;

use crate::{Body, Catalogue, Part, TransferRow, Want};

/// Defines one test for each case. `$open` is an async function that returns an object to keep
/// alive (for example a directory) and an empty catalogue.
macro_rules! catalogue_suite {
    ($open:path) => {
        crate::conformance::catalogue_suite! { $open;
            access::a_token_is_stored_rotated_and_revoked,
            artifacts::an_artifact_never_changes,
            artifacts::an_artifact_that_is_published_during_its_removal_stays,
            artifacts::an_artifact_is_found_by_the_folder_of_its_storage_location,
            artifacts::a_change_of_published_content_is_recorded_as_an_event_once,
            artifacts::a_changed_artifact_has_the_newest_unchanged_version_from_the_same_location,
            artifacts::the_hub_accepts_the_changes_that_a_site_reports_only_for_its_own_artifacts,
            events::event_numbers_have_no_gap_and_a_reader_misses_none,
            events::a_cursor_from_which_changes_would_be_missed_is_refused,
            events::a_change_wakes_only_those_that_wait_for_its_subject,
            events::with_many_sites_a_change_for_one_is_read_by_one,
            events::an_event_keeps_what_its_subject_was_like,
            lists::a_list_continues_after_any_row,
            lists::a_reader_that_follows_a_cursor_misses_none_of_many_simultaneous_changes,
            members::of_a_name_only_the_newest_certificate_is_accepted,
            members::a_renewal_keeps_the_certificate_before_it_until_the_new_one_was_seen,
            members::a_revoked_member_is_refused_and_not_selected_until_it_is_restored,
            members::labels_are_changed_and_selected_by_at_once,
            members::a_site_is_not_removed_while_something_would_be_lost,
            members::of_a_hundred_joins_with_one_token_one_succeeds,
            sites::a_token_can_be_used_once_and_expires,
            sites::what_was_heard_of_sites_is_stored_and_is_no_event,
            sites::a_publisher_is_not_a_site,
            sites::the_manifests_that_all_sites_read,
            sites::the_sharing_list_of_a_site_and_the_labels_of_another_decide_whether_it_receives,
            sites::the_origins_of_content_are_the_origins_of_the_delivered_artifacts,
            transfers::a_repeated_delivery_has_one_transfer_and_a_cursor_returns_only_changes,
            transfers::a_new_transfer_has_the_greatest_id_although_the_clock_was_put_back,
            transfers::labels_wait_for_their_dataset_at_the_same_site,
            transfers::only_inputs_that_nothing_else_needs_are_removed_after_a_run,
            transfers::an_input_that_may_be_in_removal_is_delivered_again,
            transfers::a_restarted_transfer_records_whether_it_committed_its_artifact_before,
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

/// The report of a site about a done transfer.
pub(crate) fn signed() -> Body {
    serde_json::from_str(r#"{"receipt":{"statement":"s","signature":"x","certificate":"y"}}"#)
        .unwrap()
}

/// The request of a hub to site b.
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

/// An artifact with the root [`root`]`(1)` for these sites.
pub(crate) fn part(name: &str, sites: &[SiteName]) -> Part {
    Part {
        artifact: name.parse().unwrap(),
        digest: root(1).digest(),
        total: 1,
        needs: None,
        sites: sites.to_vec(),
    }
}
