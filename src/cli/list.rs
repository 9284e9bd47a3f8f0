//! `publish --list`: publishes every image of a list, each under the name and the tag of its
//! repository.

use std::path::Path;

use super::args::{Global, Publish};
use super::client::Client;
use super::commands::{note_omitted, publish_one, published_text, source_options, wait_for};
use super::follow::Deadline;
use super::human;
use super::output::{self, rows};
use crate::api::types::{PublishRequest, Published};
use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::limits::CONFIG_BYTES_MAX;
use registry::Reference;
use registry::reference::Pick;
use source::image_list::{self, ListedImage};

/// Digits of a digest in a version.
const DIGEST_DIGITS: usize = 16;

/// One image of the list, ready to be published.
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
            file.display()
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

#[cfg(test)]
mod tests {
    use super::*;

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
