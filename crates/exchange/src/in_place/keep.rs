//! Publishing in place: reads a source, and writes only content that is stored nowhere else. For a
//! received image this is the layout.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::InPlaceReader;
use base::durable;
use base::fault::{Fault, IoContext};
use base::names::{Kind, RelPath};
use base::omitted::Omitted;
use content::chunk::Hash;
use content::frame::Verified;
use content::ingest::{self, Ingested, Keeper, Progress};
use content::manifest::{Digest, EntryBody, FileInfo, KindInfo, Root, Step, Walk};
use sink::StorageLocation;
use source::image::layout_files;
use source::{Content, Source, SourceBody, SourceEntry};
use state::new_id;

/// What was published, and its location.
#[derive(Debug)]
pub struct InPlace {
    /// Its manifest.
    pub ingested: Ingested,
    /// Its location. Other content is in the folder of written content.
    pub place: StorageLocation,
}

/// Keeps nothing: the bytes stay where they are.
struct Nothing;

impl Keeper for Nothing {
    fn keep(&self, _: &[(Verified, ingest::ChunkOrigin)]) -> Result<u64, Fault> {
        Ok(0)
    }

    fn file(&self, _: u64, _: &RelPath, _: &FileInfo) -> Result<(), Fault> {
        Ok(())
    }

    fn flush(&self) -> Result<(), Fault> {
        Ok(())
    }
}

/// A source whose entries all have a permanent location: content without one is first written to a
/// folder.
struct Keep<'a> {
    source: &'a mut dyn Source,
    base: Option<&'a StorageLocation>,
    folder: PathBuf,
    kept: u64,
    in_place: u64,
    /// Whether the last file was passed on unchanged.
    gave_the_original: bool,
}

impl Keep<'_> {
    fn is_at_base(&self, path: &RelPath, content: &Content) -> bool {
        match (self.base, content) {
            (Some(StorageLocation::Folder { path: base }), Content::File(file)) => {
                *file == path.in_dir(base)
            }
            // The caller that names a repository has checked that its blobs are there.
            (Some(StorageLocation::Registry { .. }), _) => {
                path.as_str().starts_with("blobs/sha256/")
            }
            _ => false,
        }
    }

    fn write(&mut self, path: &RelPath, size: u64, content: &Content) -> Result<PathBuf, Fault> {
        let to = path.in_dir(&self.folder);
        durable::create_dir_all(to.parent().unwrap_or(&self.folder))?;
        if let Content::Scratch(from) = content {
            // The file belongs to the daemon: it is moved, so it is not on the disk twice.
            durable::sync_file(from)?;
            if durable::rename_noreplace(from, &to).is_ok() {
                return Ok(to);
            }
        }
        let what = || format!("write {}", to.display());
        let mut out = File::create(&to).at(what())?;
        let open =
            |from: &Path| durable::open_regular(from).at(format_args!("read {}", from.display()));
        match content {
            Content::Memory(bytes) => std::io::copy(&mut &bytes[..], &mut out),
            Content::File(from) => {
                let mut from = open(from)?;
                self.source.opened(&from)?;
                std::io::copy(&mut from, &mut out)
            }
            Content::Scratch(from) => std::io::copy(&mut open(from)?, &mut out),
            Content::Range { file, offset } => {
                let mut from = open(file)?;
                self.source.opened(&from)?;
                from.seek(SeekFrom::Start(*offset))
                    .at(format_args!("read {}", file.display()))?;
                std::io::copy(&mut from.take(size), &mut out)
            }
        }
        .at(what())?;
        out.sync_all().at(what())?;
        Ok(to)
    }

    fn sync(&self) -> Result<(), Fault> {
        fn folders(path: &Path) -> Result<(), Fault> {
            for entry in std::fs::read_dir(path).at(path.display())? {
                let entry = entry.at(path.display())?.path();
                if entry.is_dir() {
                    folders(&entry)?;
                }
            }
            durable::sync_dir(path)
        }
        folders(&self.folder)
    }
}

impl Source for Keep<'_> {
    fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
        let Some(mut entry) = self.source.next()? else {
            return Ok(None);
        };
        if let SourceBody::File { size, content } = &entry.body {
            self.gave_the_original = self.is_at_base(&entry.path, content);
            if self.gave_the_original {
                self.in_place += 1;
            } else {
                self.kept += 1;
                if matches!(content, Content::Scratch(_)) {
                    // The file that the identity names is moved.
                    entry.identity = None;
                }
                let (size, content) = (
                    *size,
                    Content::File(self.write(&entry.path, *size, content)?),
                );
                entry.body = SourceBody::File { size, content };
            }
        }
        Ok(Some(entry))
    }

    fn opened(&mut self, file: &File) -> Result<(), Fault> {
        // A stored copy says nothing about the original.
        if self.gave_the_original {
            self.source.opened(file)?;
        }
        Ok(())
    }

    fn info(&self) -> KindInfo {
        self.source.info()
    }

    fn omitted(&self) -> Omitted {
        self.source.omitted()
    }
}

impl InPlaceReader {
    /// Reads a source and records the location of its content: at `base` for unchanged files (a
    /// file of that folder at its path in the artifact, a blob of that repository), else in a
    /// folder of written content. Blocks.
    pub fn publish(
        &self,
        kind: Kind,
        source: &mut dyn Source,
        base: Option<&StorageLocation>,
        progress: &Progress,
    ) -> Result<InPlace, Fault> {
        let folder = self.inner.kept.join(new_id("p"));
        durable::create_dir_all(&folder)?;
        let published = self.publish_keeping(kind, source, base, &folder, progress);
        durable::remove_all(&folder)?;
        published
    }

    fn publish_keeping(
        &self,
        kind: Kind,
        source: &mut dyn Source,
        base: Option<&StorageLocation>,
        folder: &Path,
        progress: &Progress,
    ) -> Result<InPlace, Fault> {
        let mut keep = Keep {
            source,
            base,
            folder: folder.to_owned(),
            kept: 0,
            in_place: 0,
            gave_the_original: false,
        };
        let ingested = ingest::ingest(&mut keep, kind, &self.inner.store, &Nothing, progress)?;
        let kept = self.kept_folder(ingested.digest);
        if keep.kept > 0 {
            keep.sync()?;
            let at = StorageLocation::Folder { path: kept.clone() };
            let places: Vec<StorageLocation> = std::iter::once(at).chain(base.cloned()).collect();
            // Existing content may be in use; it is replaced only when it is damaged.
            let damaged = kept.is_dir()
                && !self
                    .verify(ingested.digest, &ingested.root, &places, |_| Ok(()))?
                    .is_empty();
            let _alone = self.inner.keeping.lock();
            if damaged {
                durable::remove_all(&kept)?;
            }
            if !kept.is_dir() {
                durable::rename_noreplace(folder, &kept)?;
            }
        }
        let place = match base {
            Some(base) if keep.in_place > 0 || keep.kept == 0 => base.clone(),
            _ => StorageLocation::Folder { path: kept },
        };
        self.index(
            ingested.digest,
            &ingested.root,
            std::slice::from_ref(&place),
            false,
        )?;
        Ok(InPlace { ingested, place })
    }

    /// Writes the two files of an image layout that are not blobs. The registry of a receiving site
    /// does not have them, and a folder of layouts has its own. Blocks.
    pub(super) fn keep_layout(&self, digest: Digest, root: &Root) -> Result<(), Fault> {
        let KindInfo::Image(info) = &root.info else {
            return Ok(());
        };
        let files = layout_files(info)?;
        let folder = self.kept_folder(digest);
        let _alone = self.inner.keeping.lock();
        for step in Walk::new(root, &self.inner.store) {
            let Step::Entry { entry, .. } = step? else {
                continue;
            };
            let EntryBody::File(file) = entry.body else {
                continue;
            };
            // Only blobs of the image: other stored content must not be lost.
            let own = files
                .iter()
                .find(|(name, bytes)| *name == entry.path.as_str() && Hash::of(bytes) == file.hash);
            if let Some((name, bytes)) = own {
                durable::create_dir_all(&folder)?;
                durable::replace(&folder.join(name), bytes)?;
            }
        }
        Ok(())
    }
}
