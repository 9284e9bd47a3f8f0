//! Checks that a site has the published content: its folders, rows and images are read as their
//! users read them, and compared with the source. No daemon is queried.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection};

use super::daemon::Home;
use base::blocking::blocking;
use base::fault::{Fault, IoContext};

/// One artifact at one site that matches its source.
pub(super) struct CheckedArtifact {
    /// `kind/name`.
    pub(super) series: &'static str,
    /// `kind/name:version`.
    pub(super) artifact: String,
    /// The site.
    pub(super) site: &'static str,
    /// What was compared.
    pub(super) what: String,
    /// Its location.
    pub(super) location: String,
    /// Transmitted bytes.
    pub(super) wire: u64,
}

/// A site's files root.
pub(super) fn nas(site: &Home) -> PathBuf {
    site.dir.join("nas")
}

/// A site's labels database.
pub(super) fn labels_db(site: &Home) -> PathBuf {
    site.dir.join("labels.db")
}

/// A site's images.
pub(super) fn images(site: &Home) -> PathBuf {
    site.dir.join("images")
}

/// The OCI layout of one series of images.
pub(super) fn layout(site: &Home, series: &str) -> PathBuf {
    images(site).join(name_of(series))
}

/// Compares one artifact at a site with its source.
pub(super) async fn artifact(
    site: &Home,
    series: &'static str,
    version: u32,
    source: &Path,
    wire: u64,
) -> Result<CheckedArtifact, Fault> {
    let name = format!("v{version}");
    let artifact = format!("{series}:{name}");
    let outcome = match series.split('/').next() {
        Some("labels") => labels(site, series, &name, source.to_owned()).await,
        Some("image") => {
            let (source, layout) = (source.to_owned(), layout(site, series));
            blocking(move || image(&source, &layout, &name)).await
        }
        _ => {
            let (source, folder) = (source.to_owned(), nas(site).join(series));
            blocking(move || files(&source, &folder, &name)).await
        }
    };
    let (what, location) =
        outcome.map_err(|fault| fault.context(format_args!("{artifact} at {}", site.name)))?;
    Ok(CheckedArtifact {
        series,
        artifact,
        site: site.name,
        what,
        location,
        wire,
    })
}

fn name_of(series: &str) -> &str {
    series.split_once('/').map_or(series, |(_, name)| name)
}

fn differs(what: impl Into<String>) -> Fault {
    Fault::integrity(what).with_next("this is a defect of packhorse: report it with the logs")
}

/// If an earlier run used this folder, a later version may already be the active one.
fn check_active(active: &str, version: &str) -> Result<(), Fault> {
    if active >= version {
        Ok(())
    } else {
        Err(differs(format!("the active version is {active}")))
    }
}

/// Compares a folder on the NAS with its source: names, modes, links and bytes.
fn files(source: &Path, series: &Path, version: &str) -> Result<(String, String), Fault> {
    let folder = series.join(version);
    let (mut there, mut here) = (BTreeMap::new(), BTreeMap::new());
    if source.is_dir() {
        list(source, Path::new(""), &mut there)?;
    } else if let Some(name) = source.file_name() {
        there.insert(PathBuf::from(name), item(source)?);
    }
    list(&folder, Path::new(""), &mut here)?;
    if there != here {
        let odd = there
            .iter()
            .find(|(path, item)| here.get(*path) != Some(item))
            .or_else(|| here.iter().find(|(p, _)| !there.contains_key(*p)));
        return Err(differs(format!(
            "{:?} differs from the source in its presence, type, mode or size",
            odd.map(|(path, _)| path)
        )));
    }
    let base = if source.is_dir() {
        source
    } else {
        source.parent().unwrap_or(source)
    };
    let mut count = 0;
    for (path, _) in there
        .iter()
        .filter(|(_, item)| matches!(item, Item::File { .. }))
    {
        if !same_bytes(&base.join(path), &folder.join(path))? {
            return Err(differs(format!(
                "the content of {path:?} differs from the source"
            )));
        }
        count += 1;
    }
    let current = series.join("CURRENT");
    check_active(
        std::fs::read_to_string(&current)
            .at(current.display())?
            .trim_end(),
        version,
    )?;
    let files = if count == 1 {
        "1 file".to_owned()
    } else {
        format!("{count} files")
    };
    Ok((
        format!("{files}, byte for byte"),
        folder.display().to_string(),
    ))
}

#[derive(PartialEq)]
enum Item {
    Folder,
    Link(PathBuf),
    File { mode: u32, size: u64 },
}

fn item(path: &Path) -> Result<Item, Fault> {
    let meta: Metadata = std::fs::symlink_metadata(path).at(path.display())?;
    Ok(if meta.is_dir() {
        Item::Folder
    } else if meta.is_symlink() {
        Item::Link(std::fs::read_link(path).at(path.display())?)
    } else {
        Item::File {
            mode: meta.permissions().mode() & 0o7777,
            size: meta.len(),
        }
    })
}

fn list(base: &Path, below: &Path, out: &mut BTreeMap<PathBuf, Item>) -> Result<(), Fault> {
    let folder = base.join(below);
    for entry in std::fs::read_dir(&folder).at(folder.display())? {
        let path = below.join(entry.at(folder.display())?.file_name());
        let item = item(&base.join(&path))?;
        if item == Item::Folder {
            list(base, &path, out)?;
        }
        out.insert(path, item);
    }
    Ok(())
}

fn same_bytes(one: &Path, other: &Path) -> Result<bool, Fault> {
    let open = |path: &Path| {
        Ok::<_, Fault>(BufReader::with_capacity(
            1 << 16,
            File::open(path).at(path.display())?,
        ))
    };
    let (mut a, mut b) = (open(one)?, open(other)?);
    loop {
        let (x, y) = (
            a.fill_buf().at(one.display())?,
            b.fill_buf().at(other.display())?,
        );
        let len = x.len().min(y.len());
        if len == 0 {
            return Ok(x.len() == y.len());
        }
        if x[..len] != y[..len] {
            return Ok(false);
        }
        a.consume(len);
        b.consume(len);
    }
}

/// Counts the rows of each class in SQLite, through the views that readers use, and compares the
/// counts with the COCO file.
async fn labels(
    site: &Home,
    series: &str,
    version: &str,
    source: PathBuf,
) -> Result<(String, String), Fault> {
    let expected = blocking(move || coco_classes(&source)).await?;
    let file = labels_db(site);
    let failed =
        |e: sqlx::Error| Fault::internal(format!("read {}: {e}", labels_db(site).display()));
    let mut db: SqliteConnection = SqliteConnectOptions::new()
        .filename(&file)
        .read_only(true)
        .disable_statement_logging()
        .connect()
        .await
        .map_err(failed)?;
    let set = name_of(series);
    let active: Option<String> =
        sqlx::query_scalar("SELECT DISTINCT version FROM current_annotations WHERE label_set = ?")
            .bind(set)
            .fetch_optional(&mut db)
            .await
            .map_err(failed)?;
    let active = active.ok_or_else(|| differs("no version is active"))?;
    check_active(&active, version)?;
    let (view, query) = match active == version {
        true => (
            "current_annotations",
            "SELECT class, count(*) FROM current_annotations WHERE label_set = ? AND version = ? GROUP BY class",
        ),
        false => (
            "annotations",
            "SELECT class, count(*) FROM annotations WHERE label_set = ? AND version = ? GROUP BY class",
        ),
    };
    let rows: Vec<(String, i64)> = sqlx::query_as(query)
        .bind(set)
        .bind(version)
        .fetch_all(&mut db)
        .await
        .map_err(failed)?;
    db.close().await.map_err(failed)?;
    let found: BTreeMap<String, i64> = rows.into_iter().collect();
    if found != expected {
        return Err(differs(format!(
            "the database has these rows by class: {found:?}, the source has {expected:?}"
        )));
    }
    Ok((
        format!(
            "{} rows, {} classes",
            found.values().sum::<i64>(),
            found.len()
        ),
        format!("{} (view {view})", file.display()),
    ))
}

fn read_json(path: &Path) -> Result<Value, Fault> {
    let bytes = std::fs::read(path).at(path.display())?;
    serde_json::from_slice(&bytes)
        .map_err(|e| differs(format!("{} is not JSON: {e}", path.display())))
}

/// Counts the annotations of each class in a COCO file.
fn coco_classes(path: &Path) -> Result<BTreeMap<String, i64>, Fault> {
    let coco = read_json(path)?;
    let list = |key: &str| coco[key].as_array().into_iter().flatten();
    let names: BTreeMap<i64, &str> = list("categories")
        .filter_map(|c| Some((c["id"].as_i64()?, c["name"].as_str()?)))
        .collect();
    let mut counts = BTreeMap::new();
    for annotation in list("annotations") {
        let name = annotation["category_id"]
            .as_i64()
            .and_then(|id| names.get(&id))
            .copied()
            .unwrap_or("?");
        *counts.entry(name.to_owned()).or_default() += 1;
    }
    Ok(counts)
}

/// Compares an image in an OCI layout with its source: both have the same digest under the
/// version's name, and each blob matches its own digest.
fn image(source: &Path, layout: &Path, version: &str) -> Result<(String, String), Fault> {
    let digest = top(source, version)?;
    let found = top(layout, version)?;
    if found != digest {
        return Err(differs(format!(
            "its digest is {found}, the digest of the source is {digest}"
        )));
    }
    let manifest = read_json(&hashed(layout, &digest)?)?;
    let layers = manifest["layers"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    for blob in layers.iter().chain([&manifest["config"]]) {
        hashed(layout, blob["digest"].as_str().unwrap_or_default())?;
    }
    let short: String = digest.chars().take("sha256:".len() + 12).collect();
    Ok((
        format!("{short}…, {} layers", layers.len()),
        format!("oci:{}:{version}", layout.display()),
    ))
}

/// The digest of the entry with this name in a layout's index.
fn top(layout: &Path, version: &str) -> Result<String, Fault> {
    let index = read_json(&layout.join("index.json"))?;
    let named = |m: &&Value| m["annotations"]["org.opencontainers.image.ref.name"] == version;
    let entry = index["manifests"]
        .as_array()
        .into_iter()
        .flatten()
        .find(named);
    let digest = entry.and_then(|m| m["digest"].as_str());
    digest
        .map(str::to_owned)
        .ok_or_else(|| differs(format!("{} has no entry for {version}", layout.display())))
}

/// The path of a blob, after its content was checked against its digest.
fn hashed(layout: &Path, digest: &str) -> Result<PathBuf, Fault> {
    let path = layout.join("blobs").join(digest.replace(':', "/"));
    let mut hasher = Sha256::new();
    std::io::copy(&mut File::open(&path).at(path.display())?, &mut hasher).at(path.display())?;
    if format!("sha256:{}", hex::encode(hasher.finalize())) != digest {
        return Err(differs(format!(
            "the content of the blob {} does not match its digest",
            path.display()
        )));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::io::Write;

    use super::*;

    fn put(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(path)
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    }

    #[test]
    fn each_difference_of_a_folder_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (source, series) = (dir.path().join("source"), dir.path().join("nas/dataset/x"));
        for base in [&source, &series.join("v1")] {
            put(&base.join("a/b.png"), "one");
            std::os::unix::fs::symlink("a/b.png", base.join("link")).unwrap();
        }
        put(&series.join("CURRENT"), "v1\n");
        let check = || {
            files(&source, &series, "v1")
                .map(|(what, _)| what)
                .map_err(|f| f.message)
        };
        assert_eq!(check().as_deref(), Ok("1 file, byte for byte"));
        let landed = series.join("v1/a/b.png");
        put(&landed, "two");
        assert!(check().unwrap_err().contains("the content of"));
        put(&landed, "one");
        std::fs::set_permissions(&landed, Permissions::from_mode(0o600)).unwrap();
        assert!(check().unwrap_err().contains("a/b.png"));
        std::fs::set_permissions(&landed, Permissions::from_mode(0o644)).unwrap();
        put(&series.join("v1/more"), "");
        assert!(check().unwrap_err().contains("more"));
        std::fs::remove_file(series.join("v1/more")).unwrap();
        put(&series.join("CURRENT"), "v0\n");
        assert!(check().unwrap_err().contains("active version is v0"));
    }
}
