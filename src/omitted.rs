//! What a publish leaves out of an artifact: counted by category, with the first examples of each.
//!
//! Readers of sources fill an [`Omitted`] while they read ([`crate::source::Source::omitted`]). `publish` answers with it, the
//! catalogues of the hub and of the site where it was published keep it, `show` lists it, and `publish --strict` refuses an
//! input from which something would be left out ([`Omitted::refuse`]). Nothing here does I/O.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fault::Fault;
use crate::limits::{OMITTED_EXAMPLE_CHARS_MAX, OMITTED_EXAMPLES_MAX};
use crate::text::is_unsafe;

/// A kind of content that is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// Rows of a table that yield no annotation although columns that no field reads have values.
    UnknownColumns,
    /// Rows of a table whose box stands in columns that no field reads, so that the annotation has no box.
    UnreadBoxes,
    /// A label set without a single annotation.
    NoAnnotations,
    /// Links to folders, which are not followed.
    LinkedFolders,
    /// Tasks of Label Studio that an annotator skipped.
    SkippedTasks,
    /// Predictions of Label Studio, unless the setting `predictions` takes them.
    Predictions,
    /// Members of a label file that hold neither images nor annotations nor classes.
    UnreadMembers,
    /// Files of a label folder that the format does not read.
    UnreadFiles,
    /// Platforms that an image index lists and whose content is absent.
    Platforms,
    /// Signatures, SBOMs and other objects that refer to an image.
    Referrers,
    /// Modification times.
    Times,
    /// Owners and groups.
    Owners,
    /// Hard links between files, which become separate files.
    HardLinks,
    /// Extended attributes, access control lists among them.
    Xattrs,
    /// A category that a newer peer reported.
    #[serde(other)]
    Other,
}

impl Category {
    /// What was left out, for people; a count stands before it.
    pub fn words(self) -> &'static str {
        match self {
            Category::UnknownColumns => "row without annotation whose values stand in columns that no field reads",
            Category::UnreadBoxes => "row whose box stands in columns that no field reads",
            Category::NoAnnotations => "label set without annotations",
            Category::LinkedFolders => "link to a folder, which is not followed",
            Category::SkippedTasks => "task that its annotator skipped",
            Category::Predictions => "task whose predictions are not taken",
            Category::UnreadMembers => "member of the label file that is not read",
            Category::UnreadFiles => "file that this label format does not read",
            Category::Platforms => "platform of the image that is absent",
            Category::Referrers => "object that refers to the image (signature, SBOM)",
            Category::Times => "modification time",
            Category::Owners => "owner or group",
            Category::HardLinks => "hard link, stored as a separate file",
            Category::Xattrs => "extended attribute",
            Category::Other => "other item",
        }
    }
}

/// What was left out of one category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Omission {
    /// The category.
    pub what: Category,
    /// How many items.
    pub count: u64,
    /// The first of them: where it is and what it is.
    pub examples: Vec<String>,
}

impl Omission {
    /// One line for people.
    pub fn line(&self) -> String {
        let mut line = format!("{} × {}", self.count, self.what.words());
        if !self.examples.is_empty() {
            line.push_str(": ");
            line.push_str(&self.examples.join("; "));
        }
        if self.count > self.examples.len() as u64 && !self.examples.is_empty() {
            line.push_str("; …");
        }
        line
    }
}

/// Everything that was left out, by category. Its size is bounded, whatever the input holds.
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
    pub fn add_many(&mut self, what: Category, count: u64, examples: impl IntoIterator<Item = String>) {
        if count == 0 {
            return;
        }
        let counted = self.0.entry(what).or_default();
        counted.count = counted.count.saturating_add(count);
        for example in examples {
            if counted.examples.len() == OMITTED_EXAMPLES_MAX {
                break;
            }
            let safe = example.chars().map(|c| if is_unsafe(c) { char::REPLACEMENT_CHARACTER } else { c });
            counted.examples.push(safe.take(OMITTED_EXAMPLE_CHARS_MAX).collect());
        }
    }

    /// Counts whether another example of a category would be kept: forming one may cost more than counting.
    pub fn wants_example(&self, what: Category) -> bool {
        self.0.get(&what).is_none_or(|counted| counted.examples.len() < OMITTED_EXAMPLES_MAX)
    }

    /// Adds what another reader left out.
    pub fn merge(&mut self, other: Omitted) {
        for (what, Counted { count, examples }) in other.0 {
            self.add_many(what, count, examples);
        }
    }

    /// Whether nothing was left out.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many items of a category were left out.
    pub fn count(&self, what: Category) -> u64 {
        self.0.get(&what).map_or(0, |counted| counted.count)
    }

    /// The categories, in their order.
    pub fn list(&self) -> Vec<Omission> {
        let all = self.0.iter();
        all.map(|(what, counted)| Omission { what: *what, count: counted.count, examples: counted.examples.clone() }).collect()
    }

    /// What `--strict` does with it: a fault that names all of it, unless nothing was left out.
    pub fn refuse(&self) -> Result<(), Fault> {
        if self.is_empty() {
            return Ok(());
        }
        let lines: Vec<String> = self.list().iter().map(Omission::line).collect();
        Err(Fault::integrity(format!("--strict refuses an input that is not published as a whole; left out: {}", lines.join("; ")))
            .with_next("correct the input, or publish without --strict"))
    }
}

impl From<Vec<Omission>> for Omitted {
    fn from(list: Vec<Omission>) -> Self {
        let mut omitted = Self::default();
        for Omission { what, count, examples } in list {
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
    fn it_counts_all_and_keeps_the_first_examples() {
        let mut omitted = Omitted::default();
        omitted.refuse().unwrap();
        for row in 0..1000 {
            omitted.add(Category::UnknownColumns, format!("line {row}"));
        }
        omitted.add(Category::Xattrs, "x".repeat(10_000));
        assert_eq!(omitted.count(Category::UnknownColumns), 1000);
        assert!(!omitted.wants_example(Category::UnknownColumns) && omitted.wants_example(Category::Times));
        let list = omitted.list();
        assert_eq!((list[0].examples.len(), list[0].examples[0].as_str()), (OMITTED_EXAMPLES_MAX, "line 0"));
        assert_eq!(list[1].examples[0].len(), OMITTED_EXAMPLE_CHARS_MAX);
        assert!(list[0].line().starts_with("1000 × row without annotation") && list[0].line().ends_with("; …"), "{}", list[0].line());
        let fault = omitted.refuse().unwrap_err();
        assert_eq!(fault.code, crate::fault::Code::Integrity);
        assert!(fault.message.contains("1000 × ") && fault.message.contains("1 × extended attribute"), "{fault}");
    }

    #[test]
    fn what_a_peer_sends_is_bounded_and_may_be_newer() {
        let examples: Vec<String> = (0..100).map(|n| format!("{n} {}", "y".repeat(1000))).collect();
        let list = serde_json::json!([
            {"what": "times", "count": 3, "examples": examples},
            {"what": "dreams", "count": 2, "examples": []},
            {"what": "visions", "count": u64::MAX, "examples": []},
        ]);
        let omitted: Omitted = serde_json::from_value(list).unwrap();
        assert_eq!((omitted.count(Category::Times), omitted.count(Category::Other)), (3, u64::MAX));
        let text = serde_json::to_string(&omitted).unwrap();
        assert!(text.len() < 2 * OMITTED_EXAMPLES_MAX * OMITTED_EXAMPLE_CHARS_MAX, "{}", text.len());
        assert_eq!(serde_json::from_str::<Omitted>(&text).unwrap(), omitted);
    }
}
