//! Lists that are read in pages. Each page has a maximum number of rows and of bytes, so that no
//! complete list is in memory.

use base::fault::Fault;
use base::limits::API_ROWS_DEFAULT;
use base::names::{ArtifactRef, DeliveryId};
use model::paging::{Page, Pager, Room};
use model::transfer::TransferQuery;
use serde::Serialize;

use crate::engine::Listed;
use crate::{ArtifactRow, Catalogue, SiteRow, TransferRow};

impl Catalogue {
    /// Passes the transfers that a query selects to `see`, one by one, until `see` returns `false`;
    /// `rows` at most. The order: by event number for a query with a cursor, by time of creation
    /// for a query with ids, else the newest first. `behind`: the list continues after this
    /// transfer, if the query has no cursor.
    pub async fn scan_transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        rows: i64,
        mut see: impl FnMut(TransferRow) -> bool + Send,
    ) -> Result<(), Fault> {
        let see = &mut |row: Listed<_>| match row {
            Listed::Row(row) => see(row),
            Listed::Malformed { .. } => true,
        };
        self.each_transfer(query, behind, rows, see).await
    }

    /// A page of the transfers that a query selects, converted by `show`, and the cursor to
    /// continue from. If the query has a cursor, the new cursor is that of the last row of the
    /// page.
    pub async fn transfer_page<T: Serialize + Send>(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&TransferRow) -> T + Send,
    ) -> Result<(Page<T>, u64), Fault> {
        // Read before the rows: a change during the query must be returned by the next query.
        let newest = self.cursor().await?;
        if let Some(since) = query.since {
            self.check_cursor(since).await?;
        }
        let mut pager = Pager::new(room);
        // The cursor of each row that was read, and whether it is on the page.
        let (mut cursors, mut cut_at): (Vec<(i64, bool)>, Option<i64>) = (Vec::new(), None);
        let see = &mut |row: Listed<_>| match row {
            Listed::Malformed { key, cursor } => {
                cursors.push((cursor, false));
                pager.skip(key)
            }
            Listed::Row(row) => {
                let is_in = pager.put(show(&row), &*row.id);
                match is_in {
                    true => cursors.push((row.cursor, true)),
                    false => cut_at = Some(row.cursor),
                }
                is_in
            }
        };
        self.each_transfer(query, behind, room.rows_asked(), see)
            .await?;
        let mut page = pager.page();
        let (Some(_), Some(_), Some((last, _))) =
            (&page.next, query.since, cursors.last().copied())
        else {
            return Ok((page, newest));
        };
        // An earlier version gave several transfers the same cursor: they are on the same page if
        // they fit.
        let before = cursors
            .iter()
            .take_while(|(cursor, _)| *cursor < last)
            .count();
        if cut_at == Some(last) && before > 0 {
            cursors.truncate(before);
            page.rows
                .truncate(cursors.iter().filter(|(_, is_on_page)| *is_on_page).count());
        }
        let cursor = cursors.last().map_or(newest, |(cursor, _)| *cursor as u64);
        Ok((page, cursor))
    }

    /// The transfers that a query selects, at most `limit` (default: 1,000), and the cursor to
    /// continue from.
    pub async fn transfers(&self, query: &TransferQuery) -> Result<(Vec<TransferRow>, u64), Fault> {
        let newest = self.cursor().await?;
        let limit = i64::from(query.limit.unwrap_or(API_ROWS_DEFAULT));
        let (mut rows, mut read, mut last) = (Vec::new(), 0, 0);
        let see = &mut |row: Listed<TransferRow>| {
            read += 1;
            match row {
                Listed::Malformed { cursor, .. } => last = cursor,
                Listed::Row(row) => {
                    last = row.cursor;
                    rows.push(row);
                }
            }
            true
        };
        self.each_transfer(query, None, limit, see).await?;
        // A reader that received a full page continues after its last row, not after rows that it
        // did not receive.
        let is_full = query.since.is_some() && read > 0 && read == limit;
        Ok((rows, if is_full { last as u64 } else { newest }))
    }

    /// A page of the transfers of an artifact, by time of creation, beginning after this one.
    pub async fn artifact_transfer_page<T: Serialize + Send>(
        &self,
        artifact: &ArtifactRef,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&TransferRow) -> T + Send,
    ) -> Result<Page<T>, Fault> {
        let mut pager = Pager::new(room);
        let see = &mut |row: Listed<_>| match row {
            Listed::Malformed { key, .. } => pager.skip(key),
            Listed::Row(row) => pager.put(show(&row), &*row.id),
        };
        self.each_transfer_of_artifact(artifact, behind, room.rows_asked(), see)
            .await?;
        Ok(pager.page())
    }

    /// A page of the artifacts by name, beginning after this one, converted by `show`.
    pub async fn artifact_page<T: Serialize + Send>(
        &self,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&ArtifactRow) -> T + Send,
    ) -> Result<Page<T>, Fault> {
        let mut pager = Pager::new(room);
        let see = &mut |row: Listed<_>| match row {
            Listed::Malformed { key, .. } => pager.skip(key),
            Listed::Row(row) => pager.put(show(&row), row.artifact.to_string()),
        };
        self.each_artifact(behind, room.rows_asked(), see).await?;
        Ok(pager.page())
    }

    /// A page of the sites by name, beginning after this one, converted by `show`.
    pub async fn site_page<T: Serialize + Send>(
        &self,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&SiteRow) -> T + Send,
    ) -> Result<Page<T>, Fault> {
        let mut pager = Pager::new(room);
        let see = &mut |row: Listed<_>| match row {
            Listed::Malformed { key, .. } => pager.skip(key),
            Listed::Row(row) => pager.put(show(&row), row.name.to_string()),
        };
        self.each_site(behind, room.rows_asked(), see).await?;
        Ok(pager.page())
    }

    /// Passes the transfers of a delivery one by one, by time of creation.
    pub async fn each_part(
        &self,
        id: &DeliveryId,
        mut see: impl FnMut(TransferRow) + Send,
    ) -> Result<(), Fault> {
        let query = TransferQuery {
            id: Some(id.to_string()),
            ..TransferQuery::default()
        };
        self.scan_transfers(&query, None, i64::MAX, |row| {
            see(row);
            true
        })
        .await
    }
}
