//! `publish --list` and `publish --all`: publishes every image of a list or of an archive, each under
//! the name and the tag of its repository.

use std::collections::HashMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::args::{Global, Publish};
use super::client::Client;
use super::commands::{note_omitted, publish_one, published_text, source_options, wait_for};
use super::follow::Deadline;
use super::human;
use super::output::{self, rows};
use crate::api::types::{PublishRequest, Published};
use base::blocking::blocking;
use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::limits::CONFIG_BYTES_MAX;
use base::names::ArtifactRef;
use registry::Reference;
use registry::reference::Pick;
use source::image::{self, ContainedImage};
use source::image_list::{self, ListedImage};

/// Digits of a digest in a version.
const DIGEST_DIGITS: usize = 16;

/// One image, ready to be published.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    source: String,
    artifact: String,
    /// The repository at the sites, if it is not the artifact's name.
    repository: Option<String>,
    /// The tag at the sites, if it is not the artifact's version.
    tag: Option<String>,
    platform: Option<String>,
}

/// `publish --list`
pub(super) async fn publish(global: &Global, publish: Publish, file: &Path) -> Result<(), Fault> {
    let entries = read(file)?;
    publish_each(global, publish, file, entries).await
}

/// `publish --all`
pub(super) async fn publish_all(
    global: &Global,
    publish: Publish,
    source: String,
) -> Result<(), Fault> {
    if registry::reference::has_scheme(&source) || source.starts_with("db:") {
        return Err(
            Fault::usage("--all is for archives and layout directories of images")
                .with_next("list the images of a registry in a file, and give it to --list"),
        );
    }
    let file = PathBuf::from(&source);
    let archive = file.clone();
    let images = blocking(move || {
        // Only a compressed archive needs it.
        let scratch = ScratchFolder::create()?;
        image::images(&archive, &scratch.0)
    })
    .await?;
    let entries = entries_of(&source, &images)?;
    publish_each(global, publish, &file, entries).await
}

/// A private folder for temporary data, which is removed at the end.
struct ScratchFolder(PathBuf);

impl ScratchFolder {
    fn create() -> Result<Self, Fault> {
        let folder = std::env::temp_dir().join(format!("packhorse-{:016x}", rand::random::<u64>()));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .at(format_args!("create the directory {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        if let Err(fault) = durable::remove_all(&self.0) {
            output::note(&format!("{fault}"));
        }
    }
}

/// Publishes images, each alone. `from` is where they are listed.
async fn publish_each(
    global: &Global,
    publish: Publish,
    from: &Path,
    entries: Vec<Entry>,
) -> Result<(), Fault> {
    let client = Client::new(global)?;
    let deadline = Deadline::after(publish.wait.timeout);
    let (mut published, mut failed): (Vec<Published>, Vec<Fault>) = (Vec::new(), Vec::new());
    let count = entries.len();
    for entry in entries {
        let mut options = source_options(&publish)?;
        if let Some(platform) = entry.platform {
            options.platforms = vec![platform];
        }
        (options.repository, options.tag) = (entry.repository, entry.tag);
        let request = PublishRequest {
            source: entry.source.clone(),
            as_ref: entry.artifact,
            to: publish.to.clone(),
            run: None,
            options,
        };
        match publish_one(&client, &request, deadline).await {
            Ok(done) => {
                note_omitted(&done);
                published.push(done);
            }
            // The daemon does not answer, or the time is over: the others would fail too.
            Err(fault) if fault.code == Code::Deadline => {
                failed.push(fault);
                break;
            }
            Err(fault) => {
                output::note(&format!(
                    "{}: {}",
                    human::clean(&entry.source),
                    human::clean(&fault.message)
                ));
                failed.push(fault);
            }
        }
    }
    rows(global.output, &published, |published| {
        published.iter().map(published_text).collect()
    })?;
    let ids: Vec<String> = published
        .iter()
        .flat_map(|done| done.transfers.iter().cloned())
        .collect();
    let waited = wait_for(&client, global.output, &ids, &publish.wait, deadline).await;
    match failed.into_iter().next() {
        Some(first) => Err(first.context(format_args!(
            "{} of {count} images of {} are not published; the first",
            count - published.len(),
            from.display()
        ))),
        None => waited,
    }
}

fn read(file: &Path) -> Result<Vec<Entry>, Fault> {
    let refuse = |why: String| {
        Fault::usage(format!("the list {}: {why}", file.display())).with_next(
            "list references (HOST/REPOSITORY:TAG) line by line, or use the YAML of skopeo sync or Hauler",
        )
    };
    let text = durable::read_regular_text(file, CONFIG_BYTES_MAX)
        .at(format_args!("read the list {}", file.display()))?;
    let listed = image_list::read(&text).map_err(refuse)?;
    listed
        .into_iter()
        .map(|image| {
            entry(&image).map_err(|fault| {
                refuse(format!(
                    "{}: {}",
                    human::clean(&image.reference),
                    fault.message
                ))
            })
        })
        .collect()
}

fn entry(image: &ListedImage) -> Result<Entry, Fault> {
    let source = if registry::reference::has_scheme(&image.reference) {
        image.reference.clone()
    } else {
        // Without a host, the image is at Docker Hub.
        format!("docker://{}", image.reference)
    };
    let reference: Reference = source.parse()?;
    let repository = reference.repository;
    let name = repository
        .strip_prefix("library/")
        .unwrap_or(&repository)
        .replace('/', "-");
    let (tag, version) = match reference.pick {
        Pick::Tag(tag) => (Some(tag.clone()), tag.to_lowercase()),
        Pick::Digest(digest) => (None, format!("sha256-{}", &digest.hex()[..DIGEST_DIGITS])),
    };
    Ok(Entry {
        source,
        artifact: format!("image/{name}:{version}"),
        repository: Some(repository).filter(|repository| *repository != name),
        tag: tag.filter(|tag| *tag != version),
        platform: image.platform.clone(),
    })
}

/// The artifacts of all images of an archive: one for each name. An image without a name, or with
/// a tag only, has that of the archive.
fn entries_of(source: &str, images: &[ContainedImage]) -> Result<Vec<Entry>, Fault> {
    let mut entries = Vec::new();
    let of_file = name_of_file(source);
    for image in images {
        let selected = match &image.selection {
            Some(selection) => format!("{source}#{selection}"),
            None => source.to_owned(),
        };
        if image.names.is_empty() {
            let digest = image.digest.trim_start_matches("sha256:");
            let digits: String = digest.chars().take(DIGEST_DIGITS).collect();
            entries.push(Entry::of(
                selected,
                &of_file,
                None,
                format!("sha256-{digits}"),
            )?);
            continue;
        }
        for name in &image.names {
            let (repository, tag) = match name.rsplit_once(':') {
                Some((repository, tag)) if !tag.contains('/') => (without_host(repository), tag),
                _ if name.contains('/') => (without_host(name), "latest"),
                _ => (&*of_file, &**name),
            };
            entries.push(Entry::of(
                selected.clone(),
                repository,
                Some(tag.to_owned()),
                tag.to_lowercase(),
            )?);
        }
    }
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for entry in &entries {
        if let Some(other) = seen.insert(&entry.artifact, &entry.source) {
            return Err(Fault::usage(format!(
                "{other} and {} would both be {}",
                entry.source, entry.artifact
            ))
            .with_next("publish each image with its own --as"));
        }
    }
    Ok(entries)
}

/// The repository of a name without its registry, by the rule of Docker.
fn without_host(name: &str) -> &str {
    let repository = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => rest,
        _ => name,
    };
    repository.strip_prefix("library/").unwrap_or(repository)
}

/// The name of an archive without its endings, in characters of a repository.
fn name_of_file(source: &str) -> String {
    let path = Path::new(source);
    let mut name = path.file_name().unwrap_or_default().to_string_lossy();
    for ending in [".gz", ".zst", ".xz", ".bz2", ".tgz", ".tar"] {
        if let Some(short) = name.strip_suffix(ending) {
            name = short.to_owned().into();
        }
    }
    let mut out = String::new();
    for c in name.to_lowercase().chars() {
        match c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' {
            true => out.push(c),
            false if !out.is_empty() && !out.ends_with('-') => out.push('-'),
            false => {}
        }
    }
    let out = out.trim_matches(['-', '.']);
    if out.is_empty() { "image" } else { out }.to_owned()
}

impl Entry {
    fn of(
        source: String,
        repository: &str,
        tag: Option<String>,
        version: String,
    ) -> Result<Self, Fault> {
        let name = repository.replace('/', "-");
        let artifact = format!("image/{name}:{version}");
        artifact.parse::<ArtifactRef>().map_err(|why| {
            Fault::usage(format!("{}: {why}", human::clean(&source)))
                .with_next("publish this image with its own --as")
        })?;
        Ok(Self {
            source,
            artifact,
            repository: Some(repository.to_owned()).filter(|repository| *repository != name),
            tag: tag.filter(|tag| *tag != version),
            platform: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_of_an_archive_is_an_artifact() {
        let image = |selection: &str, names: &[&str]| ContainedImage {
            selection: Some(selection.into()),
            names: names.iter().map(|name| (*name).into()).collect(),
            digest: format!("sha256:{}", "ab".repeat(32)),
        };
        let of = |names: &[&str]| {
            let entries = entries_of("/d/Set of_images.tar.gz", &[image("@1", names)]).unwrap();
            let short = |entry: Entry| {
                assert_eq!(entry.source, "/d/Set of_images.tar.gz#@1");
                let text = |text: Option<String>| text.unwrap_or_default();
                (entry.artifact, text(entry.repository), text(entry.tag))
            };
            entries.into_iter().map(short).collect::<Vec<_>>()
        };
        for (name, artifact, repository, tag) in [
            ("app:v1", "image/app:v1", "", ""),
            ("docker.io/library/app:v1", "image/app:v1", "", ""),
            ("r.lan:5000/ops/app:V1", "image/ops-app:v1", "ops/app", "V1"),
            ("ops/app", "image/ops-app:latest", "ops/app", ""),
            ("v2", "image/set-of-images:v2", "", ""),
        ] {
            let expected = vec![(artifact.into(), repository.into(), tag.into())];
            assert_eq!(of(&[name]), expected, "{name}");
        }
        assert_eq!(of(&["a:1", "b:1"]).len(), 2);
        let unnamed = "image/set-of-images:sha256-abababababababab";
        assert_eq!(of(&[]), [(unnamed.into(), String::new(), String::new())]);
        for images in [
            [image("@0", &["r.lan/a:1"]), image("@1", &["q.lan/a:1"])],
            [image("@0", &["a:1"]), image("@1", &["a:ü"])],
        ] {
            let fault = entries_of("/d/a.tar", &images).unwrap_err();
            assert_eq!(fault.code, Code::Usage, "{fault:?}");
        }
    }

    #[test]
    fn an_image_of_a_list_keeps_its_repository_and_tag() {
        let of = |reference: &str| {
            let made = entry(&ListedImage {
                reference: reference.to_owned(),
                platform: None,
            })
            .unwrap();
            let text = |text: Option<String>| text.unwrap_or_default();
            (
                made.source,
                made.artifact,
                text(made.repository),
                text(made.tag),
            )
        };
        let expect = |reference: &str, [source, artifact, repository, tag]: [&str; 4]| {
            let expected = (
                source.into(),
                artifact.into(),
                repository.into(),
                tag.into(),
            );
            assert_eq!(of(reference), expected, "{reference}");
        };
        expect(
            "r.lan:5000/app:v1",
            ["docker://r.lan:5000/app:v1", "image/app:v1", "", ""],
        );
        expect(
            "r.lan/ops/team/trainer:V1.2_A",
            [
                "docker://r.lan/ops/team/trainer:V1.2_A",
                "image/ops-team-trainer:v1.2_a",
                "ops/team/trainer",
                "V1.2_A",
            ],
        );
        expect(
            "redis:7",
            ["docker://redis:7", "image/redis:7", "library/redis", ""],
        );
        let digest = format!("r.lan/a@sha256:{}", "ab".repeat(32));
        expect(
            &digest,
            [
                &format!("docker://{digest}"),
                "image/a:sha256-abababababababab",
                "",
                "",
            ],
        );
        expect(
            "http://127.0.0.1:5000/a:1",
            ["http://127.0.0.1:5000/a:1", "image/a:1", "", ""],
        );
    }
}
