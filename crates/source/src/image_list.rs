//! Lists of images to publish: plain text with one reference on each line, the YAML of
//! `skopeo sync`, and the `Images` documents of Hauler.
//!
//! Pure: the caller reads the file and parses the references.

use crate::labels::yaml::{Yaml, parse};
use base::limits::IMAGE_LIST_MAX;

/// One image of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedImage {
    /// `HOST/REPOSITORY:TAG`, as the list has it.
    pub reference: String,
    /// Its platform, if the list states one.
    pub platform: Option<String>,
}

/// The images of a list, in its order.
pub fn read(text: &str) -> Result<Vec<ListedImage>, String> {
    let images = match plain(text) {
        Some(lines) => lines.map(|line| image(line, None)).collect(),
        None => of_yaml(text)?,
    };
    match images.len() {
        0 => Err("it lists no image".to_owned()),
        1..=IMAGE_LIST_MAX => Ok(images),
        more => Err(format!(
            "it lists {more} images, more than the allowed {IMAGE_LIST_MAX}"
        )),
    }
}

fn image(reference: &str, platform: Option<&str>) -> ListedImage {
    ListedImage {
        reference: reference.to_owned(),
        platform: platform.map(str::to_owned),
    }
}

/// The lines of a plain list; `None` if it is not one.
fn plain(text: &str) -> Option<impl Iterator<Item = &str>> {
    let lines = || {
        text.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
    };
    let is_reference = |line: &str| {
        !line.contains(char::is_whitespace) && !line.ends_with(':') && !line.starts_with(['{', '['])
    };
    lines().all(is_reference).then(lines)
}

fn of_yaml(text: &str) -> Result<Vec<ListedImage>, String> {
    let mut images = Vec::new();
    // The parser reads one document.
    let mut documents = vec![String::new()];
    for line in text.lines() {
        if line.trim_end() == "---" {
            documents.push(String::new());
        } else if let Some(document) = documents.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    for document in documents {
        match parse(&document)? {
            Yaml::Scalar(text) if text.is_empty() => {}
            Yaml::List(entries) => add_entries(&entries, &mut images)?,
            Yaml::Map(members) if members.iter().any(|(key, _)| key.text() == Some("kind")) => {
                of_hauler(&Yaml::Map(members), &mut images)?;
            }
            Yaml::Map(registries) => of_skopeo(&registries, &mut images)?,
            _ => return Err(UNKNOWN.to_owned()),
        }
    }
    Ok(images)
}

const UNKNOWN: &str = "it is neither a list of references, nor one of skopeo sync or Hauler";

/// References, or maps with `name` and `platform`.
fn add_entries(entries: &[Yaml], images: &mut Vec<ListedImage>) -> Result<(), String> {
    for entry in entries {
        let name = entry
            .text()
            .or_else(|| entry.get("name").and_then(Yaml::text))
            .filter(|name| !name.is_empty())
            .ok_or("an image has no name")?;
        images.push(image(name, entry.get("platform").and_then(Yaml::text)));
    }
    Ok(())
}

fn of_hauler(document: &Yaml, images: &mut Vec<ListedImage>) -> Result<(), String> {
    let kind = document
        .get("kind")
        .and_then(Yaml::text)
        .unwrap_or_default();
    if kind != "Images" {
        return Err(format!(
            "it has a document of kind {kind:?}; only Images can be published, so move the others to a list of their own"
        ));
    }
    match document.get("spec").and_then(|spec| spec.get("images")) {
        Some(Yaml::List(entries)) => add_entries(entries, images),
        _ => Err("a document of kind Images has no list spec.images".to_owned()),
    }
}

/// `HOST: { images: { REPOSITORY: [TAG, …] } }`.
fn of_skopeo(registries: &[(Yaml, Yaml)], images: &mut Vec<ListedImage>) -> Result<(), String> {
    for (host, registry) in registries {
        let host = host.text().ok_or(UNKNOWN)?;
        let Yaml::Map(members) = registry else {
            return Err(UNKNOWN.to_owned());
        };
        for (key, value) in members {
            match (key.text().unwrap_or_default(), value) {
                ("images", Yaml::Map(repositories)) => {
                    for (repository, tags) in repositories {
                        let repository = repository.text().ok_or(UNKNOWN)?;
                        add_tags(&format!("{host}/{repository}"), tags, images)?;
                    }
                }
                // The access to a registry is set elsewhere.
                ("tls-verify" | "cert-dir", _) => {}
                ("credentials", _) => {
                    return Err(format!(
                        "{host} has credentials; remove them, and use 'docker login' or the configuration"
                    ));
                }
                (other, _) => {
                    return Err(format!(
                        "{host} has {other:?}, which is not supported; list the tags below images"
                    ));
                }
            }
        }
    }
    Ok(())
}

fn add_tags(repository: &str, tags: &Yaml, images: &mut Vec<ListedImage>) -> Result<(), String> {
    let tags = match tags {
        Yaml::List(tags) if !tags.is_empty() => tags,
        _ => {
            return Err(format!(
                "{repository} has no tags, which means all; list the tags"
            ));
        }
    };
    for tag in tags {
        let tag = tag.text().filter(|tag| !tag.is_empty());
        let tag = tag.ok_or_else(|| format!("{repository} has an empty tag"))?;
        let separator = if tag.starts_with("sha256:") { '@' } else { ':' };
        images.push(image(&format!("{repository}{separator}{tag}"), None));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references(text: &str) -> Vec<String> {
        let images = read(text).unwrap();
        images.into_iter().map(|image| image.reference).collect()
    }

    #[test]
    fn every_form_of_a_list_is_read() {
        let plain = "# images\nr.lan/a:1\n\n  r.lan:5000/b/c:2.0-rc1\nr.lan/d@sha256:00\n";
        assert_eq!(
            references(plain),
            ["r.lan/a:1", "r.lan:5000/b/c:2.0-rc1", "r.lan/d@sha256:00"]
        );
        assert_eq!(
            references("- r.lan/a:1\n- name: r.lan/b:2\n"),
            ["r.lan/a:1", "r.lan/b:2"]
        );
        let skopeo = "r.lan:\n  tls-verify: false\n  images:\n    a/b: [\"1.0\", 2.0]\n    c:\n      - sha256:00\nq.lan:\n  images: {d: [latest]}\n";
        assert_eq!(
            references(skopeo),
            [
                "r.lan/a/b:1.0",
                "r.lan/a/b:2.0",
                "r.lan/c@sha256:00",
                "q.lan/d:latest"
            ]
        );
        let hauler = "apiVersion: content.hauler.cattle.io/v1\nkind: Images\nmetadata:\n  name: x\nspec:\n  images:\n    - name: r.lan/a:1\n      platform: linux/amd64\n---\nkind: Images\nspec:\n  images:\n    - name: r.lan/b:2\n";
        let images = read(hauler).unwrap();
        assert_eq!(
            images,
            [
                image("r.lan/a:1", Some("linux/amd64")),
                image("r.lan/b:2", None)
            ]
        );
    }

    #[test]
    fn what_a_list_cannot_say_is_refused() {
        for (text, why) in [
            ("", "no image"),
            ("# nothing\n", "no image"),
            ("r.lan:\n  images:\n    a: []\n", "list the tags"),
            (
                "r.lan:\n  images-by-tag-regex:\n    a: ^1\n",
                "images-by-tag-regex",
            ),
            (
                "r.lan:\n  credentials:\n    username: u\n    password: hunter2\n",
                "docker login",
            ),
            ("kind: Charts\nspec: {}\n", "Charts"),
            ("kind: Images\nspec: {}\n", "spec.images"),
            ("a b\nc d\n", "neither"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text:?}: {error}");
            assert!(!error.contains("hunter2"));
        }
    }
}
