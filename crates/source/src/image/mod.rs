//! An operator image as a source: `docker save` archives, and OCI layouts as a directory or an
//! archive, compressed or not.
//!
//! Every input becomes one OCI image layout directory, so that the hub and every site have the same
//! bytes and the same digest:
//! ```text
//! blobs/sha256/<hex>   configs, layers, manifests and indexes, unchanged
//! index.json           the descriptor of the image's manifest or index, without a name, so that the same image is the same
//!                      artifact; then those of its referrers, with their tags
//! oci-layout           {"imageLayoutVersion":"1.0.0"}
//! ```
//! `ingest` drives it. All checks are done in `open`, before the first entry: first the structure,
//! then every layer is read and hashed, compressed and uncompressed. Each entry carries the
//! identity of its file from before the checks, so that exactly the checked content is used.
//! Nothing is unpacked. A compressed archive is decompressed completely into the scratch directory;
//! a crash leaves only that file, and the next start removes it.
//!
//! `oci` reads layouts, `docker` reads `manifest.json`, `directory` the form `dir:`, `holder` finds and reads pieces, `archive`
//! reads tar headers, `sparse` sparse members, `decompress` enforces the limit against decompression bombs, `listing`
//! selects among several images, `referrers` finds what refers to an image, `carry` adds it.
//!
//! Parts of the image in the source that the layout does not contain are counted
//! ([`Source::omitted`]): absent platforms, the digest that changes because of that, referrers that
//! are not carried, and additional names. Blobs that nothing in the source references belong to no image and do not
//! count; other images do not count if a tag selects one.

mod all;
mod archive;
mod carry;
mod decoders;
mod decompress;
mod directory;
mod docker;
mod holder;
mod listing;
mod oci;
mod referrers;
mod sparse;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

pub use self::all::{ContainedImage, images};
use self::decompress::{Caps, Compression, SNIFFED_BYTES};
use self::holder::{Holder, Piece};
pub use self::listing::split_tag;
use self::oci::{Chosen, Descriptor, Image, ImageError};
use self::referrers::Referrers;
use super::{Content, FileIdentity, Source, SourceBody, SourceEntry};
use crate::own::{self, Own};
use base::blocking::Stop;
use base::fault::{Fault, IoContext};
use base::job_progress::cancelled;
use base::omitted::{Category, Omitted};
use base::platform::Platform;
use content::manifest::{Attributes, ImageInfo, KindInfo};

const FOLDER_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;
/// The name of a decompressed archive in the scratch directory.
const DECOMPRESSED: &str = "image.tar";

/// The fault of a damaged or inconsistent image: the file, its member, and the reason.
fn refuse(shown: &Path, member: &str, why: impl fmt::Display) -> Fault {
    let member: String = member
        .chars()
        .take(300)
        .map(|c| {
            if base::text::is_unsafe(c) {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect();
    Fault::integrity(format!("image {}: {member}: {why}", shown.display()))
        .with_next("create the image archive again, then publish it")
}

/// How an image is selected and read.
#[derive(Debug, Clone, Default)]
pub struct ImageOptions {
    /// The platforms that are kept; all if empty.
    pub platforms: Vec<Platform>,
    /// Whether the uncompressed layers of a `docker save` archive are compressed.
    pub compress: bool,
    /// The bytes that a layer or an archive may have after decompression, whatever the ratio.
    pub unpacked_bytes_max: Option<u64>,
    /// Ends the reading: set when the job is cancelled.
    pub stop: Stop,
    /// Whether what refers to the image (signatures, attestations, SBOMs) is carried with it.
    pub referrers: bool,
}

/// How the parts of an image are read.
#[derive(Clone, Copy)]
struct Reading<'a> {
    caps: Caps,
    platforms: &'a [Platform],
    layers: docker::Layers<'a>,
    stop: &'a Stop,
    referrers: bool,
}

impl<'a> Reading<'a> {
    fn new(options: &'a ImageOptions, scratch: &'a Path) -> Self {
        let mut caps = Caps::default();
        caps.bytes = options.unpacked_bytes_max.unwrap_or(caps.bytes);
        Self {
            caps,
            platforms: &options.platforms,
            stop: &options.stop,
            referrers: options.referrers,
            layers: if options.compress {
                docker::Layers::Compressed(scratch)
            } else {
                docker::Layers::AsTheyAre
            },
        }
    }
}

impl Reading<'_> {
    /// A fault after the cancellation is a consequence of it.
    fn or_cancelled<T>(self, read: Result<T, Fault>) -> Result<T, Fault> {
        read.map_err(|fault| {
            if self.stop.is_set() {
                cancelled()
            } else {
                fault
            }
        })
    }
}

/// Reads an image of any supported form as an OCI layout.
#[derive(Debug)]
pub struct ImageSource {
    entries: std::vec::IntoIter<SourceEntry>,
    info: ImageInfo,
    omitted: Omitted,
    /// The files that are never read; `None`: it reads copies of this program only.
    own: Option<Arc<Own>>,
}

impl ImageSource {
    /// Opens the only image of an archive or layout directory. `scratch` is the directory for the
    /// decompressed copy of a compressed archive.
    pub fn open(path: &Path, scratch: &Path) -> Result<Self, Fault> {
        Self::open_tag(path, scratch, None)
    }

    /// Opens the image `tag` of an archive or layout directory. `tag` is a complete name, its part
    /// after the colon, or the digest of its manifest. Without a tag there must be exactly one
    /// image; if there are several, the fault is `usage` and lists the tags.
    pub fn open_tag(path: &Path, scratch: &Path, tag: Option<&str>) -> Result<Self, Fault> {
        Self::open_for(
            path,
            scratch,
            tag,
            &ImageOptions::default(),
            &Arc::default(),
        )
    }

    /// Like [`ImageSource::open_tag`], for a daemon, which never publishes its own state.
    pub fn open_for(
        path: &Path,
        scratch: &Path,
        tag: Option<&str>,
        options: &ImageOptions,
        own: &Arc<Own>,
    ) -> Result<Self, Fault> {
        let reading = Reading::new(options, scratch);
        reading.or_cancelled(open(path, scratch, tag, reading, own))
    }

    /// Opens the only image of a layout directory, for example one that was pulled from a registry.
    pub fn open_layout(folder: &Path, options: &ImageOptions) -> Result<Self, Fault> {
        let reading = Reading::new(options, folder);
        let holder = Holder::folder(folder, Arc::default());
        reading.or_cancelled(from_holder(holder, None, reading))
    }

    /// Opens a layout in the scratch directory whose first entry is the image: each blob is removed
    /// after it was read.
    pub fn open_scratch(folder: &Path, options: &ImageOptions) -> Result<Self, Fault> {
        let holder = Holder::folder(folder, Arc::default());
        // By its digest: the image may itself be a signature or an SBOM.
        let first = oci::top_descriptors(&holder)?.unwrap_or_default();
        let first = first.first().map(|top| top.digest.to_string());
        let reading = Reading::new(options, folder);
        let Self {
            entries,
            info,
            omitted,
            ..
        } = reading.or_cancelled(from_holder(holder, first.as_deref(), reading))?;
        let owned = entries.map(|mut entry| {
            if let SourceBody::File {
                content: Content::File(path),
                size,
            } = entry.body
            {
                entry.body = SourceBody::File {
                    content: Content::Scratch(path),
                    size,
                };
            }
            entry
        });
        Ok(Self {
            entries: owned.collect::<Vec<_>>().into_iter(),
            info,
            omitted,
            own: None,
        })
    }

    /// Sets the name at the destination; `None`: that of the artifact.
    pub fn named(mut self, repository: Option<String>, tag: Option<String>) -> Self {
        (self.info.repository, self.info.tag) = (repository, tag);
        self
    }

    /// Adds what the program that fetched the image left out.
    pub fn with_omitted(mut self, more: Omitted) -> Self {
        self.omitted.merge(more);
        self
    }

    /// The metadata of the artifact, which [`Source::info`] also returns.
    pub fn image_info(&self) -> &ImageInfo {
        &self.info
    }
}

impl Source for ImageSource {
    fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
        Ok(self.entries.next())
    }

    fn opened(&mut self, file: &fs::File) -> Result<(), Fault> {
        self.own
            .as_ref()
            .map_or(Ok(()), |own| own.allow_opened(file))
    }

    fn total(&self) -> Option<u64> {
        Some(self.entries.as_slice().iter().map(SourceEntry::bytes).sum())
    }

    fn info(&self) -> KindInfo {
        KindInfo::Image(self.info.clone())
    }

    fn omitted(&self) -> Omitted {
        self.omitted.clone()
    }
}

fn open(
    path: &Path,
    scratch: &Path,
    tag: Option<&str>,
    reading: Reading<'_>,
    own: &Arc<Own>,
) -> Result<ImageSource, Fault> {
    from_holder(holder_of(path, scratch, reading, own)?, tag, reading)
}

/// The pieces of the archive or layout directory at `path`.
fn holder_of(
    path: &Path,
    scratch: &Path,
    reading: Reading<'_>,
    own: &Arc<Own>,
) -> Result<Holder, Fault> {
    let path = &fs::canonicalize(path).at(format_args!("open image {}", path.display()))?;
    own.check_path(path)?;
    let meta = fs::metadata(path).at(format_args!("open image {}", path.display()))?;
    if meta.is_dir() {
        return Ok(Holder::folder(path, own.clone()));
    }
    if !meta.is_file() {
        return Err(refuse(
            path,
            "the archive",
            "it is neither a file nor a directory",
        ));
    }
    let mut first = Vec::with_capacity(SNIFFED_BYTES);
    own.open(path)
        .map_err(|error| own::fault(path, &error))?
        .take(SNIFFED_BYTES as u64)
        .read_to_end(&mut first)
        .at(format_args!("read image {}", path.display()))?;
    match Compression::of(&first) {
        Compression::None if first.is_empty() => Err(refuse(path, "the archive", "it is empty")),
        Compression::None => Holder::tar(path, path, scratch, reading.caps, Some(own.clone())),
        Compression::Foreign(name) => Err(refuse(
            path,
            "the archive",
            format!("it is compressed with {name}, which is not supported"),
        )
        .with_next("decompress it, or use gzip, zstd, xz or bzip2")),
        known => {
            let copy = scratch.join(DECOMPRESSED);
            decompress::to_scratch(path, known, &copy, reading.caps, own, reading.stop)?;
            Holder::tar(&copy, path, scratch, reading.caps, None)
        }
    }
}

/// The image of a directory without `blobs/`, whose blobs the holder then finds.
fn top_of_directory(holder: &mut Holder) -> Result<Option<Descriptor>, Fault> {
    Ok(directory::top(holder)?.map(|(digest, top)| {
        holder.set_flat(digest);
        top
    }))
}

fn from_holder(
    mut holder: Holder,
    tag: Option<&str>,
    reading: Reading<'_>,
) -> Result<ImageSource, Fault> {
    let Reading {
        caps, platforms, ..
    } = reading;
    let directory = top_of_directory(&mut holder)?;
    let is_directory = directory.is_some();
    let tops = match directory {
        Some(top) => Some(vec![top]),
        None => oci::top_descriptors(&holder)?,
    };
    holder.set_stop(reading.stop.clone());
    let holder = &holder;
    let saved = if is_directory {
        None
    } else {
        docker::saved(holder, tag, tops.as_deref())?
    };
    if saved.is_none() && matches!(reading.layers, docker::Layers::Compressed(_)) {
        return Err(Fault::usage(format!(
            "image {}: --compress is for archives of docker save, whose layers have no digest in a registry",
            holder.shown.display()
        ))
        .with_next("leave --compress out: the layers of an OCI layout keep their digests"));
    }
    let referrers = tops
        .as_ref()
        .map(|tops| Referrers::find(holder, tops))
        .unwrap_or_default();
    let carried = reading.referrers.then_some(holder);
    let image = match (tops, saved) {
        (None, None) => return Err(holder.refuse("index.json", holder.why_no_image())),
        (Some(tops), None) => {
            let chosen = oci::choose(holder, &tops, tag, &referrers)?;
            let mut image = oci::image(holder, &chosen, platforms).map_err(ImageError::fault)?;
            if let (Some(entry), None) = (chosen.entry(), tag) {
                let of_image = tops.iter().filter(|top| top.digest == entry.digest);
                note_names(
                    of_image.filter_map(|top| top.names().next()),
                    &mut image.omitted,
                );
            }
            referrers.settle(carried, &mut image, chosen.entry(), tag)?;
            image
        }
        (None, Some(saved)) => from_saved(holder, saved, tag, reading)?,
        // Its OCI parts have the layers as they are.
        (Some(_), Some(saved)) if matches!(reading.layers, docker::Layers::Compressed(_)) => {
            from_saved(holder, saved, tag, reading)?
        }
        (Some(tops), Some(saved)) => match oci_from_saved(holder, &tops, &saved, platforms)? {
            Some((entry, mut image)) => {
                if tag.is_none() {
                    note_names(saved.tags.iter().map(String::as_str), &mut image.omitted);
                }
                referrers.settle(carried, &mut image, Some(&entry), tag)?;
                image
            }
            None => {
                let mut image = from_saved(holder, saved, tag, reading)?;
                let stated: Vec<&Descriptor> =
                    tops.iter().filter(|top| !referrers.has(top)).collect();
                if let [stated] = stated.as_slice() {
                    image.omitted.add(
                        Category::ImageDigest,
                        format!("{}, published as {}", stated.digest, image.top.digest),
                    );
                }
                referrers.settle(carried, &mut image, None, tag)?;
                image
            }
        },
    };
    // Every layer is read and checked.
    holder.check_all(&image.checks, caps)?;
    into_source(image, holder.own())
}

/// The image of `manifest.json`, built from its config and layers.
fn from_saved(
    holder: &Holder,
    saved: docker::Saved,
    tag: Option<&str>,
    reading: Reading<'_>,
) -> Result<Image, Fault> {
    let names = saved.tags.clone();
    if !saved.is_selected(reading.platforms) {
        let own = saved.platform();
        return Err(oci::other_platforms(
            holder,
            reading.platforms,
            own.as_deref().into_iter(),
        ));
    }
    let mut image = saved.image(holder, reading.caps, reading.layers)?;
    if tag.is_none() {
        note_names(names.iter().map(String::as_str), &mut image.omitted);
    }
    Ok(image)
}

/// Counts the names of an image except the first. The artifact has its own name; a user who selects
/// a tag selects one of the names.
fn note_names<'a>(names: impl Iterator<Item = &'a str>, omitted: &mut Omitted) {
    let names: BTreeSet<&str> = names.collect();
    for name in names.into_iter().skip(1) {
        omitted.add(Category::ImageNames, name);
    }
}

/// The OCI image in `index.json` that corresponds to the selected image of `manifest.json`: the one
/// with the same config. Returns `None` if there is none or it contradicts that config, as Docker
/// 25.0 wrote them; then `manifest.json` is used.
fn oci_from_saved(
    holder: &Holder,
    tops: &[Descriptor],
    saved: &docker::Saved,
    platforms: &[Platform],
) -> Result<Option<(Descriptor, Image)>, Fault> {
    // By name first, because two names may refer to two builds with one config.
    let named = |d: &&Descriptor| {
        d.names()
            .any(|n| saved.tags.iter().any(|t| listing::same_image(n, t)))
    };
    let candidates = tops
        .iter()
        .filter(named)
        .chain(tops.iter().filter(|d| !named(d)));
    let mut why = None;
    for top in candidates {
        match oci::image(holder, &Chosen::One(top.clone()), platforms) {
            // The platforms may leave out that of the config.
            Ok(image) if !platforms.is_empty() && (tops.len() == 1 || named(&top)) => {
                return Ok(Some((top.clone(), image)));
            }
            Ok(image) if image.blobs.contains_key(&saved.config_digest) => {
                return Ok(Some((top.clone(), image)));
            }
            Ok(_) => {}
            Err(ImageError::Disagrees(fault)) => why = Some(fault.message),
            Err(ImageError::Refused(fault) | ImageError::Absent(fault)) => return Err(fault),
        }
    }
    tracing::warn!(
        archive = %holder.shown.display(),
        why = why.as_deref().unwrap_or("no image in index.json has the config that manifest.json names"),
        "the OCI parts of a docker archive are ignored",
    );
    Ok(None)
}

/// The two files of the normalised layout that are not blobs. They are derived from the metadata of
/// the artifact.
pub fn layout_files(info: &ImageInfo) -> Result<[(&'static str, Bytes); 2], Fault> {
    let descriptor = |media_type: &str, digest: &str, size: u64| serde_json::json!({ "mediaType": media_type, "digest": digest, "size": size });
    let mut entries = vec![descriptor(&info.media_type, &info.digest, info.size)];
    entries.extend(info.referrers.iter().map(|referrer| {
        let mut entry = descriptor(&referrer.media_type, &referrer.digest, referrer.size);
        if let Some(tag) = &referrer.tag {
            entry["annotations"] = serde_json::json!({ oci::REF_NAME: tag });
        }
        entry
    }));
    let index = oci::to_bytes(
        &serde_json::json!({ "schemaVersion": 2, "mediaType": oci::OCI_INDEX, "manifests": entries }),
    )?;
    Ok([
        ("index.json", index.into()),
        (
            "oci-layout",
            Bytes::from_static(br#"{"imageLayoutVersion":"1.0.0"}"#),
        ),
    ])
}

/// The entries of the normalised layout, in manifest order.
fn into_source(image: Image, own: Option<Arc<Own>>) -> Result<ImageSource, Fault> {
    let info = ImageInfo {
        media_type: image.top.media_type,
        digest: image.top.digest.to_string(),
        size: image.top.size,
        platforms: image.platforms,
        absent: image.absent,
        repository: None,
        tag: None,
        referrers: image.referrers,
    };
    let folder = |path: &str| {
        Ok(SourceEntry {
            path: path.parse()?,
            mode: FOLDER_MODE,
            body: SourceBody::Dir,
            identity: None,
            attributes: Attributes::default(),
        })
    };
    let file = |path: &str, size: u64, content: Content, identity: Option<FileIdentity>| {
        Ok(SourceEntry {
            path: path.parse()?,
            mode: FILE_MODE,
            body: SourceBody::File { size, content },
            identity,
            attributes: Attributes::default(),
        })
    };
    let mut entries: Vec<Result<SourceEntry, Fault>> =
        vec![folder("blobs"), folder("blobs/sha256")];
    let blobs = image.blobs.into_iter();
    entries.extend(blobs.map(
        |(
            digest,
            Piece {
                size,
                content,
                identity,
                ..
            },
        )| file(&digest.member(), size, content, identity),
    ));
    entries.extend(
        layout_files(&info)?
            .map(|(name, bytes)| file(name, bytes.len() as u64, Content::Memory(bytes), None)),
    );
    Ok(ImageSource {
        entries: entries
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?
            .into_iter(),
        info,
        omitted: image.omitted,
        own,
    })
}
