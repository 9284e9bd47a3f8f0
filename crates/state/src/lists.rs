//! Lists that are read a page at a time, each page within a number of rows and of bytes: no list is
//! in memory as a whole.

use base::fault::Fault;
use base::limits::API_ROWS_DEFAULT;
use base::names::{ArtifactRef, DeliveryId};
use model::paging::{Page, Pager, Room};
use model::transfer::TransferQuery;
use serde::Serialize;

use crate::engine::Listed;
use crate::{ArtifactRow, Catalogue, SiteRow, TransferRow};

impl Catalogue {
    /// Shows the transfers that a query means one by one until `see` says `false`, `rows` of them
    /// at most: what changed since a cursor in that order, the transfers of ids as they were begun,
    /// else the newest first. `behind`: the transfer behind which it continues, where there is no
    /// cursor.
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

    /// A page of the transfers that a query means, as `show` shows them, and the cursor to continue
    /// from: behind what the page holds, where the query has one.
    pub async fn transfer_page<T: Serialize + Send>(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&TransferRow) -> T + Send,
    ) -> Result<(Page<T>, u64), Fault> {
        // Before the rows: what changes meanwhile must still come.
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
        // An earlier version gave several transfers one cursor: those go together, if they fit.
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

    /// The transfers that a query means, `limit` of them at most (1,000 when it does not say), and
    /// the cursor to continue from.
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
        // A reader who got a full page continues behind it, not behind what it was not shown.
        let is_full = query.since.is_some() && read > 0 && read == limit;
        Ok((rows, if is_full { last as u64 } else { newest }))
    }

    /// A page of the transfers of an artifact, in the order in which they were begun, behind this
    /// one.
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

    /// A page of the artifacts by name, behind this one, as `show` shows them.
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

    /// A page of the sites by name, behind this one, as `show` shows them.
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

    /// Shows the transfers of a delivery one by one, in the order in which they were begun.
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
