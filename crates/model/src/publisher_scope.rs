//! What a publisher may publish, and where it may deliver that: its join token sets it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use base::fault::Fault;
use base::names::{ArtifactRef, Kind, SiteSelector};

/// The patterns of one scope.
pub const PATTERNS_MAX: usize = 100;
/// The longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 256;

/// Names of artifacts, all versions: `KIND/NAME`, in which `*` stands for any characters of the kind
/// or of the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArtifactPattern {
    /// `None`: any.
    kind: Option<Kind>,
    name: String,
}

impl ArtifactPattern {
    /// Whether it includes an artifact.
    pub fn includes(&self, artifact: &ArtifactRef) -> bool {
        self.kind.is_none_or(|kind| kind == artifact.kind) && matches(&self.name, artifact.name())
    }
}

/// Whether a text is what a pattern with `*` describes.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut text) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        // The first place leaves the most for the others.
        match text.find(part) {
            Some(at) => text = &text[at + part.len()..],
            None => return false,
        }
    }
    text.ends_with(last)
}

impl FromStr for ArtifactPattern {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let wrong = || {
            let shown: String = text.chars().take(80).collect();
            Fault::usage(format!("{shown:?} is not a pattern of artifacts"))
                .with_next("write KIND/NAME, with * for any characters: dataset/line3-*, model/*")
        };
        let (kind, name) = text.split_once('/').ok_or_else(wrong)?;
        let kind = match kind {
            "*" => None,
            kind => Some(kind.parse().map_err(|_| wrong())?),
        };
        let may_be_in_name =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-*".contains(c);
        if name.is_empty() || name.len() > PATTERN_BYTES_MAX || !name.chars().all(may_be_in_name) {
            return Err(wrong());
        }
        Ok(Self {
            kind,
            name: name.into(),
        })
    }
}

impl fmt::Display for ArtifactPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Some(kind) => write!(f, "{kind}/{}", self.name),
            None => write!(f, "*/{}", self.name),
        }
    }
}

impl TryFrom<String> for ArtifactPattern {
    type Error = Fault;

    fn try_from(text: String) -> Result<Self, Fault> {
        text.parse()
    }
}

impl From<ArtifactPattern> for String {
    fn from(pattern: ArtifactPattern) -> Self {
        pattern.to_string()
    }
}

/// What one publisher may publish, and where it may deliver that.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublisherScope {
    /// `None`: any artifact.
    #[serde(default)]
    pub artifacts: Option<Vec<ArtifactPattern>>,
    /// `None`: to any site.
    #[serde(default)]
    pub deliver_to: Option<DeliverTo>,
}

impl PublisherScope {
    /// The limits after a token with this scope is used by a publisher that has limits already: what
    /// the token does not name stays as it is. A pattern that includes everything lifts a limit.
    pub fn over(self, earlier: Self) -> Self {
        Self {
            artifacts: self.artifacts.or(earlier.artifacts),
            deliver_to: self.deliver_to.or(earlier.deliver_to),
        }
    }
}

/// The sites that a publisher may deliver to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeliverTo {
    text: String,
    /// `None`: none.
    sites: Option<SiteSelector>,
}

impl DeliverTo {
    /// The sites; `None`: none.
    pub fn sites(&self) -> Option<&SiteSelector> {
        self.sites.as_ref()
    }
}

impl FromStr for DeliverTo {
    type Err = Fault;

    /// `none`, or a selection of sites.
    fn from_str(text: &str) -> Result<Self, Fault> {
        let sites = match text {
            "none" => None,
            text => Some(text.parse()?),
        };
        Ok(Self {
            text: text.into(),
            sites,
        })
    }
}

impl fmt::Display for DeliverTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for DeliverTo {
    type Error = Fault;

    fn try_from(text: String) -> Result<Self, Fault> {
        text.parse()
    }
}

impl From<DeliverTo> for String {
    fn from(to: DeliverTo) -> Self {
        to.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, artifact, expected) in [
            ("dataset/line3-*", "dataset/line3-a:v1", true),
            ("dataset/line3-*", "dataset/line3:v1", false),
            ("dataset/line3-*", "labels/line3-a:v1", false),
            ("*/line3", "labels/line3:v9", true),
            ("model/*", "model/anything:1", true),
            ("model/a*b*c", "model/a-b-b-c:1", true),
            ("model/a*b*c", "model/a-c-b:1", false),
            ("model/a*a", "model/a:1", false),
            ("model/exact", "model/exact2:1", false),
        ] {
            let parsed: ArtifactPattern = pattern.parse().unwrap();
            assert_eq!(parsed.to_string(), pattern);
            let includes = parsed.includes(&artifact.parse().unwrap());
            assert_eq!(includes, expected, "{pattern} {artifact}");
        }
        for wrong in [
            "line3",
            "thing/x",
            "dataset/",
            "dataset/A",
            "dataset/a/b",
            "/x",
            "",
        ] {
            assert!(wrong.parse::<ArtifactPattern>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_token_keeps_the_limits_that_it_does_not_name() {
        let scope = |json: &str| serde_json::from_str::<PublisherScope>(json).unwrap();
        let earlier = scope(r#"{"artifacts":["dataset/*"],"deliver_to":"west"}"#);
        for (token, expected) in [
            ("{}", r#"{"artifacts":["dataset/*"],"deliver_to":"west"}"#),
            (
                r#"{"artifacts":["*/*"]}"#,
                r#"{"artifacts":["*/*"],"deliver_to":"west"}"#,
            ),
            (
                r#"{"deliver_to":"all"}"#,
                r#"{"artifacts":["dataset/*"],"deliver_to":"all"}"#,
            ),
        ] {
            assert_eq!(
                scope(token).over(earlier.clone()),
                scope(expected),
                "{token}"
            );
        }
        assert_eq!(
            scope("{}").over(PublisherScope::default()),
            PublisherScope::default()
        );
    }

    #[test]
    fn a_scope_is_stored_as_it_is_written() {
        let scope = PublisherScope {
            artifacts: Some(vec!["dataset/*".parse().unwrap()]),
            deliver_to: Some("region=west".parse().unwrap()),
        };
        let json = serde_json::to_string(&scope).unwrap();
        assert_eq!(
            json,
            r#"{"artifacts":["dataset/*"],"deliver_to":"region=west"}"#
        );
        assert_eq!(
            serde_json::from_str::<PublisherScope>(&json).unwrap(),
            scope
        );
        let nobody: PublisherScope = serde_json::from_str(r#"{"deliver_to":"none"}"#).unwrap();
        assert_eq!(nobody.deliver_to.unwrap().sites(), None);
        assert!(serde_json::from_str::<PublisherScope>(r#"{"artifact":[]}"#).is_err());
    }
}
