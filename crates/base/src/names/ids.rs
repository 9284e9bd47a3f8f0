//! Ids of transfers, deliveries and training runs.
//!
//! The hub creates ids (`catalogue::new_transfer_id` and similar functions), and every daemon
//! receives ids from peers. Only the parsers in this module create values. Therefore every id names
//! a direct child of the directory to which `in_dir` joins it. The types do not implement
//! `AsRef<Path>`, so `Path::join` does not accept them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NameError, refuse};
use crate::limits::{ID_BYTES_MAX, IDS_ASKED_MAX};

fn check_id(what: &'static str, text: &str) -> Result<(), NameError> {
    if text.len() > ID_BYTES_MAX {
        return refuse(
            what,
            text,
            format!("it is longer than {ID_BYTES_MAX} bytes"),
        );
    }
    if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return refuse(what, text, "it must start with a letter or a digit");
    }
    match text
        .chars()
        .find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')))
    {
        Some(c) => refuse(
            what,
            text,
            format!("it contains {c:?}; use letters, digits, '.', '_' and '-'"),
        ),
        None => Ok(()),
    }
}

macro_rules! id_type {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        string_type!($type);

        impl $type {
            /// The path of this id in `dir`: a direct child.
            pub fn in_dir(&self, dir: &Path) -> PathBuf {
                dir.join(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                check_id($what, text)?;
                Ok(Self(text.into()))
            }
        }

        impl std::ops::Deref for $type {
            type Target = str;
            fn deref(&self) -> &str {
                &self.0
            }
        }
    };
}

id_type! {
    /// The id of a transfer. It names the transfer's staging directory.
    TransferId, "transfer id"
}
id_type! {
    /// The id of a delivery.
    DeliveryId, "delivery id"
}
id_type! {
    /// The id of a training run. It distinguishes the run from runs of the same name at other hubs.
    RunId, "run id"
}
id_type! {
    /// The id of a transfer or of a delivery, as a person or a peer names it.
    WorkId, "id"
}

impl From<&TransferId> for WorkId {
    fn from(id: &TransferId) -> Self {
        Self(id.0.clone())
    }
}

impl TransferId {
    /// Creates an id that sorts by time.
    pub fn made(now_ms: u64, random: u32) -> Self {
        Self(format!("t-{now_ms:011x}{random:08x}"))
    }

    /// The time that an id of [`TransferId::made`] begins with; `None`: another id.
    pub fn made_ms(&self) -> Option<u64> {
        let digits = self.0.strip_prefix("t-")?;
        (digits.len() == 19)
            .then(|| digits.get(..11))
            .flatten()
            .and_then(|time| u64::from_str_radix(time, 16).ok())
    }

    /// The id for an artifact that is only examined. No directory and no catalogue row uses this
    /// id.
    pub fn none() -> Self {
        Self("none".into())
    }
}

impl DeliveryId {
    /// Creates an id that sorts by time.
    pub fn made(now_ms: u64, random: u32) -> Self {
        Self(format!("d-{now_ms:011x}{random:08x}"))
    }
}

impl RunId {
    /// Creates an id that sorts by time.
    pub fn made(now_ms: u64, random: u32) -> Self {
        Self(format!("r-{now_ms:011x}{random:08x}"))
    }
}

/// Ids of transfers or deliveries, separated by commas; at most [`IDS_ASKED_MAX`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WorkIds(Vec<WorkId>);

impl fmt::Display for WorkIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, id) in self.0.iter().enumerate() {
            write!(f, "{}{id}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for WorkIds {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let ids = text
            .split(',')
            .map(|id| id.trim().parse())
            .collect::<Result<Vec<WorkId>, _>>()?;
        if ids.len() > IDS_ASKED_MAX {
            return refuse(
                "list of ids",
                text,
                format!(
                    "it has {} ids; at most {IDS_ASKED_MAX} are allowed",
                    ids.len()
                ),
            );
        }
        Ok(Self(ids))
    }
}

impl From<WorkIds> for String {
    fn from(value: WorkIds) -> String {
        value.to_string()
    }
}

impl TryFrom<String> for WorkIds {
    type Error = NameError;
    fn try_from(value: String) -> Result<Self, NameError> {
        value.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{ArtifactRef, RelPath, RunName, SiteName};
    use super::*;

    /// Whether the operating system reads `path` as exactly one component below `dir`.
    fn is_direct_child(dir: &Path, path: &Path) -> bool {
        let Ok(rest) = path.strip_prefix(dir) else {
            return false;
        };
        let mut components = rest.components();
        matches!((components.next(), components.next()), (Some(std::path::Component::Normal(name)), None) if name == rest.as_os_str())
            && path.parent() == Some(dir)
            && !rest.as_os_str().as_encoded_bytes().contains(&0)
    }

    /// Hostile texts, and random texts.
    fn texts() -> impl Strategy<Value = String> {
        prop_oneof![
            "[A-Za-z0-9._-]{0,70}",
            "[a-z./\\\\ \u{0}-]{0,12}",
            "(\\.\\./|/|\\./|[a-z]{1,3}/?){1,6}",
            any::<String>(),
            Just("/var/tmp/x".to_owned()),
            Just("..".to_owned()),
            Just(".".to_owned()),
            Just(String::new()),
        ]
    }

    proptest! {
        #[test]
        fn every_id_that_parses_is_a_direct_child(text in texts()) {
            let dir = Path::new("/nas/.packhorse/staging");
            let paths = [
                text.parse::<TransferId>().ok().map(|id| id.in_dir(dir)),
                text.parse::<DeliveryId>().ok().map(|id| id.in_dir(dir)),
                text.parse::<RunId>().ok().map(|id| id.in_dir(dir)),
                text.parse::<WorkId>().ok().map(|id| id.in_dir(dir)),
                text.parse::<RunName>().ok().map(|name| name.in_dir(dir)),
                text.parse::<SiteName>().ok().map(|name| name.in_dir(dir)),
                format!("model/{text}:v1").parse::<ArtifactRef>().ok().map(|artifact| dir.join(artifact.name())),
                format!("model/m:{text}").parse::<ArtifactRef>().ok().map(|artifact| dir.join(artifact.version())),
            ];
            for path in paths.into_iter().flatten() {
                prop_assert!(is_direct_child(dir, &path), "{text:?} resolves to {path:?}");
            }
        }

        #[test]
        fn every_path_that_parses_stays_below_its_directory(text in texts()) {
            let dir = Path::new("/nas/.packhorse/staging/t-1");
            if let Ok(path) = text.parse::<RelPath>() {
                let path = path.in_dir(dir);
                let rest = path.strip_prefix(dir).unwrap();
                prop_assert!(rest.components().count() > 0 && rest.components().all(|c| matches!(c, std::path::Component::Normal(_))));
            }
        }
    }

    #[test]
    fn ids_of_all_earlier_versions_parse_and_hostile_ids_do_not() {
        for good in ["t-1a22aa702013519c0e7", "t-1", "d-x", "a", "9", "T-._-"] {
            assert_eq!(good.parse::<TransferId>().unwrap().to_string(), good);
        }
        assert!(
            TransferId::made(u64::MAX, u32::MAX)
                .parse::<TransferId>()
                .is_ok()
        );
        let long = "a".repeat(65);
        for bad in [
            "",
            ".",
            "..",
            "-t",
            ".t",
            "/t",
            "t/1",
            "t\\1",
            "t 1",
            "t\n",
            "t\0",
            "../t",
            "tä",
            long.as_str(),
        ] {
            let error = bad.parse::<TransferId>().unwrap_err().to_string();
            assert!(
                error.len() < 400 && !error.contains(['\n', '\0']),
                "{error:?}"
            );
        }
    }

    #[test]
    fn lists_of_ids_are_bounded() {
        let ids: WorkIds = "t-1, d-2".parse().unwrap();
        assert_eq!(ids.to_string(), "t-1,d-2");
        assert!(
            vec!["t-1"; IDS_ASKED_MAX]
                .join(",")
                .parse::<WorkIds>()
                .is_ok()
        );
        assert!(
            vec!["t-1"; IDS_ASKED_MAX + 1]
                .join(",")
                .parse::<WorkIds>()
                .is_err()
        );
        assert!("t-1,../x".parse::<WorkIds>().is_err());
    }
}
