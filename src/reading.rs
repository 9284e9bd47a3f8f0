//! Opening the source that a publish names, by the artifact's kind.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use tokio::runtime::Handle;

use crate::api::types::SourceOptions;
use crate::catalogue::{Catalogue, new_id};
use crate::config;
use crate::durable;
use crate::fault::{Fault, IoContext};
use crate::fetch::blocking;
use crate::manifest::{DatasetBinding, EntryBody, FileInfo, Root, Step, Walk};
use crate::names::{ArtifactRef, Kind, RelPath};
use crate::registry::{self, Credentials, Origin, Reference};
use crate::sink::Place;
use crate::sink::labels::LabelsSink;
use crate::source::Source;
use crate::source::files::FilesSource;
use crate::source::image::{ImageSource, split_tag};
use crate::source::labels::{BoundDataset, LabelOptions, LabelsSource};
use crate::store::Store;

mod database;

/// What a site has beside paths.
#[derive(Clone)]
pub struct AtSite {
    /// Its label database.
    pub labels: Arc<LabelsSink>,
    /// What it knows of the versions in there: which dataset they belong to.
    pub catalogue: Catalogue,
    /// Its own registry, which is read with the site's own credentials.
    pub registry: Option<config::ImagesSink>,
}

impl AtSite {
    /// The site's own registry, when the reference is in it.
    fn own(&self, reference: &Reference) -> Result<Option<&config::ImagesSink>, Fault> {
        let Some(images) = self.registry.as_ref().filter(|images| images.url.starts_with("http")) else { return Ok(None) };
        let (origin, _) = Origin::split(&images.url)?;
        Ok((origin.authority == reference.origin.authority).then_some(images))
    }
}

/// Whether a source is a reference to a registry.
fn is_reference(source: &str) -> bool {
    source.starts_with("registry") && source.contains("://")
}

/// Where a source's bytes simply lie, each at its path in the artifact: a folder, or a repository of the site's own registry.
/// `None`: somewhere else, or in another form.
pub fn base_of(kind: Kind, source: &str, site: Option<&AtSite>) -> Result<Option<Place>, Fault> {
    if kind == Kind::Image && is_reference(source) {
        let Some(site) = site else { return Ok(None) };
        let reference: Reference = source.parse()?;
        return Ok(site.own(&reference)?.map(|_| Place::Registry { repository: reference.repository }));
    }
    let (path, is_image) = match kind {
        Kind::Image => (split_tag(source).0, true),
        _ if kind.is_files() => (PathBuf::from(source), false),
        _ => return Ok(None),
    };
    let path = std::fs::canonicalize(&path).at(format_args!("open {source}"))?;
    let folder = if path.is_dir() { Some(path.as_path()) } else { path.parent().filter(|_| !is_image) };
    Ok(folder.map(|folder| Place::Folder { path: folder.to_owned() }))
}

/// Does `work`, which may block, with an empty folder for what it has to spill, which is gone afterwards. What a crash leaves of
/// it the daemon removes when it starts.
pub async fn with_scratch<T: Send + 'static>(
    data_dir: &Path,
    work: impl FnOnce(&Path, &Handle) -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let scratch = data_dir.join("scratch").join(new_id("p"));
    durable::create_dir_all(&scratch)?;
    let (folder, runtime) = (scratch.clone(), Handle::current());
    let result = blocking(move || work(&folder, &runtime)).await;
    let _ = blocking(move || durable::remove_all(&scratch)).await;
    result
}

/// The dataset that `--for` names for labels, which the catalogue must know.
pub async fn dataset_of(
    catalogue: &Catalogue,
    artifact: &ArtifactRef,
    name: Option<&str>,
) -> Result<Option<(DatasetBinding, Root)>, Fault> {
    let Some(name) = name else { return Ok(None) };
    if artifact.kind != Kind::Labels {
        return Err(Fault::usage("--for is for labels only"));
    }
    let name: ArtifactRef = name.parse()?;
    if name.kind != Kind::Dataset {
        return Err(Fault::usage(format!("--for takes a dataset, and {name} is a {}", name.kind)));
    }
    let row = catalogue.artifact(&name).await?;
    Ok(Some((DatasetBinding { artifact: name, digest: row.digest }, row.root)))
}

/// Opens a source. Blocks; `scratch` is the folder of [`with_scratch`]. `site` is there at a site only.
pub fn open(
    kind: Kind,
    source: &str,
    options: &SourceOptions,
    dataset: Option<BoundDataset>,
    site: Option<&AtSite>,
    scratch: &Path,
    runtime: &Handle,
) -> Result<Box<dyn Source>, Fault> {
    if let Some(asked) = source.strip_prefix(database::SCHEME) {
        return database::open(kind, asked, options, dataset, site, scratch, runtime);
    }
    if is_reference(source) {
        if kind != Kind::Image {
            return Err(Fault::usage(format!("{source}: a registry holds images, and this is to be a {kind}")));
        }
        let reference: Reference = source.parse()?;
        let own = site.map(|site| site.own(&reference)).transpose()?.flatten();
        let credentials = match (&options.username, &options.password_file) {
            (Some(user), Some(file)) => Some(Credentials::from_file(user, PathBuf::from(file))?),
            (None, None) => match own {
                Some(own) => Credentials::from_config(own.username.as_deref(), own.password_file.as_ref())?,
                None => None,
            },
            _ => return Err(Fault::usage("--username and --password-file go together")),
        };
        let layout = scratch.join("pulled");
        runtime.block_on(registry::pull_to_layout(&reference, credentials, own.and_then(|own| own.ca_file.as_deref()), &layout))?;
        return Ok(Box::new(ImageSource::open_layout(&layout)?));
    }
    let absolute = |path: &Path| {
        if path.is_absolute() { Ok(()) } else { Err(Fault::usage(format!("the source {source:?} is not an absolute path"))) }
    };
    match kind {
        Kind::Dataset | Kind::Operator | Kind::Model => {
            absolute(Path::new(source))?;
            Ok(Box::new(FilesSource::open(Path::new(source))?))
        }
        Kind::Image => {
            let (path, tag) = split_tag(source);
            absolute(&path)?;
            Ok(Box::new(ImageSource::open_tag(&path, scratch, tag)?))
        }
        Kind::Labels => {
            let path = PathBuf::from(source);
            absolute(&path)?;
            let options =
                LabelOptions { format: options.format.clone(), allow_missing: options.allow_missing, columns: options.columns.clone() };
            Ok(Box::new(LabelsSource::open(&path, scratch, &options, dataset)?))
        }
    }
}

/// The dataset that labels are bound to, its files streamed from the manifest in the store.
pub fn bind(binding: DatasetBinding, root: Root, store: Store) -> BoundDataset {
    let (send, files) = sync_channel::<Result<(RelPath, FileInfo), Fault>>(1024);
    // A thread of its own turns the walk, which borrows, into an iterator that owns.
    std::thread::spawn(move || {
        for step in Walk::new(&root, &store) {
            let file = match step {
                Ok(Step::Entry { entry, .. }) => match entry.body {
                    EntryBody::File(file) => Ok((entry.path, file)),
                    EntryBody::Dir | EntryBody::Symlink(_) => continue,
                },
                Ok(Step::Chunk(..)) => continue,
                Err(fault) => Err(fault),
            };
            if send.send(file).is_err() {
                return;
            }
        }
    });
    BoundDataset { binding, files: Box::new(files.into_iter()) }
}
