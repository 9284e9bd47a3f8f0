//! The names of objects, parsed once into types that cannot hold an invalid name.
//!
//! Every text from a person, a peer or a file is parsed into one of these types where it enters the
//! program. No other code checks a name again. No name can escape its directory, contain a NUL or
//! be empty.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest artifact name, version, site name or label, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// The longest component of a path in an artifact, in bytes; all common filesystems accept it.
pub const PATH_COMPONENT_BYTES_MAX: usize = 255;
/// The longest path in an artifact, in bytes.
pub const PATH_BYTES_MAX: usize = 4096;

/// An invalid name, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what} {name:?} is not allowed: {why}")]
pub struct NameError {
    what: &'static str,
    name: String,
    why: String,
}

fn refuse<T>(what: &'static str, name: &str, why: impl Into<String>) -> Result<T, NameError> {
    // A hostile name may have any length; the error message must not.
    let name = name.chars().take(200).collect();
    Err(NameError {
        what,
        name,
        why: why.into(),
    })
}

fn check_word(what: &'static str, word: &str) -> Result<(), NameError> {
    if word.is_empty() {
        return refuse(what, word, "it is empty");
    }
    if word.len() > NAME_BYTES_MAX {
        return refuse(
            what,
            word,
            format!("it is longer than {NAME_BYTES_MAX} bytes"),
        );
    }
    let first = word.as_bytes()[0];
    if !(first.is_ascii_lowercase() || first.is_ascii_digit()) {
        return refuse(
            what,
            word,
            "it must start with a lower-case letter or a digit",
        );
    }
    match word
        .chars()
        .find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '_' | '-'))
    {
        Some(c) => refuse(
            what,
            word,
            format!("it contains {c:?}; use a-z, 0-9, '.', '_' and '-'"),
        ),
        None => Ok(()),
    }
}

macro_rules! string_type {
    ($type:ident) => {
        impl $type {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.0
            }
        }
        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(value: String) -> Result<Self, NameError> {
                value.parse()
            }
        }
    };
}

mod ids;

pub use ids::{DeliveryId, RunId, TransferId, WorkId, WorkIds};

/// The type of an artifact. It determines the sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A directory of many images; stored on the NAS.
    Dataset,
    /// Annotations; stored as rows in a database.
    Labels,
    /// The code of an operator project; a directory on the NAS.
    Operator,
    /// An operator image; stored in a registry.
    Image,
    /// One or a few large files; a directory on the NAS.
    Model,
}

impl Kind {
    /// Every kind, in the order in which lists show them.
    pub const ALL: [Kind; 5] = [
        Kind::Dataset,
        Kind::Labels,
        Kind::Operator,
        Kind::Image,
        Kind::Model,
    ];

    /// The word used in references, paths and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Dataset => "dataset",
            Kind::Labels => "labels",
            Kind::Operator => "operator",
            Kind::Image => "image",
            Kind::Model => "model",
        }
    }

    /// The word in a sentence, with its article.
    pub fn with_article(self) -> &'static str {
        match self {
            Kind::Dataset => "a dataset",
            Kind::Labels => "labels",
            Kind::Operator => "an operator",
            Kind::Image => "an image",
            Kind::Model => "a model",
        }
    }

    /// Whether artifacts of this kind are stored as a directory of files.
    pub fn is_files(self) -> bool {
        matches!(self, Kind::Dataset | Kind::Operator | Kind::Model)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        match Kind::ALL.into_iter().find(|k| k.as_str() == s) {
            Some(kind) => Ok(kind),
            None => refuse("kind", s, "use dataset, labels, operator, image or model"),
        }
    }
}

/// The name of the file and of the link that name the active version on a NAS. A version cannot
/// have this name.
const CURRENT: &str = "current";

/// `kind/name:version`. An artifact never changes after it is published.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArtifactRef {
    pub kind: Kind,
    name: String,
    version: String,
}

impl ArtifactRef {
    /// Creates a reference; checks the name and the version.
    pub fn new(kind: Kind, name: &str, version: &str) -> Result<Self, NameError> {
        check_word("artifact name", name)?;
        check_word("artifact version", version)?;
        if version == CURRENT {
            return refuse(
                "artifact version",
                version,
                "this name is reserved for the link to the active version on a NAS",
            );
        }
        Ok(Self {
            kind,
            name: name.into(),
            version: version.into(),
        })
    }

    /// The name: `[a-z0-9][a-z0-9._-]*`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version: `[a-z0-9][a-z0-9._-]*`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// `kind/name`: the part that all versions share.
    pub fn series(&self) -> String {
        format!("{}/{}", self.kind, self.name)
    }
}

impl fmt::Display for ArtifactRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.kind, self.name, self.version)
    }
}

impl FromStr for ArtifactRef {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let usage = "write it as KIND/NAME:VERSION, for example dataset/line3:v1";
        let Some((kind, rest)) = s.split_once('/') else {
            return refuse("artifact reference", s, usage);
        };
        let Some((name, version)) = rest.split_once(':') else {
            return refuse("artifact reference", s, usage);
        };
        Self::new(kind.parse()?, name, version)
    }
}

impl From<ArtifactRef> for String {
    fn from(value: ArtifactRef) -> String {
        value.to_string()
    }
}

impl TryFrom<String> for ArtifactRef {
    type Error = NameError;
    fn try_from(value: String) -> Result<Self, NameError> {
        value.parse()
    }
}

/// The name of a site, or of the hub.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SiteName(String);

string_type!(SiteName);

impl SiteName {
    /// The path of this name in `dir`: a direct child.
    pub fn in_dir(&self, dir: &Path) -> PathBuf {
        dir.join(&self.0)
    }
}

impl FromStr for SiteName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        check_word("site name", s)?;
        if s == "all" {
            return refuse("site name", s, "this word selects all sites");
        }
        Ok(Self(s.into()))
    }
}

/// The name of a publisher: a program that publishes at the hub from another machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublisherName(String);

string_type!(PublisherName);

impl FromStr for PublisherName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        check_word("publisher name", s)?;
        if s == "all" {
            return refuse("publisher name", s, "this word selects all sites");
        }
        Ok(Self(s.into()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunName(String);

string_type!(RunName);

impl RunName {
    /// The path of this name in `dir`: a direct child.
    pub fn in_dir(&self, dir: &Path) -> PathBuf {
        dir.join(&self.0)
    }
}

impl FromStr for RunName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        check_word("run name", s)?;
        Ok(Self(s.into()))
    }
}

/// Checks the name of an access token of the API.
pub fn check_access_name(name: &str) -> Result<(), NameError> {
    check_word("token name", name)
}

/// A path in an artifact: UTF-8, relative, with `/` between its components; no `.`, `..`, empty
/// component or NUL.
///
/// Paths are ordered by component, and components by bytes, as in the manifest. Therefore a
/// directory comes directly before its content.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RelPath(String);

string_type!(RelPath);

impl Ord for RelPath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.components().cmp(other.components())
    }
}

impl PartialOrd for RelPath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl RelPath {
    /// Appends one component.
    pub fn join(&self, component: &str) -> Result<Self, NameError> {
        format!("{}/{component}", self.0).parse()
    }

    /// This path in `dir`, always below it.
    pub fn in_dir(&self, dir: &Path) -> PathBuf {
        dir.join(&self.0)
    }

    /// The components, first to last.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// The path without its last component; `None` for a path of one component.
    pub fn parent(&self) -> Option<&str> {
        self.0.rsplit_once('/').map(|(parent, _)| parent)
    }

    pub fn file_name(&self) -> &str {
        self.0.rsplit_once('/').map_or(&self.0, |(_, name)| name)
    }
}

impl FromStr for RelPath {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let what = "path";
        if s.is_empty() {
            return refuse(what, s, "it is empty");
        }
        if s.len() > PATH_BYTES_MAX {
            return refuse(what, s, format!("it is longer than {PATH_BYTES_MAX} bytes"));
        }
        if s.contains('\0') {
            return refuse(what, s, "it contains a NUL");
        }
        for component in s.split('/') {
            match component {
                "" => return refuse(what, s, "it is absolute or has an empty component"),
                "." | ".." => return refuse(what, s, format!("it contains {component:?}")),
                c if c.len() > PATH_COMPONENT_BYTES_MAX => {
                    return refuse(
                        what,
                        s,
                        format!("a component is longer than {PATH_COMPONENT_BYTES_MAX} bytes"),
                    );
                }
                _ => {}
            }
        }
        Ok(Self(s.into()))
    }
}

/// Checks that the target of the symbolic link at `path` stays inside the artifact. The target is
/// resolved by its text, from the directory of the link. The publisher and the receiver use this
/// one rule.
///
/// A `..` that follows a name is accepted only if that name is a real directory: after another
/// link, `..` could lead anywhere. `is_folder` states whether the path of these components is a
/// directory of the artifact, with all directories above it. Its second argument is the number of
/// the first components that are known to be directories; they are those of the call before. So
/// no component of a target is looked at twice, and the cost is linear in the length of the texts.
pub fn stays_inside(
    path: &RelPath,
    target: &str,
    mut is_folder: impl FnMut(&[&str], usize) -> bool,
) -> Result<(), &'static str> {
    if target.starts_with('/') {
        return Err("is an absolute path");
    }
    let mut at: Vec<&str> = path.components().collect();
    at.pop();
    // The directories above the link are real directories.
    let mut known_dirs = at.len();
    for component in target.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                if at.is_empty() {
                    return Err("leaves the directory");
                }
                if at.len() > known_dirs && !is_folder(&at, known_dirs) {
                    return Err("uses '..' after something that is not a directory");
                }
                at.pop();
                known_dirs = at.len();
            }
            name => at.push(name),
        }
    }
    Ok(())
}

/// The sites that a command selects: names, `all`, or a selector on labels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SiteSelector {
    /// Every site that has joined.
    All,
    /// These sites; each must exist.
    Names(Vec<SiteName>),
    /// The sites whose labels match every term.
    Labels(Vec<LabelTerm>),
}

impl SiteSelector {
    /// Whether the selector matches a site with this name and these labels.
    pub fn includes(
        &self,
        site: &SiteName,
        labels: &std::collections::BTreeMap<String, String>,
    ) -> bool {
        match self {
            Self::All => true,
            Self::Names(names) => names.contains(site),
            Self::Labels(terms) => terms.iter().all(|term| term.matches(labels)),
        }
    }
}

impl fmt::Display for SiteSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = match self {
            Self::All => vec!["all".into()],
            Self::Names(names) => names.iter().map(ToString::to_string).collect(),
            Self::Labels(terms) => terms
                .iter()
                .map(|t| format!("{}{}{}", t.key, if t.equal { "=" } else { "!=" }, t.value))
                .collect(),
        };
        f.write_str(&texts.join(","))
    }
}

impl From<SiteSelector> for String {
    fn from(value: SiteSelector) -> String {
        value.to_string()
    }
}

impl TryFrom<String> for SiteSelector {
    type Error = NameError;
    fn try_from(value: String) -> Result<Self, NameError> {
        value.parse()
    }
}

/// One term of a label selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelTerm {
    pub key: String,
    pub value: String,
    /// `=` if true, `!=` if false. A site without the key matches `!=`.
    pub equal: bool,
}

impl LabelTerm {
    /// Whether a site with these labels matches the term.
    pub fn matches(&self, labels: &std::collections::BTreeMap<String, String>) -> bool {
        (labels.get(&self.key) == Some(&self.value)) == self.equal
    }
}

/// Checks a label's key and value: at most [`NAME_BYTES_MAX`] bytes of letters, digits, `.`, `_`,
/// `-` and (in keys) `/`.
pub fn check_label(key: &str, value: &str) -> Result<(), NameError> {
    let ok = |s: &str, slash: bool| {
        s.len() <= NAME_BYTES_MAX
            && s.chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c) || (slash && c == '/'))
    };
    if key.is_empty() || !ok(key, true) {
        return refuse(
            "label key",
            key,
            "use letters, digits, '.', '_', '-' and '/'",
        );
    }
    if !ok(value, false) {
        return refuse(
            "label value",
            value,
            "use letters, digits, '.', '_' and '-'",
        );
    }
    Ok(())
}

impl FromStr for SiteSelector {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let usage =
            "write names separated by commas, 'all', or a selector such as region=west,line!=3";
        if s == "all" {
            return Ok(Self::All);
        }
        if s.trim().is_empty() {
            return refuse("site selection", s, usage);
        }
        let parts: Vec<&str> = s.split(',').map(str::trim).collect();
        let terms = parts.iter().filter(|p| p.contains('=')).count();
        if terms == 0 {
            let mut names = parts
                .into_iter()
                .map(str::parse)
                .collect::<Result<Vec<SiteName>, _>>()?;
            names.sort();
            names.dedup();
            return Ok(Self::Names(names));
        }
        if terms != parts.len() {
            return refuse(
                "site selection",
                s,
                format!("names and label terms cannot be mixed; {usage}"),
            );
        }
        let mut out = Vec::new();
        for part in parts {
            let (key, value, equal) = match part.split_once("!=") {
                Some((k, v)) => (k, v, false),
                None => match part.split_once('=') {
                    Some((k, v)) => (k, v, true),
                    None => return refuse("site selection", s, usage),
                },
            };
            check_label(key, value)?;
            out.push(LabelTerm {
                key: key.into(),
                value: value.into(),
                equal,
            });
        }
        Ok(Self::Labels(out))
    }
}

impl crate::text::FromText for SiteSelector {
    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_the_article_of_its_word() {
        for kind in Kind::ALL {
            let article = match kind {
                Kind::Labels => "",
                _ if kind.as_str().starts_with(['a', 'e', 'i', 'o', 'u']) => "an ",
                _ => "a ",
            };
            assert_eq!(kind.with_article(), format!("{article}{kind}"));
        }
    }

    #[test]
    fn references_parse_and_print() {
        let r: ArtifactRef = "dataset/line-3.aoi:2026.11_a".parse().unwrap();
        assert_eq!(r.to_string(), "dataset/line-3.aoi:2026.11_a");
        for bad in [
            "",
            "dataset",
            "dataset/x",
            "data/x:1",
            "dataset/X:1",
            "dataset/x:",
            "dataset/.x:1",
            "dataset/a/b:1",
            "dataset/x:1:2",
            "dataset/x:current",
            "dataset/../x:1",
        ] {
            assert!(
                bad.parse::<ArtifactRef>().is_err(),
                "{bad:?} must be refused"
            );
        }
        assert!(
            format!("dataset/{}:1", "a".repeat(129))
                .parse::<ArtifactRef>()
                .is_err()
        );
    }

    #[test]
    fn paths_cannot_escape() {
        for good in ["a", "a/b", "图像/缺陷 1.png", "a..b", ".hidden"] {
            assert!(good.parse::<RelPath>().is_ok(), "{good:?}");
        }
        for bad in ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\0b"] {
            assert!(bad.parse::<RelPath>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn links_stay_inside_or_are_refused() {
        let folders = ["a", "a/b", "z"];
        let of = |link: &str, target: &str| {
            stays_inside(&link.parse().unwrap(), target, |folder, _| {
                folders.contains(&folder.join("/").as_str())
            })
        };
        for (link, target) in [
            ("l", "x"),
            ("l", "."),
            ("l", "l"),
            ("l", "nowhere/at/all"),
            ("a/l", "../x"),
            ("a/b/l", "../../x/./y"),
            ("a/l", "b/../../z"),
            ("l", "z/.."),
            ("l", "z/"),
            ("a/l", "b//../c"),
            ("l", "..."),
        ] {
            assert_eq!(of(link, target), Ok(()), "{link} -> {target}");
        }
        for (link, target) in [
            ("l", "/etc/passwd"),
            ("l", "/"),
            ("l", ".."),
            ("a/l", "../.."),
            ("a/b/l", "../../../x"),
            ("a/l", "b/../../../x"),
            ("l", "other/.."),
            ("a/l", "up/../x"),
            ("l", "z/x/../.."),
            ("l", "a/b/../../../etc"),
            ("a/l", "./.././../x"),
        ] {
            assert!(of(link, target).is_err(), "{link} -> {target}");
        }
    }

    #[test]
    fn each_component_of_a_link_is_looked_at_once() {
        let up_and_down = format!("{}{}", "x/".repeat(1000), "../x/".repeat(400));
        let up = format!("{}{}", "x/".repeat(1000), "../".repeat(1000));
        let deep = format!("{}l", "d/".repeat(1000));
        for (link, target, calls_expected, components_expected) in [
            ("l", up_and_down.as_str(), 400, 1000 + 399),
            ("l", up.as_str(), 1, 1000),
            (deep.as_str(), up_and_down.as_str(), 400, 1000 + 399),
        ] {
            let (mut calls, mut components, mut before) = (0, 0, Vec::<String>::new());
            let result = stays_inside(&link.parse().unwrap(), target, |folder, known| {
                calls += 1;
                components += folder.len() - known;
                assert!(
                    before.is_empty() || folder[..known] == before[..known],
                    "they are those of the call before"
                );
                before = folder.iter().map(|name| (*name).to_owned()).collect();
                true
            });
            assert_eq!(
                (result, calls, components),
                (Ok(()), calls_expected, components_expected)
            );
        }
    }

    #[test]
    fn selectors() {
        assert_eq!("all".parse(), Ok(SiteSelector::All));
        assert!(matches!("a,b,a".parse(), Ok(SiteSelector::Names(n)) if n.len() == 2));
        assert!(
            matches!("region=west,line!=3".parse(), Ok(SiteSelector::Labels(t)) if t.len() == 2 && !t[1].equal)
        );
        for text in ["all", "a,b", "region=west,line!=3", "x="] {
            assert_eq!(text.parse::<SiteSelector>().unwrap().to_string(), text);
        }
        assert!("a,region=west".parse::<SiteSelector>().is_err());
        assert!("".parse::<SiteSelector>().is_err());
    }
}
