//! Finds and reads the pieces of an image by name: the members of an archive or the files of a
//! directory.
//!
//! [`super::oci`] and [`super::docker`] read JSON and layers only through this module. A piece is a
//! regular file or a range of one; links inside a directory are not followed. Only reads.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::archive::{Place, TarIndex};
use super::decoders::DECODERS;
use super::decompress::{BUFFER, Caps, Compression, SNIFFED_BYTES, why_damaged};
use super::refuse;
use crate::own::{self, Own};
use crate::{Content, FileIdentity};
use base::blocking::Stop;
use base::durable;
use base::fault::{Fault, IoContext as _};
use base::job_progress::cancelled;
use base::limits::{
    DECODER_BYTES_MIN, IMAGE_CHECKS_MAX, IMAGE_JSON_BYTES_MAX, IMAGE_JSON_VALUES_MAX,
    SCRATCH_SPARE_BYTES,
};
use base::names::RelPath;
use base::space::Reservation;
use base::text::check_values;

/// The level of `docker push`, which weighs size against time.
const GZIP_LEVEL: flate2::Compression = flate2::Compression::new(6);

/// The name of a blob: `sha256:` and 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct BlobDigest(String);

impl BlobDigest {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(hex::encode(Sha256::digest(bytes)))
    }

    /// The path of the blob in an image layout.
    pub(super) fn member(&self) -> String {
        format!("blobs/sha256/{}", self.0)
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl FromStr for BlobDigest {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let shown: String = s.chars().take(100).collect();
        let hex = s
            .strip_prefix("sha256:")
            .ok_or_else(|| format!("the digest {shown:?} is not a sha256"))?;
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(format!(
                "the digest {shown:?} is not 64 lower-case hex digits"
            ));
        }
        Ok(Self(hex.into()))
    }
}

impl TryFrom<String> for BlobDigest {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

/// A piece of an image: a member of the archive or a file of the directory.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    /// The name, for messages.
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) content: Content,
    /// The identity of the file before anything was read from it.
    pub(super) identity: Option<FileIdentity>,
    /// The files that are never read; `None`: this program made the piece.
    pub(super) own: Option<Arc<Own>>,
}

impl Piece {
    /// A piece that this program created.
    pub(super) fn created(name: String, bytes: Vec<u8>) -> Self {
        Self {
            name,
            size: bytes.len() as u64,
            content: Content::Memory(bytes.into()),
            identity: None,
            own: None,
        }
    }

    fn opened(&self, path: &Path) -> io::Result<fs::File> {
        let file = durable::open_regular(path)?;
        if let Some(own) = &self.own {
            own.check_opened(&file)?;
        }
        Ok(file)
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        Ok(match &self.content {
            Content::File(path) | Content::Scratch(path) => Box::new(self.opened(path)?),
            Content::Range { file, offset } => {
                let mut file = self.opened(file)?;
                file.seek(SeekFrom::Start(*offset))?;
                Box::new(file.take(self.size))
            }
            Content::Memory(bytes) => Box::new(&bytes[..]),
        })
    }
}

#[derive(Debug)]
enum Container {
    Folder(Arc<Own>),
    Tar(TarIndex, Option<Arc<Own>>),
}

/// All pieces of one archive or directory.
#[derive(Debug)]
pub(super) struct Holder {
    /// The path that the user named, for messages.
    pub(super) shown: PathBuf,
    place: Container,
    /// The top manifest of a directory without `blobs/`, as `skopeo copy … dir:` writes it.
    flat: Option<BlobDigest>,
    /// Ends the reading of layers.
    stop: Stop,
}

impl Holder {
    pub(super) fn folder(path: &Path, own: Arc<Own>) -> Self {
        Self {
            shown: path.to_path_buf(),
            place: Container::Folder(own),
            flat: None,
            stop: Stop::default(),
        }
    }

    /// The tar at `path`, which is `shown` or its decompressed copy. `own`: the files that are never
    /// read; `None` for the copy.
    pub(super) fn tar(
        path: &Path,
        shown: &Path,
        scratch: &Path,
        caps: Caps,
        own: Option<Arc<Own>>,
    ) -> Result<Self, Fault> {
        let index = TarIndex::open(path, shown, scratch, caps, own.as_deref())?;
        Ok(Self {
            shown: shown.to_path_buf(),
            place: Container::Tar(index, own),
            flat: None,
            stop: Stop::default(),
        })
    }

    /// The files that are never read; `None`: it holds copies of this program.
    pub(super) fn own(&self) -> Option<Arc<Own>> {
        match &self.place {
            Container::Folder(own) => Some(own.clone()),
            Container::Tar(_, own) => own.clone(),
        }
    }

    /// A fault that names the archive or directory, and the member.
    pub(super) fn refuse(&self, member: &str, why: impl fmt::Display) -> Fault {
        refuse(&self.shown, member, why)
    }

    /// The fault of a read error, which is caused by the disk and not by the image.
    fn io(&self, member: &str, error: &io::Error) -> Fault {
        Fault::io(
            format_args!("read {member} of {}", self.shown.display()),
            error,
        )
    }

    /// Reading layers ends when `stop` is set.
    pub(super) fn set_stop(&mut self, stop: Stop) {
        self.stop = stop;
    }

    /// Blobs are read from files named by their digest at the top, as in `dir:`; the top manifest is
    /// `manifest.json`.
    pub(super) fn set_flat(&mut self, top: BlobDigest) {
        self.flat = Some(top);
    }

    /// The piece with this name; `None` if there is none.
    pub(super) fn find(&self, name: &str) -> Result<Option<Piece>, Fault> {
        let name = name.trim_start_matches("./");
        let (Some(top), Some(hex)) = (&self.flat, name.strip_prefix("blobs/sha256/")) else {
            return self.find_member(name);
        };
        if top.0 == hex {
            return self.find_member("manifest.json");
        }
        match self.find_member(hex)? {
            Some(piece) => Ok(Some(piece)),
            None => self.find_member(&format!("{hex}.manifest.json")),
        }
    }

    fn find_member(&self, name: &str) -> Result<Option<Piece>, Fault> {
        match &self.place {
            Container::Tar(index, own) => Ok(index.find(name).map(|place| match place {
                Place::Archive(extent) => Piece {
                    name: name.to_owned(),
                    size: extent.size,
                    content: Content::Range {
                        file: Arc::clone(&index.file),
                        offset: extent.offset,
                    },
                    identity: Some(index.identity.clone()),
                    own: own.clone(),
                },
                Place::Scratch(file, size) => Piece {
                    name: name.to_owned(),
                    size,
                    content: Content::Scratch(file.to_owned()),
                    identity: None,
                    own: None,
                },
            })),
            Container::Folder(own) => {
                let rel: RelPath = name.parse().map_err(|why| self.refuse(name, why))?;
                let path = rel.in_dir(&self.shown);
                if let Some(link) = first_linked_folder(&self.shown, &rel) {
                    return Err(self.refuse(
                        name,
                        format!("{} is a link, and links are not followed", link.display()),
                    ));
                }
                match fs::symlink_metadata(&path) {
                    Ok(meta) if meta.is_file() => {
                        own.check(&meta).map_err(|_| own::refusal(&path))?;
                        let identity = Some(FileIdentity::new(Arc::new(path.clone()), &meta));
                        Ok(Some(Piece {
                            name: name.to_owned(),
                            size: meta.len(),
                            content: Content::File(path),
                            identity,
                            own: Some(own.clone()),
                        }))
                    }
                    Ok(_) => Err(self.refuse(name, "it is not a regular file")),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(self.io(name, &e)),
                }
            }
        }
    }

    /// The message if neither `index.json` nor `manifest.json` exists.
    pub(super) fn why_no_image(&self) -> String {
        let folder = match &self.place {
            Container::Tar(index, _) => index.only_folder(),
            Container::Folder(_) => None,
        };
        match folder {
            Some(folder) => format!("it is missing: all members are in the directory {folder:?}; create the archive from inside that directory"),
            None => "it is missing, and manifest.json is missing too: this is neither an OCI layout nor a docker archive".into(),
        }
    }

    /// Reads a small piece completely.
    pub(super) fn read_small(&self, piece: &Piece) -> Result<Vec<u8>, Fault> {
        if piece.size > IMAGE_JSON_BYTES_MAX {
            return Err(self.refuse(
                &piece.name,
                format!(
                    "this JSON has {} bytes, more than the allowed {IMAGE_JSON_BYTES_MAX}",
                    piece.size
                ),
            ));
        }
        let mut bytes = Vec::with_capacity(piece.size as usize);
        let read = piece
            .open()
            .and_then(|r| r.take(IMAGE_JSON_BYTES_MAX + 1).read_to_end(&mut bytes));
        read.map_err(|e| self.io(&piece.name, &e))?;
        if bytes.len() as u64 != piece.size {
            return Err(self.refuse(&piece.name, "its size changed while it was read"));
        }
        Ok(bytes)
    }

    /// Parses a JSON file that has no digest to check.
    pub(super) fn json<T: for<'a> Deserialize<'a>>(&self, piece: &Piece) -> Result<T, Fault> {
        self.parse(&piece.name, &self.read_small(piece)?)
    }

    pub(super) fn parse<T: for<'a> Deserialize<'a>>(
        &self,
        member: &str,
        bytes: &[u8],
    ) -> Result<T, Fault> {
        check_values(bytes, IMAGE_JSON_VALUES_MAX).map_err(|values| {
            self.refuse(
                member,
                format!("this JSON has {values} values; {IMAGE_JSON_VALUES_MAX} are allowed"),
            )
        })?;
        serde_json::from_slice(bytes)
            .map_err(|e| self.refuse(member, format!("it is malformed JSON: {e}")))
    }

    /// Detects the compression of a layer by its first bytes.
    pub(super) fn compression(&self, piece: &Piece) -> Result<Compression, Fault> {
        let mut first = Vec::with_capacity(SNIFFED_BYTES);
        piece
            .open()
            .and_then(|r| r.take(SNIFFED_BYTES as u64).read_to_end(&mut first))
            .map_err(|e| self.io(&piece.name, &e))?;
        Ok(Compression::of_layer(&first))
    }

    /// Compresses a layer into a new file, always in the same way. Returns the digest of the new blob.
    pub(super) fn compress(
        &self,
        layer: &Piece,
        file: &Path,
    ) -> Result<(BlobDigest, Piece), Fault> {
        let read = |e: io::Error| self.io(&layer.name, &e);
        let what = || format!("write {}", file.display());
        // Compressed content is at most a little larger.
        let bytes_max = layer.size.saturating_add(layer.size / 1000 + 1024);
        let space = Reservation::take(
            file.parent().unwrap_or(file),
            bytes_max,
            SCRATCH_SPARE_BYTES,
            1,
            "a compressed layer",
        )
        .map_err(|fault| fault.context(format_args!("compress {}", layer.name)))?;
        let mut input = layer.open().map_err(read)?;
        let output = fs::File::create(file).at(what())?;
        let mut writer = flate2::GzBuilder::new()
            .mtime(0)
            .write(io::BufWriter::with_capacity(BUFFER, output), GZIP_LEVEL);
        let mut buffer = vec![0; BUFFER];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) if !self.stop.is_set() => writer.write_all(&buffer[..n]).at(what())?,
                Ok(_) => return Err(cancelled()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(read(e)),
            }
        }
        writer
            .finish()
            .and_then(|mut buffered| buffered.flush())
            .at(what())?;
        drop(space);
        let made = fs::File::open(file).at(format_args!("open {}", file.display()))?;
        let size = made.metadata().at(what())?.len();
        let mut sha = Sha256::new();
        drain(made, |bytes| sha.update(bytes)).at(format_args!("read {}", file.display()))?;
        let digest = BlobDigest(hex::encode(sha.finalize()));
        let piece = Piece {
            name: digest.member(),
            size,
            content: Content::Scratch(file.to_path_buf()),
            identity: None,
            own: None,
        };
        Ok((digest, piece))
    }

    /// Reads a blob completely and compares it with all stated properties. Returns its digest.
    fn check(&self, check: &Check, caps: Caps) -> Result<BlobDigest, Fault> {
        let refuse = |why: String| self.refuse(&check.piece.name, why);
        let io = |e: io::Error| self.io(&check.piece.name, &e);
        let mut blob = Hashing {
            input: check.piece.open().map_err(io)?,
            sha: Sha256::new(),
            bytes: 0,
            stop: &self.stop,
        };
        let compression = self.compression(&check.piece)?;
        let mut diff = None;
        // Without a decoder too: it limits the layers that are hashed at once.
        let room = match compression {
            Compression::None => Some(DECODERS.take(DECODER_BYTES_MIN, &self.stop).map_err(io)?),
            _ => None,
        };
        if check.diff_id.is_some() && compression != Compression::None {
            let mut raw = Sha256::new();
            let read = compression
                .reader(&mut blob, caps, &self.stop)
                .and_then(|reader| drain(reader, |bytes| raw.update(bytes)));
            match read {
                Ok(()) => diff = Some(hex::encode(raw.finalize())),
                Err(e) if e.raw_os_error().is_some() => return Err(io(e)),
                Err(e) => return Err(refuse(why_damaged(&e))),
            }
        }
        drain(&mut blob, |_| {}).map_err(io)?;
        drop(room);
        let digest = BlobDigest(hex::encode(blob.sha.finalize()));
        if blob.bytes != check.piece.size {
            return Err(refuse(format!(
                "its size changed while it was read: {} bytes instead of {}",
                blob.bytes, check.piece.size
            )));
        }
        if let Some(expected) = check.digest.as_ref().filter(|d| **d != digest) {
            return Err(refuse(format!(
                "wrong digest: expected {expected}, found {digest}"
            )));
        }
        let diff = diff.unwrap_or_else(|| digest.0.clone());
        if let Some(expected) = check.diff_id.as_ref().filter(|d| d.0 != diff) {
            return Err(refuse(format!(
                "wrong content: the image's config states {expected}, but the uncompressed content is sha256:{diff}"
            )));
        }
        Ok(digest)
    }

    /// Runs all checks, several in parallel. Returns the digests in the order of the checks, or the
    /// first fault in that order.
    pub(super) fn check_all(&self, checks: &[Check], caps: Caps) -> Result<Vec<BlobDigest>, Fault> {
        let next = AtomicUsize::new(0);
        let done: Mutex<HashMap<usize, Result<BlobDigest, Fault>>> = Mutex::new(HashMap::new());
        let failed = || {
            done.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .values()
                .any(Result::is_err)
        };
        let work = || {
            while let Some((i, check)) =
                Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, checks.get(i)?)))
            {
                let result = self.check(check, caps);
                done.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(i, result);
                if failed() {
                    break;
                }
            }
        };
        let threads = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(IMAGE_CHECKS_MAX)
            .min(checks.len());
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        // The checks were started in order, so all results before the first fault exist.
        (0..checks.len()).map_while(|i| done.remove(&i)).collect()
    }
}

/// The expected properties of a blob.
#[derive(Debug, Clone)]
pub(super) struct Check {
    pub(super) piece: Piece,
    /// Its digest, if it is stated.
    pub(super) digest: Option<BlobDigest>,
    /// The digest of its uncompressed bytes, if the image's config states it.
    pub(super) diff_id: Option<BlobDigest>,
}

struct Hashing<'a, R> {
    input: R,
    sha: Sha256,
    bytes: u64,
    stop: &'a Stop,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_set() {
            return Err(io::Error::other("the job was cancelled"));
        }
        let n = self.input.read(buffer)?;
        self.sha.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

fn drain(mut reader: impl Read, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => each(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// The first directory on the path to a file below `root` that is a link; its target may be
/// anywhere.
fn first_linked_folder(root: &Path, rel: &RelPath) -> Option<PathBuf> {
    let mut at = root.to_path_buf();
    let mut components: Vec<&str> = rel.components().collect();
    components.pop();
    components.into_iter().find_map(|name| {
        at.push(name);
        fs::symlink_metadata(&at)
            .is_ok_and(|meta| meta.is_symlink())
            .then(|| at.clone())
    })
}

/// The distinct digests, in order.
pub(super) fn distinct<'a>(digests: impl Iterator<Item = &'a BlobDigest>) -> Vec<&'a BlobDigest> {
    let mut seen = HashSet::new();
    digests.filter(|d| seen.insert(*d)).collect()
}
