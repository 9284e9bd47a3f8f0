//! Large blobs that several layouts of one directory have: each layout has a name (hard link) for the
//! same file.
//!
//! A blob that another layout has is not staged. The commit gives it a name in its own layout, or
//! copies it where the filesystem has no hard links, and verifies its digest. Removing an image removes
//! the names of its layout only. A crash leaves a name that no version references, which the next
//! removal deletes.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::layout::{OF_LAYOUT, check_blob};
use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::limits::{IMAGE_MANIFEST_BYTES_MAX, LAYOUTS_SEARCHED_MAX};
use registry::image::Sha256;

/// How long the list of layouts is used before it is read again.
const LISTED_FOR: Duration = Duration::from_secs(10);
/// The files that are remembered as unusable.
const UNUSABLE_KEPT: usize = 4096;
/// The deepest layout: each part of its repository is a directory.
const DEPTH_MAX: usize = 8;

/// All layouts of a directory. All calls block.
pub(super) struct SharedBlobs {
    root: PathBuf,
    listed: Mutex<Option<(Instant, Arc<Vec<PathBuf>>)>>,
    /// Files that cannot be shared: damaged ones, or those of another user. Their content is fetched.
    unusable: Mutex<HashSet<PathBuf>>,
}

impl SharedBlobs {
    pub(super) fn new(root: PathBuf) -> Self {
        Self {
            root,
            listed: Mutex::default(),
            unusable: Mutex::default(),
        }
    }

    /// Whether another layout than `own` has a large blob, by its name and size.
    pub(super) fn has(&self, own: &Path, digest: &Sha256, size: u64) -> bool {
        self.named(own, digest, size)
            .any(|blob| !self.unusable.lock().contains(&blob))
    }

    /// Gives a blob of another layout a name in the layout `own`. `false`: none has it intact.
    pub(super) fn take(&self, own: &Path, digest: &Sha256, size: u64) -> Result<bool, Fault> {
        let to = own.join(digest.layout_path());
        let what = || format!("share {} of another layout", to.display());
        for from in self.named(own, digest, size) {
            let shared = link_or_copy(&from, &to).at(what());
            match shared.and_then(|()| check_blob(&to, digest, size)) {
                Ok(None) => {
                    durable::sync_dir(to.parent().unwrap_or(own))?;
                    return Ok(true);
                }
                Err(fault) if fault.code == Code::NoSpace => return Err(fault),
                Ok(Some(why)) => tracing::warn!(%why, "a blob of another layout is damaged"),
                Err(fault) => tracing::warn!(error = %fault, "a blob cannot be shared"),
            }
            durable::remove_all(&to)?;
            let mut unusable = self.unusable.lock();
            if unusable.len() >= UNUSABLE_KEPT {
                unusable.clear();
            }
            unusable.insert(from);
        }
        Ok(false)
    }

    /// The files of other layouts that have the name and the size of a blob. Manifests are small, and
    /// not shared.
    fn named(
        &self,
        own: &Path,
        digest: &Sha256,
        size: u64,
    ) -> impl Iterator<Item = PathBuf> + use<> {
        let layouts = match size > IMAGE_MANIFEST_BYTES_MAX as u64 {
            true => self.layouts(),
            false => Arc::default(),
        };
        let (own, path) = (own.to_owned(), digest.layout_path());
        (0..layouts.len())
            .map(move |number| layouts[number].clone())
            .filter(move |layout| *layout != own)
            .map(move |layout| layout.join(&path))
            .filter(move |blob| {
                fs::symlink_metadata(blob).is_ok_and(|meta| meta.is_file() && meta.len() == size)
            })
    }

    /// An image was stored in this layout: a new one is found by the next search.
    pub(super) fn added(&self, layout: &Path) {
        let mut listed = self.listed.lock();
        let is_new = |(_, layouts): &(Instant, Arc<Vec<PathBuf>>)| {
            !layouts.iter().any(|known| known == layout)
        };
        if listed.as_ref().is_some_and(is_new) {
            *listed = None;
        }
    }

    fn layouts(&self) -> Arc<Vec<PathBuf>> {
        if let Some((at, layouts)) = &*self.listed.lock()
            && at.elapsed() < LISTED_FOR
        {
            return layouts.clone();
        }
        let layouts = Arc::new(layouts_below(&self.root));
        *self.listed.lock() = Some((Instant::now(), layouts.clone()));
        layouts
    }
}

fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    let mut source = durable::open_regular(from)?;
    let mut copy = fs::File::create_new(to)?;
    io::copy(&mut source, &mut copy)?;
    copy.sync_all()
}

/// The layouts below a directory. What cannot be read has none.
fn layouts_below(root: &Path) -> Vec<PathBuf> {
    let (mut layouts, mut folders, mut seen) = (Vec::new(), vec![(root.to_owned(), 0)], 0);
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            seen += 1;
            if seen > LAYOUTS_SEARCHED_MAX {
                return layouts;
            }
            let (name, path) = (entry.file_name(), entry.path());
            let is_part = name.to_str().is_some_and(|name| {
                depth < DEPTH_MAX && !name.starts_with('.') && !OF_LAYOUT.contains(&name)
            });
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder && name == "blobs" {
                layouts.push(folder.clone());
            } else if is_folder && is_part {
                folders.push((path, depth + 1));
            }
        }
    }
    layouts
}
