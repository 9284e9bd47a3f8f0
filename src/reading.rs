//! Opening the source that a publish names, by the artifact's kind.

use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use crate::api::types::SourceOptions;
use crate::fault::Fault;
use crate::manifest::{DatasetBinding, EntryBody, FileInfo, Root, Step, Walk};
use crate::names::{Kind, RelPath};
use crate::registry::{self, Credentials, Reference};
use crate::source::Source;
use crate::source::files::FilesSource;
use crate::source::image::{ImageSource, split_tag};
use crate::source::labels::{BoundDataset, LabelOptions, LabelsSource};
use crate::store::Store;

/// Opens a source. Blocks; `scratch` is a folder that the caller removes afterwards.
pub fn open(
    kind: Kind,
    source: &str,
    options: &SourceOptions,
    dataset: Option<BoundDataset>,
    scratch: &Path,
    runtime: &tokio::runtime::Handle,
) -> Result<Box<dyn Source>, Fault> {
    if source.starts_with("registry") && source.contains("://") {
        if kind != Kind::Image {
            return Err(Fault::usage(format!("{source}: a registry holds images, and this is to be a {kind}")));
        }
        let reference: Reference = source.parse()?;
        let credentials = match (&options.username, &options.password_file) {
            (Some(user), Some(file)) => Some(Credentials::from_file(user, PathBuf::from(file))?),
            (None, None) => None,
            _ => return Err(Fault::usage("--username and --password-file go together")),
        };
        let layout = scratch.join("pulled");
        runtime.block_on(registry::pull_to_layout(&reference, credentials, None, &layout))?;
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
