//! Credentials from the files that `docker login`, `podman login` and `skopeo login` write.
//!
//! They are used if the configuration of packhorse has none. Credential helpers are other programs;
//! none is run. A file that does not exist or may not be read has no credentials; a malformed file
//! is an error that names it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::{Credentials, Reference};
use base::durable;
use base::fault::Fault;
use base::limits;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// The files, the first with credentials for a registry is used: `$DOCKER_CONFIG/config.json` or
/// `~/.docker/config.json`, then those of podman and skopeo.
pub fn files() -> Vec<PathBuf> {
    let of = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = std::env::home_dir().filter(|home| home.is_absolute());
    let in_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let docker = of("DOCKER_CONFIG")
        .map(|folder| folder.join("config.json"))
        .or_else(|| in_home(".docker/config.json"));
    [
        docker,
        of("REGISTRY_AUTH_FILE"),
        of("XDG_RUNTIME_DIR").map(|folder| folder.join("containers/auth.json")),
        in_home(".config/containers/auth.json"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The credentials for a reference in these files. Blocks.
pub fn find(files: &[PathBuf], reference: &Reference) -> Result<Option<Credentials>, Fault> {
    for file in files {
        let text = match durable::read_regular(file, limits::SECRET_BYTES_MAX) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    tracing::debug!(file = %file.display(), %error, "the file with registry credentials is not used");
                }
                continue;
            }
        };
        let found = parse(file, &text)?
            .and_then(|parsed| credentials(&parsed, reference).transpose())
            .transpose()
            .map_err(|why| malformed(file, &why))?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn parse(file: &Path, text: &[u8]) -> Result<Option<File>, Fault> {
    if text.iter().all(u8::is_ascii_whitespace) {
        return Ok(None); // some tools create an empty file
    }
    // The position of the error is not quoted with its text, which may contain a password.
    let parsed = serde_json::from_slice(text).map_err(|e| {
        malformed(
            file,
            &format!("malformed JSON at line {}, column {}", e.line(), e.column()),
        )
    })?;
    Ok(Some(parsed))
}

fn malformed(file: &Path, why: &str) -> Fault {
    Fault::config(format!(
        "the registry credentials in {}: {why}",
        file.display()
    ))
    .with_next("repair the file, or remove it and run 'docker login' again")
}

fn credentials(file: &File, reference: &Reference) -> Result<Option<Credentials>, String> {
    let wanted = wanted_keys(reference);
    let entries: Vec<(String, &Entry)> = file
        .auths
        .iter()
        .map(|(key, entry)| (plain_key(key), entry))
        .collect();
    for key in wanted {
        let Some((_, entry)) = entries.iter().find(|(own, _)| *own == key) else {
            continue;
        };
        if !entry.username.is_empty() {
            return Ok(Some(Credentials::new(&entry.username, &entry.password)));
        }
        if entry.auth.is_empty() {
            continue; // the credentials are with a helper
        }
        let invalid = || format!("the entry of {key} is not the base64 of USER:PASSWORD");
        let pair = STANDARD.decode(entry.auth.trim()).map_err(|_| invalid())?;
        let pair = String::from_utf8(pair).map_err(|_| invalid())?;
        let (user, password) = pair
            .trim_end_matches('\0')
            .split_once(':')
            .ok_or_else(invalid)?;
        return Ok(Some(Credentials::new(user, password)));
    }
    Ok(None)
}

/// A key without scheme and path of an API version: `https://index.docker.io/v1/` is
/// `index.docker.io`.
fn plain_key(key: &str) -> String {
    let key = key
        .trim()
        .trim_start_matches("https://")
        .trim_start_matches("http://")
        .trim_end_matches('/');
    let key = ["/v1", "/v2"]
        .iter()
        .find_map(|suffix| key.strip_suffix(suffix))
        .unwrap_or(key);
    match key.split_once('/') {
        Some((host, path)) => format!("{}/{path}", host.to_ascii_lowercase()),
        None => key.to_ascii_lowercase(),
    }
}

/// The keys under which the credentials of a reference may be, the most specific first.
fn wanted_keys(reference: &Reference) -> Vec<String> {
    let authority = reference.origin.authority.as_str();
    let hosts: &[&str] = match authority {
        "registry-1.docker.io" | "docker.io" | "index.docker.io" => {
            &["docker.io", "index.docker.io", "registry-1.docker.io"]
        }
        _ => &[authority],
    };
    let mut keys = Vec::new();
    for host in hosts {
        let mut path = reference.repository.as_str();
        loop {
            keys.push(format!("{host}/{path}"));
            match path.rsplit_once('/') {
                Some((parent, _)) => path = parent,
                None => break,
            }
        }
    }
    keys.extend(hosts.iter().map(|host| (*host).to_owned()));
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[PathBuf], reference: &str) -> Option<(String, String)> {
        let found = find(files, &reference.parse().unwrap()).unwrap();
        found.map(|credentials| credentials.pair_for_tests())
    }

    fn pair(user: &str, password: &str) -> Option<(String, String)> {
        Some((user.to_owned(), password.to_owned()))
    }

    #[test]
    fn the_entry_of_the_registry_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let [docker, podman, none] =
            ["config.json", "auth.json", "none.json"].map(|name| dir.path().join(name));
        let of = |text: &str| STANDARD.encode(text);
        let text = serde_json::json!({
            "auths": {
                "https://index.docker.io/v1/": {"auth": of("hub:h1")},
                "Harbor.example.com": {"auth": of("robot$a+b:p:w"), "email": "x"},
                "harbor.example.com:8443": {"username": "u", "password": "p"},
                "helper.example.com": {},
            },
            "credsStore": "desktop", "HttpHeaders": {"User-Agent": "x"},
        });
        durable::replace_secret(&docker, text.to_string().as_bytes()).unwrap();
        let text = serde_json::json!({"auths": {
            "r.lan/team/app": {"auth": of("app:1")}, "r.lan/team": {"auth": of("team:2")}, "r.lan": {"auth": of("all:3")},
            "helper.example.com": {"auth": of("late:4")},
        }});
        durable::replace_secret(&podman, text.to_string().as_bytes()).unwrap();
        let files = [none, docker, podman];
        let found = |reference: &str| found(&files, reference);
        assert_eq!(found("docker://alpine:3"), pair("hub", "h1"));
        assert_eq!(
            found("registry://harbor.example.com/op/a:v1"),
            pair("robot$a+b", "p:w")
        );
        assert_eq!(
            found("registry://harbor.example.com:8443/op/a:v1"),
            pair("u", "p")
        );
        assert_eq!(found("r.lan/team/app:1"), pair("app", "1"));
        assert_eq!(found("r.lan/team/other:1"), pair("team", "2"));
        assert_eq!(found("r.lan/teams/other:1"), pair("all", "3"));
        assert_eq!(found("helper.example.com/a:1"), pair("late", "4"));
        assert_eq!(found("other.example.com/a:1"), None);
    }

    #[test]
    fn a_malformed_file_is_named_and_not_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let reference: Reference = "r.lan/a:1".parse().unwrap();
        for text in [
            "{\"auths\": {\"r.lan\": {\"auth\": hunter2",
            "{\"auths\": {\"r.lan\": {\"auth\": \"hunter2!\"}}}",
        ] {
            durable::replace_secret(&file, text.as_bytes()).unwrap();
            let fault = find(std::slice::from_ref(&file), &reference).unwrap_err();
            let shown = format!("{fault:?}");
            assert!(
                shown.contains("config.json") && !shown.contains("hunter2"),
                "{shown}"
            );
        }
        durable::replace_secret(&file, b" \n").unwrap();
        assert!(find(&[file], &reference).unwrap().is_none());
    }
}
