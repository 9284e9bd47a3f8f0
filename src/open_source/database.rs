//! Labels from a site's database: `db:LABEL_SET:VERSION`, `db:LABEL_SET` (the active version),
//! `db:SELECT …`.
//!
//! The canonical files are written to the caller's folder, from one snapshot. A publish at a site
//! calls this on a blocking thread.

use std::path::Path;

use tokio::sync::mpsc;

use super::{Access, AtSite};
use crate::api::types::SourceOptions;
use base::fault::Fault;
use base::limits::LABEL_BATCHES_QUEUED_MAX;
use base::names::{ArtifactRef, Kind};
use content::manifest::{DatasetBinding, KindInfo, LabelsInfo};
use source::Source;
use source::labels::{BoundDataset, LabelOptions, LabelsSource};

/// The prefix of a source in the database.
pub(super) const SCHEME: &str = "db:";

/// The first words of a query.
const QUERIES: [&str; 4] = ["SELECT", "WITH", "VALUES", "TABLE"];

pub(super) fn open(
    kind: Kind,
    asked: &str,
    options: &SourceOptions,
    dataset: Option<BoundDataset>,
    access: &Access,
    scratch: &Path,
    runtime: &tokio::runtime::Handle,
) -> Result<Box<dyn Source>, Fault> {
    if kind != Kind::Labels {
        return Err(Fault::usage(format!(
            "the label database holds labels, and this is to be {}",
            kind.with_article()
        )));
    }
    let Some(site) = access.site.as_ref() else {
        return Err(Fault::usage("a source that begins with db: is in a site's label database, and this is not a site's daemon")
            .with_next("run it at the site, with --config of the site"));
    };
    if options.format.is_some() {
        return Err(
            Fault::usage("--format is for files; rows have no other format")
                .with_next("leave --format out"),
        );
    }
    if options.voc_base.is_some() || options.encoding.is_some() || options.klarf_scale.is_some() {
        return Err(Fault::usage(
            "a database's labels have neither a base of boxes nor an encoding nor a scale",
        )
        .with_next("leave --voc-base, --encoding and --klarf-scale out"));
    }
    let first = asked.split_whitespace().next().unwrap_or("");
    let source = if QUERIES.iter().any(|word| first.eq_ignore_ascii_case(word)) {
        query(asked, options, dataset, (site, access), scratch, runtime)?
    } else if options.bad_out.is_some() {
        return Err(Fault::usage(
            "a version in the database has no bad records: it is taken as it is",
        )
        .with_next("leave --bad-out out"));
    } else if dataset.is_some() || options.allow_missing || !options.columns.is_empty() {
        return Err(Fault::usage("a version in the database keeps the samples and the dataset that it was delivered with")
            .with_next("leave --for, --allow-missing and --column out, or publish the rows of a query: db:SELECT …"));
    } else {
        runtime.block_on(version(asked, site, scratch))?
    };
    Ok(Box::new(source))
}

async fn version(asked: &str, site: &AtSite, scratch: &Path) -> Result<LabelsSource, Fault> {
    let (set, version) = match asked.split_once(':') {
        Some((set, version)) => (set, version.to_owned()),
        None => match site.labels.active_version(asked).await? {
            Some(version) => (asked, version),
            None => {
                return Err(Fault::not_found(format!("the label database holds no label set {asked:?}"))
                    .with_next("write db:LABEL_SET:VERSION as the view packhorse.annotations names them, or db:SELECT …"));
            }
        },
    };
    let name = ArtifactRef::new(Kind::Labels, set, &version)?;
    let exported = site.labels.export_canonical(set, &version, scratch).await?;
    let info = LabelsInfo {
        dataset: binding(site, &name, &exported.digest).await?,
        samples: exported.samples,
        annotations: exported.annotations,
        classes: exported.classes,
        format: "database".into(),
    };
    LabelsSource::canonical(scratch, info)
}

/// The dataset of a delivered version. The catalogue's row must describe exactly the rows in the
/// database.
async fn binding(
    site: &AtSite,
    name: &ArtifactRef,
    digest: &str,
) -> Result<Option<DatasetBinding>, Fault> {
    let known = site
        .catalogue
        .artifact(name)
        .await
        .ok()
        .filter(|row| row.digest.hex() == digest);
    Ok(match known.map(|row| row.root.info) {
        Some(KindInfo::Labels(info)) => info.dataset,
        _ => None,
    })
}

fn query(
    sql: &str,
    options: &SourceOptions,
    dataset: Option<BoundDataset>,
    (site, access): (&AtSite, &Access),
    scratch: &Path,
    runtime: &tokio::runtime::Handle,
) -> Result<LabelsSource, Fault> {
    let (send, mut rows) = mpsc::channel(LABEL_BATCHES_QUEUED_MAX);
    let (labels, sql) = (site.labels.clone(), sql.to_owned());
    let asked = runtime.spawn(async move { labels.query(&sql, send).await });
    let options = LabelOptions {
        format: None,
        ..super::label_options(options)
    };
    let mut all = false;
    let batches = std::iter::from_fn(|| {
        let batch = rows.blocking_recv();
        all |= batch.is_none();
        batch
    });
    let read = LabelsSource::from_query(
        batches,
        scratch,
        &options,
        dataset,
        &access.own,
        &mut |set, version| runtime.block_on(site.labels.classes(set, version)),
    );
    drop(rows);
    let asked = runtime
        .block_on(asked)
        .map_err(|e| Fault::internal(format!("the query ended early: {e}")))?;
    // If the reader stopped before the end, its error is the cause; if the query failed, the result
    // is only a part.
    if all { asked.and(read) } else { read }
}
