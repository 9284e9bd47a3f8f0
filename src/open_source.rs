//! Opens the source of a publish, depending on the artifact's kind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::api::types::SourceOptions;
use crate::config::{self, Config};
use crate::reach::Reach;
use base::blocking::{blocking_at, cancellable};
use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::job_progress::JobProgress;
use base::names::{ArtifactRef, Kind, RelPath};
use base::omitted::{Category, Omitted};
use content::ingest::Ingested;
use content::manifest::{
    DatasetBinding, EntryBody, FORMAT_ATTRIBUTES, FORMAT_REFERRERS, FileInfo, Root, Step, Until,
    Walk, same_but_referrers, same_but_times,
};
use content::store::Store;
use exchange::in_place::InPlace;
use registry::{self, Credentials, Origin, Reference, Selection, Settings};
use sink::StorageLocation;
use sink::labels::LabelsSink;
use source::Source;
use source::files::{FilesOptions, FilesSource};
use source::image::{ImageSource, split_tag};
use source::labels::{BoundDataset, LabelsSource};
use source::own::Own;
use state::{Catalogue, new_id};

mod database;
#[cfg(test)]
mod database_tests;
mod kept;
mod options;
#[cfg(test)]
mod registry_tests;

pub use options::{check_bad_out, check_image_name};
use options::{check_files_options, image_options, label_options};

/// The sources of a site other than paths.
#[derive(Clone)]
pub struct AtSite {
    /// Its label database.
    pub labels: Arc<LabelsSink>,
    /// The catalogue, which knows the datasets of the label versions.
    pub catalogue: Catalogue,
    /// Its own registry, read with the site's own credentials.
    pub registry: Option<config::ImagesSink>,
}

impl AtSite {
    /// The site's own registry, if the reference is in it.
    fn own(&self, reference: &Reference) -> Result<Option<&config::ImagesSink>, Fault> {
        let Some(images) = self
            .registry
            .as_ref()
            .filter(|images| images.url.starts_with("http"))
        else {
            return Ok(None);
        };
        let (origin, _) = Origin::split(&images.url)?;
        Ok((origin.authority == reference.origin.authority).then_some(images))
    }
}

/// Whether a source is a registry reference.
fn is_reference(source: &str) -> bool {
    registry::reference::has_scheme(source)
}

/// Advice for a path that does not exist.
const NOT_A_PATH: &str =
    "check the path; an image in a registry is named by registry://HOST/REPOSITORY:TAG";

/// The location of a source's bytes, each at its path in the artifact: a folder, or a repository of
/// the site's own registry. `None`: elsewhere, or in another form.
pub fn base_of(
    kind: Kind,
    source: &str,
    options: &SourceOptions,
    site: Option<&AtSite>,
) -> Result<Option<StorageLocation>, Fault> {
    if kind == Kind::Image && is_reference(source) {
        let Some(site) = site else { return Ok(None) };
        let reference: Reference = source.parse()?;
        return Ok(site.own(&reference)?.map(|_| StorageLocation::Registry {
            repository: reference.repository,
        }));
    }
    let (path, is_image) = match kind {
        Kind::Image => (split_tag(source).0, true),
        _ if kind.is_files() => (on_disk(source, options)?, false),
        _ => return Ok(None),
    };
    let path = std::fs::canonicalize(&path)
        .at(format_args!("open {source}"))
        .map_err(|fault| missing_image(fault, is_image))?;
    let folder = if path.is_dir() {
        Some(path.as_path())
    } else {
        path.parent().filter(|_| !is_image)
    };
    Ok(folder.map(|folder| StorageLocation::Folder {
        path: folder.to_owned(),
    }))
}

/// The fault of an image's path; people also write references without a scheme.
fn missing_image(fault: Fault, is_image: bool) -> Fault {
    if is_image && fault.code == Code::NotFound {
        fault.with_next(NOT_A_PATH)
    } else {
        fault
    }
}

/// A folder for temporary data of a source, and its job, which reports missing room there.
#[derive(Debug)]
pub struct Scratch {
    /// The folder.
    pub folder: PathBuf,
    /// The job.
    pub progress: Arc<JobProgress>,
}

/// Runs `work`, which reads `source` and may block, with an empty folder for temporary data, which
/// is removed afterwards. The daemon removes leftovers of a crash at its start.
pub async fn with_scratch<T: Send + 'static>(
    data_dir: &Path,
    source: &str,
    progress: &Arc<JobProgress>,
    work: impl FnOnce(&Scratch, &Handle) -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let scratch = data_dir.join("scratch").join(new_id("p"));
    let (runtime, progress) = (Handle::current(), progress.clone());
    let work = move || in_scratch(&scratch, &progress, |scratch| work(scratch, &runtime));
    blocking_at(Path::new(source), work).await
}

/// The same on this thread, in a folder of the caller's choice. Fetched blobs are kept beside it
/// for the next attempt.
pub fn in_scratch<T>(
    folder: &Path,
    progress: &Arc<JobProgress>,
    work: impl FnOnce(&Scratch) -> Result<T, Fault>,
) -> Result<T, Fault> {
    durable::remove_all(folder)?;
    durable::create_dir_all(folder)?;
    let result = work(&Scratch {
        folder: folder.to_owned(),
        progress: progress.clone(),
    });
    kept::end(folder, &result);
    let _ = durable::remove_all(folder);
    result
}

/// The dataset of `--for`, which the catalogue must know.
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
        return Err(Fault::usage(format!(
            "--for takes a dataset, and {name} is {}",
            name.kind.with_article()
        )));
    }
    let row = catalogue.artifact(&name).await?;
    Ok(Some((
        DatasetBinding {
            artifact: name,
            digest: row.digest,
        },
        row.root,
    )))
}

/// The access of the reader of a source.
#[derive(Clone)]
pub struct Access {
    /// The sources of a site other than paths.
    pub site: Option<AtSite>,
    /// The newest format of manifests that all receivers read.
    format: u32,
    /// The paths that are never a source.
    own: Arc<Own>,
    /// The bytes that a layer of an image may have after decompression; `None`: the default.
    image_unpacked: Option<u64>,
    /// How a daemon reads registries; `None`: a process of the requesting user, which reads that
    /// user's files.
    registries: Option<BTreeMap<String, config::Registry>>,
}

impl Access {
    /// The access of a daemon. `format`: the newest format of manifests that all receivers read.
    pub fn of_daemon(config: &Config, site: Option<AtSite>, format: u32) -> Self {
        Self {
            site,
            format,
            own: Arc::new(config.own()),
            image_unpacked: Some(config.limits.image_unpacked),
            registries: Some(config.registry.clone()),
        }
    }

    /// The same, for a request of this reach. Blocks.
    #[must_use]
    pub(crate) fn for_reach(self, reach: &Reach, config: &Config) -> Self {
        if *reach == Reach::Machine {
            return self;
        }
        Self {
            own: Arc::new(reach.own(config)),
            ..self
        }
    }

    /// The access of a process with this state folder, which reads what its user may read.
    /// `format`: the newest format of manifests that all receivers read.
    pub fn of_user(state: &Path, format: u32) -> Self {
        Self {
            site: None,
            format,
            own: Arc::new(Own::of_state(state)),
            image_unpacked: None,
            registries: None,
        }
    }

    /// Whether the modification times of files are kept in the manifest.
    fn keeps_times(&self, options: &SourceOptions) -> bool {
        !options.no_times && self.format >= FORMAT_ATTRIBUTES
    }

    /// Whether what refers to an image is carried with it.
    fn carries_referrers(&self, options: &SourceOptions) -> bool {
        !options.no_referrers && self.format >= FORMAT_REFERRERS
    }

    /// The note of a publish whose times or referrers are not kept although nobody asked for that.
    pub fn note(&self, kind: Kind, options: &SourceOptions, omitted: &Omitted) -> Option<String> {
        if kind.is_files() && !options.no_times && !self.keeps_times(options) {
            return Some(TIMES_NOT_KEPT.to_owned());
        }
        (omitted.count(Category::Referrers) > 0
            && !options.no_referrers
            && !self.carries_referrers(options))
        .then(|| REFERRERS_NOT_CARRIED.to_owned())
    }

    /// The same with the sources of a site.
    #[cfg(test)]
    pub(crate) fn with_site(self, site: AtSite) -> Self {
        Self {
            site: Some(site),
            ..self
        }
    }

    /// How a registry is accessed, and the reference with TLS if the settings need it. Reads files.
    fn to_registry(
        &self,
        mut reference: Reference,
        options: &SourceOptions,
    ) -> Result<(Reference, registry::Access), Fault> {
        let access = self.settings_of(&reference, options)?;
        let own = match &self.site {
            Some(site) => site.own(&reference)?,
            None => None,
        };
        let has_own_tls = own.is_some_and(|own| own.url.starts_with("https://"));
        if has_own_tls || access.ca_file.is_some() || access.insecure {
            reference.prefer_tls();
        }
        Ok((reference, access))
    }

    /// The settings of a registry.
    fn settings_of(
        &self,
        reference: &Reference,
        options: &SourceOptions,
    ) -> Result<registry::Access, Fault> {
        let authority = &reference.origin.authority;
        if self.registries.is_some() {
            refuse_access_options(options, authority)?;
        } else {
            return of_options(reference, options);
        }
        let own = self
            .site
            .as_ref()
            .map(|site| site.own(reference))
            .transpose()?
            .flatten();
        let listed = self
            .registries
            .iter()
            .flatten()
            .find(|(host, _)| host.eq_ignore_ascii_case(authority))
            .map(|(_, registry)| registry.clone());
        let (set, of_login) = match (listed, own) {
            (Some(listed), _) => (listed, true),
            (None, Some(own)) => (
                config::Registry {
                    username: own.username.clone(),
                    password_file: own.password_file.clone(),
                    ca_file: own.ca_file.clone(),
                    realm_hosts: own.realm_hosts.clone(),
                    insecure: own.insecure,
                },
                false,
            ),
            (None, None) => (config::Registry::default(), true),
        };
        let set_credentials =
            Credentials::from_config(set.username.as_deref(), set.password_file.as_ref())?;
        let credentials = match set_credentials {
            None if of_login => logged_in(reference)?,
            set => set,
        };
        Ok(registry::Access {
            credentials: credentials.map(|found| found.with_realm_hosts(&set.realm_hosts)),
            ca_file: set.ca_file,
            insecure: set.insecure,
            settings: Settings::Daemon,
        })
    }
}

/// Refuses the options that only a command uses, which reads the image itself. Otherwise a client of
/// the daemon could make it send any file that it can read.
fn refuse_access_options(options: &SourceOptions, host: &str) -> Result<(), Fault> {
    let given = options.username.is_some()
        || options.password_file.is_some()
        || options.ca_file.is_some()
        || options.insecure
        || !options.realm_hosts.is_empty();
    if !given {
        return Ok(());
    }
    Err(Fault::usage("a daemon takes the access to a registry from its configuration only").with_next(format!(
        "write [registry.\"{host}\"] with username, password_file, ca_file, realm_hosts or insecure into the daemon's configuration, restart it, and leave the options out"
    )))
}

/// The access of a command, from its options and the credentials of its user.
fn of_options(reference: &Reference, options: &SourceOptions) -> Result<registry::Access, Fault> {
    let credentials = match (&options.username, &options.password_file) {
        (Some(user), Some(file)) => Some(Credentials::from_file(user, PathBuf::from(file))?),
        (None, None) => logged_in(reference)?,
        _ => {
            return Err(Fault::usage("--username and --password-file go together"));
        }
    };
    Ok(registry::Access {
        credentials: credentials.map(|found| found.with_realm_hosts(&options.realm_hosts)),
        ca_file: options.ca_file.as_ref().map(PathBuf::from),
        insecure: options.insecure,
        settings: Settings::Command,
    })
}

/// The credentials that `docker login` stored.
fn logged_in(reference: &Reference) -> Result<Option<Credentials>, Fault> {
    registry::docker_config_credentials(&registry::docker_config_files(), reference)
}

/// Opens a source. Blocks; `scratch` is the folder of [`with_scratch`].
pub fn open(
    kind: Kind,
    source: &str,
    options: &SourceOptions,
    dataset: Option<BoundDataset>,
    access: &Access,
    scratch: &Scratch,
    runtime: &Handle,
) -> Result<Box<dyn Source>, Fault> {
    check_files_options(kind, options)?;
    let for_images = !options.platforms.is_empty()
        || options.compress
        || options.no_referrers
        || options.repository.is_some()
        || options.tag.is_some();
    if for_images && kind != Kind::Image {
        return Err(Fault::usage(
            "--repository, --tag, --platform, --compress and --no-referrers are for images only",
        ));
    }
    if let Some(asked) = source.strip_prefix(database::SCHEME) {
        return database::open(
            kind,
            asked,
            options,
            dataset,
            access,
            &scratch.folder,
            runtime,
        );
    }
    if is_reference(source) {
        if kind != Kind::Image {
            return Err(Fault::usage(format!(
                "{source}: a registry holds images, and this is to be {}",
                kind.with_article()
            )));
        }
        let reference: Reference = source.parse()?;
        let image = image_options(options, access, scratch.progress.stop())?;
        if image.compress {
            return Err(Fault::usage(format!(
                "{source}: --compress is for archives of docker save"
            ))
            .with_next("leave --compress out: the layers of a registry keep their digests"));
        }
        let (reference, access) = access.to_registry(reference, options)?;
        let (layout, wanted) = (scratch.folder.join("pulled"), &scratch.progress.wanted);
        let kept = kept::open(&scratch.folder, &reference)?;
        let selection = Selection {
            platforms: &image.platforms,
            referrers: image.referrers,
        };
        let referrers = match &kept {
            Some(kept) => {
                let pull = registry::pull_keeping(
                    &reference, access, &selection, &layout, &kept.path, wanted,
                );
                runtime.block_on(scratch.progress.or_cancelled(pull))?
            }
            None => {
                let pull =
                    registry::pull_to_layout(&reference, access, &selection, &layout, wanted);
                runtime.block_on(scratch.progress.or_cancelled(pull))?
            }
        };
        if let Some(kept) = kept {
            // Everything is in the layout, where each blob is removed after it was read: nothing is
            // on the disk twice.
            kept.empty()?;
        }
        return Ok(Box::new(
            ImageSource::open_scratch(&layout, &image)?
                .with_omitted(referrers)
                .named(options.repository.clone(), options.tag.clone()),
        ));
    }
    let absolute = |path: &Path| {
        if path.is_absolute() {
            access.own.check_named(path)
        } else {
            Err(Fault::usage(format!(
                "the source {source:?} is not an absolute path"
            )))
        }
    };
    match kind {
        Kind::Dataset | Kind::Operator | Kind::Model => {
            absolute(Path::new(source))?;
            let files = FilesOptions {
                own: access.own.clone(),
                count_first: options.strict,
                exclude: options.exclude.clone(),
                copy_links: options.copy_links,
                settle: options.settle_seconds.map(Duration::from_secs),
                name_encoding: options.name_encoding.clone(),
                times: access.keeps_times(options),
                xattrs: options.xattrs,
                hard_links: options.hard_links,
                job: Some(scratch.progress.clone()),
            };
            let path = on_disk(source, options)?;
            Ok(Box::new(FilesSource::open_for(&path, &files)?))
        }
        Kind::Image => {
            let (path, tag) = split_tag(source);
            absolute(&path)?;
            let image = image_options(options, access, scratch.progress.stop())?;
            let opened = ImageSource::open_for(&path, &scratch.folder, tag, &image, &access.own)
                .map_err(|fault| missing_image(fault, true))?;
            Ok(Box::new(
                opened.named(options.repository.clone(), options.tag.clone()),
            ))
        }
        Kind::Labels => {
            let path = PathBuf::from(source);
            absolute(&path)?;
            Ok(Box::new(LabelsSource::open_for(
                &path,
                &scratch.folder,
                &label_options(options),
                dataset,
                access.own.clone(),
            )?))
        }
    }
}

/// The path of a source: its names may be in another encoding.
fn on_disk(source: &str, options: &SourceOptions) -> Result<PathBuf, Fault> {
    match &options.name_encoding {
        Some(encoding) => source::files::path_on_disk(source, encoding),
        None => Ok(PathBuf::from(source)),
    }
}

/// The content of a read source.
pub trait Read {
    /// The omissions of the source.
    fn omitted(&self) -> &Omitted;
}

impl Read for Ingested {
    fn omitted(&self) -> &Omitted {
        &self.omitted
    }
}

impl Read for InPlace {
    fn omitted(&self) -> &Omitted {
        &self.ingested.omitted
    }
}

/// Reads an opened source with `work`. With `strict`, a source with an omission that is not
/// accepted is refused: before its content is read if the omission is known by then, otherwise
/// before the artifact becomes visible.
pub fn read<T: Read>(
    source: &mut dyn Source,
    options: &SourceOptions,
    work: impl FnOnce(&mut dyn Source) -> Result<T, Fault>,
) -> Result<T, Fault> {
    if options.strict {
        source.omitted().refuse(&options.accept_omitted)?;
    }
    let read = work(source)?;
    if options.strict {
        read.omitted().refuse(&options.accept_omitted)?;
    }
    Ok(read)
}

/// The root of the artifact of this name, if it has the same content as a new root and only
/// modification times differ: those that were published first stay.
pub async fn as_published(
    catalogue: &Catalogue,
    store: &Store,
    artifact: &ArtifactRef,
    new: &Root,
) -> Result<Option<Root>, Fault> {
    let row = match catalogue.artifact(artifact).await {
        Err(fault) if fault.code == Code::NotFound => return Ok(None),
        row => row?,
    };
    if row.digest == new.digest() || new.format.max(row.root.format) < 2 {
        return Ok(None);
    }
    let (store, new, old) = (store.clone(), new.clone(), row.root);
    cancellable((), move |stop| {
        let is_same = same_but_times(&old, &new, &Until::new(&store, stop))?;
        Ok(is_same.then_some(old))
    })
    .await
}

/// The root of the artifact of this name, if it is the same image as a new root with other
/// signatures or SBOMs.
pub async fn with_other_referrers(
    catalogue: &Catalogue,
    artifact: &ArtifactRef,
    new: &Root,
) -> Result<Option<Root>, Fault> {
    match catalogue.artifact(artifact).await {
        Err(fault) if fault.code == Code::NotFound => Ok(None),
        row => {
            let old = row?.root;
            Ok(same_but_referrers(&old, new).then_some(old))
        }
    }
}

/// The note of such a publish, after which those that were published first stay.
pub const REFERRERS_DIFFER: &str = "the image was published before; its signatures and SBOMs differ, and those of the first publish stay: publish it under another version to deliver the new ones";

/// The note of such a publish.
pub const TIMES_DIFFER: &str = "the content was published before; the modification times differ, and those of the first publish stay";

const REFERRERS_NOT_CARRIED: &str = "signatures and SBOMs are not carried: the hub or one of its sites runs a version that cannot read them";

const TIMES_NOT_KEPT: &str = "the modification times are not kept: the hub or one of its sites runs a version that cannot read them";

/// The dataset of labels; its files are streamed from the manifest in the store.
pub fn bind(binding: DatasetBinding, root: Root, store: Store) -> BoundDataset {
    let (send, files) = sync_channel::<Result<(RelPath, FileInfo), Fault>>(1024);
    // Its own thread turns the walk, which borrows, into an iterator that owns.
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
    BoundDataset {
        binding,
        files: Box::new(files.into_iter()),
    }
}
