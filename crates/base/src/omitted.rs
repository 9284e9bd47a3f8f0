//! The content that a publish leaves out of an artifact: a count for each category, with the first
//! examples.
//!
//! Readers of sources fill an [`Omitted`] while they read (`content::source::Source::omitted`).
//! `publish` returns it, the catalogues of the hub and of the publishing site store it, and `show`
//! lists it. `publish --strict` rejects an input from which content would be left out
//! ([`Omitted::refuse`]), except for categories that the user accepts ([`Accepted`]). This module
//! does no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fault::Fault;
use crate::limits::{
    OMITTED_BAD_RECORDS_MAX, OMITTED_EXAMPLE_CHARS_MAX, OMITTED_EXAMPLES_MAX,
    OMITTED_LINE_CHARS_MAX,
};
use crate::text::is_unsafe;

/// A category of content that is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// Rows of a table that yield no annotation although columns that are not mapped to a field
    /// have values.
    UnknownColumns,
    /// Rows of a table whose box is in columns that are not mapped to a field, so that the
    /// annotation has no box.
    UnreadBoxes,
    /// A label set without annotations.
    NoAnnotations,
    /// Links to directories, which are not followed.
    LinkedFolders,
    /// Tasks of Label Studio that an annotator skipped.
    SkippedTasks,
    /// Predictions of Label Studio, unless the setting `predictions` includes them.
    Predictions,
    /// Members of a label file that contain neither images nor annotations nor classes.
    UnreadMembers,
    /// Files of a label directory that the format does not read.
    UnreadFiles,
    /// Records of labels that are wrong, where `--on-bad skip` leaves them out.
    BadRecords,
    /// Shapes of labels that reached out of their image, where `--on-bad clip` cuts them: a note.
    ClippedShapes,
    /// Images that have the name of another one but for the extension, and so no labels of their
    /// own.
    SameName,
    /// Names in a list of images that no image has.
    UnmatchedNames,
    /// Sample paths that differ from what the records say, by a rule for paths: a note.
    ChangedPaths,
    /// Entries of a directory that patterns exclude: a note.
    Excluded,
    /// How an input was read, if its format was not stated and is ambiguous: a note.
    Inferred,
    /// Platforms that an image index lists without their content.
    Platforms,
    /// Layers of an image that it names by an address, and that the source does not hold.
    ForeignLayers,
    /// The digest that the source states for an image, if the published image has a different one.
    ImageDigest,
    /// Signatures, SBOMs, attestations and other objects that refer to an image.
    Referrers,
    /// Names of an image in its archive or layout, except the first.
    ImageNames,
    /// Modification times of files.
    Times,
    /// Owners and groups, if the entries of a directory have different ones.
    Owners,
    /// The set-user-ID, set-group-ID and sticky bits of files and directories.
    ModeBits,
    /// Hard links between files, which become separate files.
    HardLinks,
    /// Extended attributes of files and directories, including access control lists.
    Xattrs,
    /// A category that a newer peer reported.
    #[serde(other)]
    Other,
}

impl Category {
    /// Every category that a reader counts, in display order.
    pub const ALL: [Self; 25] = [
        Self::UnknownColumns,
        Self::UnreadBoxes,
        Self::NoAnnotations,
        Self::LinkedFolders,
        Self::SkippedTasks,
        Self::Predictions,
        Self::UnreadMembers,
        Self::UnreadFiles,
        Self::BadRecords,
        Self::ClippedShapes,
        Self::SameName,
        Self::UnmatchedNames,
        Self::ChangedPaths,
        Self::Excluded,
        Self::Inferred,
        Self::Platforms,
        Self::ForeignLayers,
        Self::ImageDigest,
        Self::Referrers,
        Self::ImageNames,
        Self::Times,
        Self::Owners,
        Self::ModeBits,
        Self::HardLinks,
        Self::Xattrs,
    ];

    /// The name in JSON and in `--accept-omitted`.
    pub fn name(self) -> &'static str {
        match self {
            Category::UnknownColumns => "unknown_columns",
            Category::UnreadBoxes => "unread_boxes",
            Category::NoAnnotations => "no_annotations",
            Category::LinkedFolders => "linked_folders",
            Category::SkippedTasks => "skipped_tasks",
            Category::Predictions => "predictions",
            Category::UnreadMembers => "unread_members",
            Category::UnreadFiles => "unread_files",
            Category::BadRecords => "bad_records",
            Category::ClippedShapes => "clipped_shapes",
            Category::SameName => "same_name",
            Category::UnmatchedNames => "unmatched_names",
            Category::ChangedPaths => "changed_paths",
            Category::Excluded => "excluded",
            Category::Inferred => "inferred",
            Category::Platforms => "platforms",
            Category::ForeignLayers => "foreign_layers",
            Category::ImageDigest => "image_digest",
            Category::Referrers => "referrers",
            Category::ImageNames => "image_names",
            Category::Times => "times",
            Category::Owners => "owners",
            Category::ModeBits => "mode_bits",
            Category::HardLinks => "hard_links",
            Category::Xattrs => "xattrs",
            Category::Other => "other",
        }
    }

    /// Whether it only reports how the input was read, or what a pattern excludes: `--strict` does
    /// not refuse it.
    pub fn is_note(self) -> bool {
        matches!(
            self,
            Category::ClippedShapes
                | Category::ChangedPaths
                | Category::Excluded
                | Category::Inferred
        )
    }

    /// How many examples are kept. Of bad records, the first of each kind are listed.
    fn examples_max(self) -> usize {
        match self {
            Category::BadRecords => OMITTED_BAD_RECORDS_MAX,
            _ => OMITTED_EXAMPLES_MAX,
        }
    }

    /// The description for people; a count precedes it.
    pub fn words(self) -> &'static str {
        match self {
            Category::UnknownColumns => {
                "row without annotation whose values are in columns that are not mapped to a field"
            }
            Category::UnreadBoxes => "row whose box is in columns that are not mapped to a field",
            Category::NoAnnotations => "label set without annotations",
            Category::LinkedFolders => "link to a directory, which is not followed",
            Category::SkippedTasks => "task that its annotator skipped",
            Category::Predictions => "task whose predictions are not included",
            Category::UnreadMembers => "member of the label file that is not read",
            Category::UnreadFiles => "file that this label format does not read",
            Category::BadRecords => "bad record of the labels",
            Category::ClippedShapes => "shape that reached out of its image and was cut",
            Category::SameName => {
                "image that has the name of another image but for its extension; the labels belong to the other"
            }
            Category::UnmatchedNames => "name in a list of images that no image has",
            Category::ChangedPaths => "sample path that differs from what its record says",
            Category::Excluded => "entry that a pattern excludes",
            Category::Inferred => "way of reading that was inferred",
            Category::Platforms => "platform that is missing from the image",
            Category::ForeignLayers => {
                "layer that the image names by an address and the source does not hold"
            }
            Category::ImageDigest => {
                "image digest in the source that differs from the digest of the published image"
            }
            Category::Referrers => "object that refers to the image (signature, SBOM, attestation)",
            Category::ImageNames => "additional name of the image",
            Category::Times => "modification time",
            Category::Owners => "owner or group that differs from that of the first entry",
            Category::ModeBits => {
                "file or folder whose set-user-ID, set-group-ID or sticky bit is not set at a site"
            }
            Category::HardLinks => "hard link, stored as a separate file",
            Category::Xattrs => "extended attribute",
            Category::Other => "other item",
        }
    }
}

impl FromStr for Category {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|category| category.name() == name)
            .ok_or_else(|| {
                let shown: String = name.chars().take(60).collect();
                format!(
                    "{shown:?} is not a category of omitted content; the categories are {}",
                    names(Self::ALL)
                )
            })
    }
}

fn names(categories: impl IntoIterator<Item = Category>) -> String {
    categories
        .into_iter()
        .map(Category::name)
        .collect::<Vec<_>>()
        .join(",")
}

/// The categories that a user accepts: `--strict` does not reject an input because of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<Category>")]
pub struct Accepted(BTreeSet<Category>);

impl Accepted {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Category> for Accepted {
    fn from_iter<I: IntoIterator<Item = Category>>(categories: I) -> Self {
        Self(categories.into_iter().collect())
    }
}

impl TryFrom<Vec<String>> for Accepted {
    type Error = String;
    fn try_from(names: Vec<String>) -> Result<Self, String> {
        if names.len() > Category::ALL.len() {
            return Err(format!(
                "accept_omitted has {} entries, but there are only {} categories",
                names.len(),
                Category::ALL.len()
            ));
        }
        names.iter().map(|name| name.parse()).collect()
    }
}

impl From<Accepted> for Vec<Category> {
    fn from(accepted: Accepted) -> Self {
        accepted.0.into_iter().collect()
    }
}

/// The content left out in one category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Omission {
    pub what: Category,
    pub count: u64,
    /// The first examples: where each is and what it is.
    pub examples: Vec<String>,
}

impl Omission {
    /// One short line for people: the first example, and more examples if they fit.
    pub fn line(&self) -> String {
        let mut line = format!("{} × {}", self.count, self.what.words());
        let mut shown = 0;
        for example in &self.examples {
            if shown > 0 && line.chars().count() + example.chars().count() > OMITTED_LINE_CHARS_MAX
            {
                break;
            }
            line.push_str(if shown == 0 { ": " } else { "; " });
            line.push_str(example);
            shown += 1;
        }
        if shown > 0 && self.count > shown {
            line.push_str("; …");
        }
        line
    }
}

/// Everything that was left out, by category. Its size is bounded for every input.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Omission>", into = "Vec<Omission>")]
pub struct Omitted(BTreeMap<Category, Counted>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Counted {
    count: u64,
    examples: Vec<String>,
}

impl Omitted {
    /// Counts one item.
    pub fn add(&mut self, what: Category, example: impl Into<String>) {
        self.add_many(what, 1, [example.into()]);
    }

    /// Counts several items of one category; `examples` may name fewer.
    pub fn add_many(
        &mut self,
        what: Category,
        count: u64,
        examples: impl IntoIterator<Item = String>,
    ) {
        if count == 0 {
            return;
        }
        let counted = self.0.entry(what).or_default();
        counted.count = counted.count.saturating_add(count);
        self.add_examples(what, examples);
    }

    /// Adds examples of items that were counted before.
    pub fn add_examples(&mut self, what: Category, examples: impl IntoIterator<Item = String>) {
        let counted = self.0.entry(what).or_default();
        for example in examples {
            if counted.examples.len() == what.examples_max() {
                break;
            }
            let safe = example.chars().map(|c| {
                if is_unsafe(c) {
                    char::REPLACEMENT_CHARACTER
                } else {
                    c
                }
            });
            counted
                .examples
                .push(safe.take(OMITTED_EXAMPLE_CHARS_MAX).collect());
        }
    }

    /// Whether another example of a category would be kept. Check this first if it is expensive to
    /// create an example.
    pub fn wants_example(&self, what: Category) -> bool {
        self.0
            .get(&what)
            .is_none_or(|counted| counted.examples.len() < what.examples_max())
    }

    /// Adds what another reader left out.
    pub fn merge(&mut self, other: Omitted) {
        for (what, Counted { count, examples }) in other.0 {
            self.add_many(what, count, examples);
        }
    }

    /// The same with few examples of each category, for a message to another daemon.
    pub fn brief(&self) -> Self {
        let mut brief = self.clone();
        for counted in brief.0.values_mut() {
            counted.examples.truncate(OMITTED_EXAMPLES_MAX);
        }
        brief
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn count(&self, what: Category) -> u64 {
        self.0.get(&what).map_or(0, |counted| counted.count)
    }

    /// The categories in display order.
    pub fn list(&self) -> Vec<Omission> {
        let all = self.0.iter();
        all.map(|(what, counted)| Omission {
            what: *what,
            count: counted.count,
            examples: counted.examples.clone(),
        })
        .collect()
    }

    /// The check of `--strict`: fails and names each category that was left out and is not
    /// accepted.
    pub fn refuse(&self, accepted: &Accepted) -> Result<(), Fault> {
        let refused: Vec<Omission> = self
            .list()
            .into_iter()
            .filter(|omission| !omission.what.is_note() && !accepted.0.contains(&omission.what))
            .collect();
        if refused.is_empty() {
            return Ok(());
        }
        let lines: Vec<String> = refused
            .iter()
            .map(|omission| format!("{}: {}", omission.what.name(), omission.line()))
            .collect();
        let option: BTreeSet<Category> = accepted
            .0
            .iter()
            .copied()
            .chain(refused.iter().map(|omission| omission.what))
            .collect();
        Err(Fault::integrity(format!(
            "--strict rejects an input that would be published incompletely; left out: {}",
            lines.join(". ")
        ))
        .with_next(format!(
            "correct the input, or accept the omissions: --strict --accept-omitted {}",
            names(option)
        )))
    }
}

impl From<Vec<Omission>> for Omitted {
    fn from(list: Vec<Omission>) -> Self {
        let mut omitted = Self::default();
        for Omission {
            what,
            count,
            examples,
        } in list
        {
            omitted.add_many(what, count, examples);
        }
        omitted
    }
}

impl From<Omitted> for Vec<Omission> {
    fn from(omitted: Omitted) -> Self {
        omitted.list()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_items_are_counted_and_the_first_examples_kept() {
        let mut omitted = Omitted::default();
        omitted.refuse(&Accepted::default()).unwrap();
        for row in 0..1000 {
            omitted.add(Category::UnknownColumns, format!("line {row}"));
        }
        omitted.add(Category::Xattrs, "x".repeat(10_000));
        assert_eq!(omitted.count(Category::UnknownColumns), 1000);
        assert!(
            !omitted.wants_example(Category::UnknownColumns)
                && omitted.wants_example(Category::Times)
        );
        let list = omitted.list();
        assert_eq!(
            (list[0].examples.len(), list[0].examples[0].as_str()),
            (OMITTED_EXAMPLES_MAX, "line 0")
        );
        assert_eq!(list[1].examples[0].len(), OMITTED_EXAMPLE_CHARS_MAX);
        assert!(
            list[0].line().starts_with("1000 × row without annotation")
                && list[0].line().ends_with("; …"),
            "{}",
            list[0].line()
        );
        let fault = omitted.refuse(&Accepted::default()).unwrap_err();
        assert_eq!(fault.code, crate::fault::Code::Integrity);
        assert!(
            fault.message.contains("unknown_columns: 1000 × ")
                && fault.message.contains("xattrs: 1 × extended attribute"),
            "{fault}"
        );
        assert!(
            fault
                .next
                .ends_with("--accept-omitted unknown_columns,xattrs"),
            "{fault:?}"
        );
    }

    #[test]
    fn strict_tolerates_accepted_categories_and_names_the_option_for_the_rest() {
        let mut omitted = Omitted::default();
        omitted.add_many(Category::Times, 3, []);
        omitted.add(Category::HardLinks, "b");
        // A report of how the input was read is never refused.
        omitted.add(Category::Inferred, "a.csv is read as GBK");
        let accepted = |names: &[&str]| {
            Accepted::try_from(
                names
                    .iter()
                    .map(|name| (*name).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        let fault = omitted
            .refuse(&accepted(&["times", "xattrs"]).unwrap())
            .unwrap_err();
        assert!(
            !fault.message.contains("modification time")
                && fault.message.contains("hard_links: 1 × "),
            "{fault}"
        );
        assert!(
            fault
                .next
                .ends_with("--accept-omitted times,hard_links,xattrs"),
            "{fault:?}"
        );
        omitted
            .refuse(&accepted(&["hard_links", "times"]).unwrap())
            .unwrap();
        for unknown in ["dreams", "other", "Times", ""] {
            let why = accepted(&["times", unknown]).unwrap_err();
            assert!(
                why.contains(&format!("{unknown:?}")) && why.contains("hard_links,xattrs"),
                "{why}"
            );
        }
        assert!(accepted(&["times"; Category::ALL.len() + 1]).is_err());
    }

    #[test]
    fn the_name_of_every_category_equals_its_json_name() {
        assert_eq!(
            Category::ALL.len(),
            Category::Other as usize,
            "ALL has every category but the last"
        );
        assert!(Category::ALL.windows(2).all(|two| two[0] < two[1]));
        for category in Category::ALL {
            assert_eq!(serde_json::to_value(category).unwrap(), category.name());
            assert_eq!(category.name().parse(), Ok(category));
        }
        let accepted: Accepted = Category::ALL.into_iter().collect();
        let text = serde_json::to_string(&accepted).unwrap();
        assert_eq!(serde_json::from_str::<Accepted>(&text).unwrap(), accepted);
    }

    #[test]
    fn a_line_for_people_is_short() {
        let mut omitted = Omitted::default();
        for example in ["a".repeat(150), "b".repeat(150), "c".to_owned()] {
            omitted.add(Category::Xattrs, example);
        }
        let line = omitted.list()[0].line();
        assert!(
            line.contains("aaa") && !line.contains("bbb") && line.ends_with("; …"),
            "{line}"
        );
    }

    #[test]
    fn omissions_from_a_peer_are_bounded_and_may_have_unknown_categories() {
        let examples: Vec<String> = (0..100)
            .map(|n| format!("{n} {}", "y".repeat(1000)))
            .collect();
        let list = serde_json::json!([
            {"what": "times", "count": 3, "examples": examples},
            {"what": "dreams", "count": 2, "examples": []},
            {"what": "visions", "count": u64::MAX, "examples": []},
        ]);
        let omitted: Omitted = serde_json::from_value(list).unwrap();
        assert_eq!(
            (
                omitted.count(Category::Times),
                omitted.count(Category::Other)
            ),
            (3, u64::MAX)
        );
        let text = serde_json::to_string(&omitted).unwrap();
        assert!(
            text.len() < 2 * OMITTED_EXAMPLES_MAX * OMITTED_EXAMPLE_CHARS_MAX,
            "{}",
            text.len()
        );
        assert_eq!(serde_json::from_str::<Omitted>(&text).unwrap(), omitted);
    }
}
