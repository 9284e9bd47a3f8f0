//! Transfers as the hub reports them, for requests that this site cannot answer alone: a delivery
//! has parts at other sites.
//!
//! The API calls this through [`super::Site`]. A long list is read from the hub a page at a time;
//! each page is one answer of the hub.

use super::Site;
use crate::api::types::{CURSOR_OF_HUB, Transfer, TransferQuery};
use base::fault::Fault;
use base::limits::{ANSWER_BYTES_MAX, ID_BYTES_MAX};
use base::names::WorkIds;
use model::paging::{self, Page};
use model::protocol::AskHub;

impl Site {
    /// A page of the transfers as the hub reports them, and the next cursor. `after`: the hub's
    /// cursor of the page before. Each page is one answer of the hub.
    pub(super) async fn page_at_hub(
        &self,
        id: &str,
        query: &TransferQuery,
        after: Option<u64>,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        let since = query
            .since
            .filter(|cursor| cursor & CURSOR_OF_HUB != 0)
            .map(|cursor| cursor & !CURSOR_OF_HUB);
        // An id that does not parse belongs to no transfer.
        let id: WorkIds = id.parse().map_err(|_| no_such_work(id))?;
        let asked = AskHub::Transfers {
            id,
            since: after.or(since),
            wait: since.and(query.wait).unwrap_or(0),
        };
        let (mut rows, cursor): (Vec<Transfer>, u64) = self.inner.hub.ask(&asked).await?;
        mark(&mut rows);
        // A client with a cursor requests the next page itself.
        let page = match since {
            None => page_of_hub(rows, cursor, after),
            Some(_) => Page::whole(rows),
        };
        Ok((page, cursor | CURSOR_OF_HUB))
    }
}

/// Marks the cursors of rows that are passed on as the hub's.
pub(super) fn mark(rows: &mut [Transfer]) {
    rows.iter_mut().for_each(|row| row.cursor |= CURSOR_OF_HUB);
}

/// Whether an answer of the hub may be incomplete for lack of space: it ends after a row, and no
/// row takes half the space.
pub(super) fn is_full<T: serde::Serialize>(rows: &[T]) -> bool {
    paging::json_bytes(rows) > ANSWER_BYTES_MAX / 2
}

/// The key of a page of the hub's transfers begins with this; the cursor follows.
const HUB_PAGE: &str = "hub ";

/// The cursor in the key of a page of the hub's transfers.
pub(super) fn cursor_of_hub(key: &str) -> Option<u64> {
    key.strip_prefix(HUB_PAGE)?.parse().ok()
}

/// An answer of the hub as a page; `after` is the cursor that it continues. Rows that change while
/// the pages are read are returned again, with a higher cursor.
fn page_of_hub(rows: Vec<Transfer>, cursor: u64, after: Option<u64>) -> Page<Transfer> {
    let has_more = is_full(&rows) && after.is_none_or(|after| cursor > after);
    Page {
        next: has_more.then(|| format!("{HUB_PAGE}{cursor}")),
        repeats: has_more || after.is_some(),
        rows,
    }
}

/// The fault for an id that belongs to no transfer or delivery.
pub(super) fn no_such_work(id: &str) -> Fault {
    let id: String = id.chars().take(ID_BYTES_MAX).collect();
    Fault::not_found(format!(
        "there is no transfer or delivery {}",
        id.escape_debug()
    ))
    .with_next("'packhorse status' lists them")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::State;

    #[test]
    fn the_pages_of_the_hub_continue_until_an_answer_is_not_full() {
        let row = |message: usize| Transfer {
            message: Some("x".repeat(message)),
            ..crate::api::fake::transfer("t-1", "chengdu", State::Queued)
        };
        let full = || vec![row(ANSWER_BYTES_MAX / 2 + 1)];
        let first = page_of_hub(full(), 7, None);
        assert!(first.repeats);
        let after = cursor_of_hub(&first.next.unwrap());
        assert_eq!(after, Some(7));
        // The last page may contain a row of the first one, with a newer state.
        let last = page_of_hub(vec![row(1)], 9, after);
        assert_eq!((last.next, last.repeats, last.rows.len()), (None, true, 1));
        // A hub that does not advance its cursor would be asked for ever.
        assert_eq!(page_of_hub(full(), 7, after).next, None);
        let only = page_of_hub(vec![row(1)], 9, None);
        assert_eq!((only.next, only.repeats), (None, false));
        assert_eq!(cursor_of_hub("t-1"), None);
    }
}
