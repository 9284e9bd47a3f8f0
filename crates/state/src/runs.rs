//! Training runs, stored as JSON that `model::run` defines, and the lineage of models.

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName};
use model::paging::{Page, Pager, Room};
use model::run::Lineage;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::engine::{Listed, See};
use crate::{Catalogue, json, malformed};

const TABLE: &str = "run";

/// The row of a training run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunRow {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: String,
    /// Whether the run has not ended, or its cleanup is not complete.
    pub open: bool,
    /// The run, as JSON.
    pub body: String,
}

/// Training runs, and the lineage of models.
#[async_trait]
pub trait Runs: Send + Sync {
    /// Writes a run that involves these sites.
    async fn put_run(&self, run: &RunRow, sites: &[SiteName]) -> Result<(), Fault>;

    /// One run.
    async fn run_row(&self, name: &str) -> Result<Option<RunRow>, Fault>;

    /// The runs that are open, oldest first.
    async fn open_run_rows(&self, limit: u32) -> Result<Vec<RunRow>, Fault>;

    /// Passes `rows` runs to `see`, the newest first: those that involve a site, or all. The list
    /// begins after the run `behind` and omits the first `skip` runs.
    async fn each_run(
        &self,
        of: Option<&SiteName>,
        behind: Option<&str>,
        skip: u32,
        rows: i64,
        see: See<'_, RunRow>,
    ) -> Result<(), Fault>;

    /// Records the lineage of a model.
    async fn set_lineage(&self, artifact: &ArtifactRef, lineage: &Lineage) -> Result<(), Fault>;

    /// The lineage of a model, if it is known. One that cannot be read is reported and counts as
    /// unknown.
    async fn lineage(&self, artifact: &ArtifactRef) -> Result<Option<Lineage>, Fault>;
}

fn parsed<T: DeserializeOwned>(row: &RunRow) -> Result<T, Fault> {
    serde_json::from_str(&row.body).map_err(|e| malformed(TABLE, &row.name, e))
}

impl Catalogue {
    /// Writes a run. It is `open` until it has ended and its cleanup is complete.
    pub async fn save_run<T: Serialize + Sync>(
        &self,
        name: &str,
        state: &str,
        open: bool,
        run: &T,
    ) -> Result<(), Fault> {
        let run = serde_json::to_value(run)
            .map_err(|e| Fault::internal(format!("a run as JSON: {e}")))?;
        let sites = ["/spec/from", "/spec/on"]
            .into_iter()
            .filter_map(|at| run.pointer(at)?.as_str()?.parse().ok())
            .collect::<Vec<_>>();
        let row = RunRow {
            name: name.into(),
            state: state.into(),
            open,
            body: json("a run", &run)?,
        };
        self.put_run(&row, &sites).await
    }

    /// One run.
    pub async fn run<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Fault> {
        self.run_row(name).await?.as_ref().map(parsed).transpose()
    }

    /// The runs that are open, oldest first. One that cannot be read is skipped and reported.
    pub async fn open_runs<T: DeserializeOwned>(&self, limit: u32) -> Result<Vec<T>, Fault> {
        let rows = self.open_run_rows(limit).await?;
        Ok(rows
            .iter()
            .filter_map(|row| self.common.malformed.sound(TABLE, &row.name, parsed(row)))
            .collect())
    }

    /// The same; `None` if one cannot be read: who is not listed is ended at its site.
    pub async fn complete_open_runs<T: DeserializeOwned>(
        &self,
        limit: u32,
    ) -> Result<Option<Vec<T>>, Fault> {
        let rows = self.open_run_rows(limit).await?;
        // All are parsed, so that each one that cannot be read is reported.
        let runs: Vec<Option<T>> = rows
            .iter()
            .map(|row| self.common.malformed.sound(TABLE, &row.name, parsed(row)))
            .collect();
        Ok(runs.into_iter().collect())
    }

    /// The same; fails if one cannot be read. For callers that remove what no run needs.
    pub async fn all_open_runs<T: DeserializeOwned>(&self, limit: u32) -> Result<Vec<T>, Fault> {
        self.open_run_rows(limit)
            .await?
            .iter()
            .map(parsed)
            .collect()
    }

    /// A page of the runs, the newest first, converted by `show`: those that involve a site, or
    /// all. The list begins after the run of this name and omits the first `skip` runs.
    pub async fn run_page<T: DeserializeOwned, S: Serialize + Send>(
        &self,
        of: Option<&SiteName>,
        behind: Option<&str>,
        skip: u32,
        room: Room,
        mut show: impl FnMut(&T) -> S + Send,
    ) -> Result<Page<S>, Fault> {
        let mut pager = Pager::new(room);
        let malformed = &self.common.malformed;
        let see = &mut |row: Listed<RunRow>| match row {
            Listed::Malformed { key, .. } => pager.skip(key),
            Listed::Row(row) => match malformed.sound(TABLE, &row.name, parsed(&row)) {
                Some(run) => pager.put(show(&run), row.name),
                None => pager.skip(row.name),
            },
        };
        self.each_run(of, behind, skip, room.rows_asked(), see)
            .await?;
        Ok(pager.page())
    }
}
