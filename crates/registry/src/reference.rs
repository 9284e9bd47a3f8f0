//! Parses registry addresses, repositories and image references.
//!
//! This module does no I/O. A parsed reference cannot refer to anything outside its repository.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::image::Sha256;
use base::fault::Fault;

/// The longest repository name that registries accept.
const REPOSITORY_BYTES_MAX: usize = 255;

/// The schemes of registry addresses, and whether they state that TLS is used.
const SCHEMES: [(&str, Option<bool>); 6] = [
    ("https://", Some(true)),
    ("http://", Some(false)),
    ("registry+https://", Some(true)),
    ("registry+http://", Some(false)),
    ("registry://", None),
    (DOCKER_SCHEME, None),
];

/// The scheme of `docker pull` and skopeo, which may omit the host of Docker Hub.
const DOCKER_SCHEME: &str = "docker://";

/// Whether a text is the address of an image in a registry, and not a path.
pub fn has_scheme(text: &str) -> bool {
    SCHEMES.iter().any(|(scheme, _)| text.starts_with(scheme))
}

/// Whether the scheme of an address states that TLS is used, or that it is not.
fn states_tls(text: &str) -> bool {
    SCHEMES
        .iter()
        .any(|(scheme, https)| https.is_some() && text.starts_with(scheme))
}

/// A registry: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Whether the registry uses TLS.
    pub https: bool,
    /// `host[:port]`.
    pub authority: String,
}

impl Origin {
    /// `scheme://host[:port]`.
    pub fn base(&self) -> String {
        format!(
            "{}://{}",
            if self.https { "https" } else { "http" },
            self.authority
        )
    }

    /// The authority without the port of its scheme.
    pub(crate) fn without_default_port(&self) -> &str {
        let port = if self.https { ":443" } else { ":80" };
        self.authority.strip_suffix(port).unwrap_or(&self.authority)
    }

    /// Splits `[scheme://]host[:port][/rest]`. Without a scheme, TLS is used, except for addresses
    /// of this machine, as in all container tools.
    pub fn split(text: &str) -> Result<(Self, &str), Fault> {
        let (scheme, rest) = SCHEMES
            .iter()
            .find_map(|(prefix, https)| text.strip_prefix(prefix).map(|rest| (*https, rest)))
            .unwrap_or((None, text));
        let (authority, rest) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.contains('@') {
            // The message does not contain the address, because the part before the @ may be a
            // password.
            return Err(Fault::config("a registry address contains a user name")
                .with_next("set username and password_file instead"));
        }
        let host_ok = !authority.is_empty()
            && authority
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || ".-_:[]".contains(c))
            && port(authority).is_none_or(|p| p.parse::<u16>().is_ok());
        if !host_ok {
            return Err(Fault::config(format!(
                "{:?} is not a valid registry host",
                clip(authority)
            ))
            .with_next("write it as host[:port]/repository"));
        }
        let https = scheme.unwrap_or_else(|| !is_loopback(authority));
        Ok((
            Self {
                https,
                authority: authority.to_ascii_lowercase(),
            },
            rest,
        ))
    }

    /// Whether this is an address of this machine, which a proxy cannot reach.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.authority)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.authority)
    }
}

fn port(authority: &str) -> Option<&str> {
    let after_bracket = authority
        .rsplit_once(']')
        .map_or(authority, |(_, rest)| rest);
    after_bracket.split_once(':').map(|(_, port)| port)
}

fn is_loopback(authority: &str) -> bool {
    let host = match port(authority) {
        Some(port) => &authority[..authority.len() - port.len() - 1],
        None => authority,
    };
    let host = host.trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether `[host/]repository…` begins with a host, by the rule of Docker.
fn names_host(text: &str) -> bool {
    text.split_once('/')
        .is_some_and(|(first, _)| first.contains(['.', ':']) || first == "localhost")
}

fn clip(text: &str) -> String {
    text.chars().take(200).collect()
}

/// Checks a repository name according to the distribution specification: components of `[a-z0-9]+`,
/// with single `.`, one or two `_` or any number of `-` between them, separated by `/`.
pub fn check_repository(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("it is empty".into());
    }
    if name.len() > REPOSITORY_BYTES_MAX {
        return Err(format!("it is longer than {REPOSITORY_BYTES_MAX} bytes"));
    }
    for component in name.split('/') {
        let bytes = component.as_bytes();
        let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        if !bytes.first().is_some_and(alnum) || !bytes.last().is_some_and(alnum) {
            return Err(format!("{component:?} must begin and end with a-z or 0-9"));
        }
        for separator in component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) {
            if !matches!(separator, "" | "." | "_" | "__") && separator.bytes().any(|b| b != b'-') {
                return Err(format!(
                    "{component:?} contains {separator:?}, which registries do not accept"
                ));
            }
        }
    }
    Ok(())
}

/// Checks a tag according to the distribution specification.
pub fn check_tag(tag: &str) -> bool {
    let first = tag
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    first
        && tag.len() <= 128
        && tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Selects a manifest of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pick {
    /// The manifest of this tag.
    Tag(String),
    /// The manifest with this digest.
    Digest(Sha256),
}

impl fmt::Display for Pick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pick::Tag(tag) => f.write_str(tag),
            Pick::Digest(digest) => write!(f, "{digest}"),
        }
    }
}

/// `[scheme://]host[:port]/repository[:tag|@digest]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    pub origin: Origin,
    pub repository: String,
    /// The manifest; `latest` if none is stated.
    pub pick: Pick,
    /// Whether the scheme states that TLS is used, or that it is not.
    states_tls: bool,
}

impl Reference {
    /// Uses TLS, unless the reference states that there is none: a setting of the registry makes sense
    /// only with TLS.
    pub fn prefer_tls(&mut self) {
        self.origin.https |= !self.states_tls;
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if matches!(self.pick, Pick::Tag(_)) {
            ':'
        } else {
            '@'
        };
        write!(
            f,
            "{}/{}{separator}{}",
            self.origin, self.repository, self.pick
        )
    }
}

impl FromStr for Reference {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let refuse = |why: String| {
            Fault::usage(format!("image reference {:?}: {why}", clip(text))).with_next(
                "write it as registry://host[:port]/repository:tag, or @sha256:… for one digest",
            )
        };
        let with_host = text
            .strip_prefix(DOCKER_SCHEME)
            .filter(|rest| !names_host(rest))
            .map(|rest| format!("{DOCKER_SCHEME}docker.io/{rest}"));
        let (mut origin, rest) = Origin::split(with_host.as_deref().unwrap_or(text))?;
        if rest.is_empty() {
            return Err(refuse("it contains no repository".into()));
        }
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Sha256>().map_err(&refuse)?)),
            None => (rest, None),
        };
        let (repository, tag) = rest
            .rsplit_once(':')
            .map_or((rest, None), |(r, t)| (r, Some(t)));
        let mut repository = repository.to_owned();
        if origin.authority == "docker.io" {
            origin.authority = "registry-1.docker.io".into();
            if !repository.contains('/') {
                repository = format!("library/{repository}");
            }
        }
        check_repository(&repository).map_err(|why| refuse(format!("repository: {why}")))?;
        let pick = match (digest, tag) {
            (Some(digest), _) => Pick::Digest(digest),
            (None, Some(tag)) if check_tag(tag) => Pick::Tag(tag.into()),
            (None, Some(tag)) => return Err(refuse(format!("{tag:?} is not a tag"))),
            (None, None) => Pick::Tag("latest".into()),
        };
        Ok(Self {
            origin,
            repository,
            pick,
            states_tls: states_tls(text),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_parse_and_print() {
        let check = |text: &str, base: &str, repository: &str, pick: &str| {
            let r: Reference = text.parse().unwrap();
            assert_eq!(
                (
                    r.origin.base().as_str(),
                    r.repository.as_str(),
                    r.pick.to_string().as_str()
                ),
                (base, repository, pick),
                "{text}"
            );
        };
        let digest = format!("sha256:{}", "ab".repeat(32));
        check(
            "registry://harbor.example.com/op/seg:v1",
            "https://harbor.example.com",
            "op/seg",
            "v1",
        );
        check(
            "harbor.example.com:8443/op/seg",
            "https://harbor.example.com:8443",
            "op/seg",
            "latest",
        );
        check(
            "127.0.0.1:5000/seg:v1",
            "http://127.0.0.1:5000",
            "seg",
            "v1",
        );
        check("[::1]:5000/seg:v1", "http://[::1]:5000", "seg", "v1");
        check("https://localhost/seg:v1", "https://localhost", "seg", "v1");
        check(
            "registry+http://r.lan:5000/a/b/c:x",
            "http://r.lan:5000",
            "a/b/c",
            "x",
        );
        check(
            "docker.io/alpine:3",
            "https://registry-1.docker.io",
            "library/alpine",
            "3",
        );
        check(
            "registry+https://127.0.0.1:5000/a:x",
            "https://127.0.0.1:5000",
            "a",
            "x",
        );
        check("docker://r.lan:5000/a:x", "https://r.lan:5000", "a", "x");
        check(
            "docker://alpine:3",
            "https://registry-1.docker.io",
            "library/alpine",
            "3",
        );
        check(
            "docker://grafana/loki",
            "https://registry-1.docker.io",
            "grafana/loki",
            "latest",
        );
        check("docker://localhost/a:1", "http://localhost", "a", "1");
        check(
            &format!("r.lan/a:v1@{digest}"),
            "https://r.lan",
            "a",
            &digest,
        );
    }

    #[test]
    fn bad_references_are_refused() {
        for bad in [
            "",
            "host",
            "host/",
            "host/A:1",
            "host/a:",
            "host/a:.x",
            "host:99999/a",
            "ho st/a",
            "host/a@sha256:12",
            "host/a//b",
            "host/../b",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
        let fault = "https://user:hunter2@host/a:1"
            .parse::<Reference>()
            .unwrap_err();
        assert!(!fault.message.contains("hunter2"), "{fault}");
    }

    #[test]
    fn repository_names() {
        for good in ["a", "a/b", "a.b", "a_b", "a__b", "a---b", "a1/b-2.c_d"] {
            assert_eq!(check_repository(good), Ok(()), "{good}");
        }
        for bad in ["", "a.", "-a", "a..b", "a___b", "a._b", "a/", "A"] {
            assert!(check_repository(bad).is_err(), "{bad}");
        }
    }
}
