//! Artifacts: how they are listed, and the requests to publish, verify, pin, export and import
//! them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{ModelLineage, Transfer};
use base::names::{ArtifactRef, SiteName};
use base::omitted::{Accepted, Category, Omission};

/// One artifact, as `artifacts` and `show` list it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Artifact {
    /// `kind/name:version`.
    #[schema(value_type = String)]
    pub artifact: ArtifactRef,
    /// The BLAKE3 hash of its root manifest, hex.
    pub digest: String,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Files.
    pub files: u64,
    /// The site that holds its bytes; absent when the hub holds them.
    #[schema(value_type = Option<String>)]
    pub origin: Option<SiteName>,
    /// When it was published.
    pub created_at: String,
    /// Information of its kind: the image's `sha256:` digest and platforms, the labels' dataset and
    /// counts.
    #[schema(value_type = Object)]
    pub info: serde_json::Value,
    /// Its location on this daemon's sinks (at a site), if any.
    pub location: Option<String>,
    /// Whether the hub keeps its relayed bytes at any age.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// How its content changed where it was published in place, at its origin or at this site: the
    /// first path and the reason. Absent: unchanged as far as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<String>,
    /// Whether it was published at this site: no other daemon can restore it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub published_here: bool,
    /// Omissions of its publish, by category. Sites that received the artifact do not know them.
    #[serde(default)]
    pub omitted: Vec<Omission>,
}

/// One artifact with its transfers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ArtifactDetail {
    /// The artifact.
    #[serde(flatten)]
    pub artifact: Artifact,
    /// Its transfers.
    pub transfers: Vec<Transfer>,
    /// Its lineage, for a model of a training run.
    #[serde(default)]
    pub lineage: Option<ModelLineage>,
}

/// The selection of an artifact.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ShowQuery {
    /// `kind/name:version`.
    #[serde(rename = "ref")]
    #[param(rename = "ref")]
    pub artifact: String,
}

/// A request to publish.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishRequest {
    /// An absolute path as the daemon sees it, or `registry://host/repo:tag`.
    pub source: String,
    /// `kind/name:version`.
    #[serde(rename = "as")]
    pub as_ref: String,
    /// Sites that it is delivered to at once.
    #[serde(default)]
    pub to: Option<String>,
    /// The training run that created it (at a site).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// How to read the source.
    #[serde(default)]
    pub options: SourceOptions,
}

/// How to read a source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// Labels: `coco`, `csv`, `cvat`, `datumaro`, `jsonl`, `klarf`, `label_studio`, `labelme`,
    /// `masks`, `via`, `voc`, `yolo`; detected when absent.
    pub format: Option<String>,
    /// Labels: their dataset version.
    #[serde(rename = "for")]
    pub for_dataset: Option<String>,
    /// Labels: accept samples that the dataset lacks.
    pub allow_missing: bool,
    /// Labels from CSV or JSON Lines: the meaning of columns (`sample_path=image,class=defect`).
    pub columns: BTreeMap<String, String>,
    /// Labels from Pascal VOC: how boxes count, `0`, `1`, `0-inclusive` or `1-exclusive`; inferred
    /// if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub voc_base: Option<String>,
    /// Labels: `refuse`, `skip` or `clip` bad records; refused if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_bad: Option<String>,
    /// Labels: a new file for the bad records, as JSON Lines; an absolute path as the daemon sees
    /// it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bad_out: Option<String>,
    /// Labels: the encoding of the text, such as `gbk`; inferred if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// Labels from KLARF: how many micrometres a pixel is wide. Rows have no boxes if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub klarf_scale: Option<String>,
    /// Files: patterns of entries that are left out, in the syntax of gitignore.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Files: publish what links lead to, in the place of the links.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub copy_links: bool,
    /// Files: how many seconds each file must have stayed unchanged before it is read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settle_seconds: Option<u64>,
    /// Files: the encoding of names that are not UTF-8, such as `gbk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name_encoding: Option<String>,
    /// Files: leave the modification times out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_times: bool,
    /// Files: publish the extended attributes of users.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub xattrs: bool,
    /// Files: publish several names of one file as one file.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub hard_links: bool,
    /// Images: the repository at the destination; the artifact's name if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    /// Images: the tag at the destination; the artifact's version if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Images: the platforms that are kept, such as `linux/amd64`; all if empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub platforms: Vec<String>,
    /// Images from `docker save`: compress the layers.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub compress: bool,
    /// Images: leave out what refers to the image (signatures, attestations, SBOMs).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_referrers: bool,
    /// Refuse an input with omissions.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub strict: bool,
    /// Categories of [`Published::omitted`] that `strict` does not refuse.
    #[serde(skip_serializing_if = "Accepted::is_empty")]
    #[schema(value_type = Vec<Category>)]
    pub accept_omitted: Accepted,
    /// Refused by a daemon, which takes a registry's user from its configuration,
    /// `[registry."HOST"]`.
    pub username: Option<String>,
    /// Refused by a daemon, which takes a registry's password file from its configuration.
    pub password_file: Option<String>,
    /// Refused by a daemon, which takes the certificates for a registry from its configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<String>,
    /// Refused by a daemon, which takes the hosts that may receive a registry's password from its
    /// configuration.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub realm_hosts: Vec<String>,
    /// Refused by a daemon, which takes insecure registries from its configuration.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub insecure: bool,
}

/// The result of a publish.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Published {
    /// `kind/name:version`.
    pub artifact: String,
    /// Its digest, hex.
    pub digest: String,
    /// Ids of the transfers that this started or that existed.
    pub transfers: Vec<String>,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Bytes that are new in the store, as stored.
    pub stored: u64,
    /// Whether the same content was already published under this reference.
    pub unchanged: bool,
    /// A note: at a site, that the hub has not confirmed it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Omissions, by category.
    #[serde(default)]
    pub omitted: Vec<Omission>,
}

/// A request to verify.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// `kind/name:version`.
    pub artifact: String,
    /// Whether to fetch damaged content again.
    #[serde(default)]
    pub repair: bool,
    /// Compare names and sizes only, and read no content.
    #[serde(default)]
    pub quick: bool,
}

/// A request to keep an artifact's relayed bytes at any age, or to end that.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// `kind/name:version`.
    pub artifact: String,
    /// Whether they stay.
    pub pinned: bool,
}

/// A request to export.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// `kind/name:version`, one or more.
    pub artifacts: Vec<String>,
    /// The absolute path of the file to write, as the daemon sees it.
    pub out: String,
}

/// A request to export labels.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportLabelsRequest {
    /// `labels/name:version`.
    pub artifact: String,
    /// `coco`, `yolo`, `voc` or `csv`.
    pub format: String,
    /// The absolute path of the directory to write, as the daemon sees it. It must not exist.
    pub out: String,
}

/// A request to import.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// The absolute path of an exported file, as the daemon sees it.
    pub file: String,
}
