//! What is wrong with the labels that are read: the first offenders, and how many there are for
//! each reason.
//!
//! A format reader reports a bad record here and goes on with the next one, so that one run of the
//! command names all that has to be mended. Nothing is published while there is one.

use std::collections::BTreeMap;
use std::fmt::Display;

use base::fault::Fault;
use base::limits::{OFFENDERS_LISTED_MAX, OMITTED_EXAMPLES_MAX};
use base::omitted::{Category, Omitted};

/// Why a record was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Why {
    /// Not the syntax of its format.
    Malformed,
    /// The syntax is right, but a field is missing or of another type.
    Shape,
    NotFinite,
    EmptyBox,
    OutsideImage,
    UnknownClass,
    DuplicateAnnotation,
    DuplicateImage,
    DuplicateSample,
    DuplicateClass,
    /// No number is left for a class that comes by name.
    ClassIds,
    Orphan,
    Nul,
    Utf8,
    TooDeep,
    TooLarge,
    ColumnDrift,
    NoSize,
    BadPath,
    /// Two records say different things of one sample.
    Conflict,
    /// The sample is not in the dataset that the labels are bound to.
    MissingSample,
}

impl Why {
    /// The reason in the message, and what to do about it.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Why::Malformed => (
                "malformed",
                "correct the syntax of these records, or export them again",
            ),
            Why::Shape => (
                "wrong shape",
                "give the fields named the type that the format asks for",
            ),
            Why::NotFinite => (
                "not a finite number",
                "replace NaN and infinite numbers, or drop those annotations",
            ),
            Why::EmptyBox => (
                "zero or negative box",
                "drop those boxes or give them a width and a height above zero",
            ),
            Why::OutsideImage => (
                "box outside its image",
                "clip those boxes to the image, or correct the image's size; one pixel over is allowed",
            ),
            Why::UnknownClass => (
                "unknown class",
                "add the class to the list of classes, or correct the annotations",
            ),
            Why::DuplicateAnnotation => (
                "duplicate annotation id",
                "give each annotation an id of its own; where a table's id means something else, map id to nothing",
            ),
            Why::DuplicateImage => ("duplicate image id", "give each image an id of its own"),
            Why::DuplicateSample => ("duplicate image path", "name each image once"),
            Why::DuplicateClass => (
                "duplicate class",
                "give each class one id and a name of its own",
            ),
            Why::ClassIds => (
                "class ids used up",
                "name all classes by id or all by name, or use smaller ids",
            ),
            Why::Orphan => (
                "orphan annotation",
                "add the image that the annotation names, or drop the annotation",
            ),
            Why::Nul => (
                "NUL in text",
                "remove the NUL characters: databases cannot hold them",
            ),
            Why::Utf8 => (
                "invalid UTF-8",
                "name the encoding of the text by --encoding (for Chinese mostly gbk), or convert the file to UTF-8",
            ),
            Why::TooDeep => ("nested too deep", "flatten the records named"),
            Why::TooLarge => (
                "record too large",
                "split the records named, or keep masks in files beside the images",
            ),
            Why::ColumnDrift => (
                "column count differs from the header's",
                "quote cells that hold the delimiter, and give each row every column",
            ),
            Why::NoSize => (
                "image size unknown",
                "put the images beside the labels, or add a sizes.csv with the columns path,width,height to the folder",
            ),
            Why::BadPath => (
                "path not allowed",
                "use relative paths as in the dataset; the setting path_strip takes a leading part away",
            ),
            Why::Conflict => (
                "records contradict each other",
                "give each image one size and one split",
            ),
            Why::MissingSample => (
                "sample not in the dataset",
                "publish the dataset version that has them, set path_prefix or path_strip so that the paths fit, or use --allow-missing",
            ),
        }
    }

    /// What to do about it.
    pub(super) fn advice(self) -> &'static str {
        self.words().1
    }
}

/// What is done with records that are wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum OnBad {
    /// The whole input is refused.
    #[default]
    Refuse,
    /// They are left out, counted and reported.
    Skip,
    /// Shapes that reach out of their image are cut at its edges; other bad records are left out.
    Clip,
}

impl std::str::FromStr for OnBad {
    type Err = Fault;
    fn from_str(word: &str) -> Result<Self, Fault> {
        match word {
            "refuse" => Ok(OnBad::Refuse),
            "skip" => Ok(OnBad::Skip),
            "clip" => Ok(OnBad::Clip),
            other => Err(Fault::usage(format!(
                "--on-bad is refuse, skip or clip, not {other:?}"
            ))),
        }
    }
}

/// The offenders so far.
#[derive(Default)]
pub(super) struct Refusals {
    pub(super) on_bad: OnBad,
    /// The first offenders of each reason, where they are left out.
    skipped: BTreeMap<Why, Vec<String>>,
    totals: BTreeMap<Why, u64>,
    listed: Vec<String>,
}

impl Refusals {
    /// Notes one offender: where it stands (file and record) and what exactly is wrong with it.
    pub(super) fn add(&mut self, why: Why, place: impl Display, detail: impl Display) {
        *self.totals.entry(why).or_default() += 1;
        if self.on_bad != OnBad::Refuse {
            let first = self.skipped.entry(why).or_default();
            if first.len() < OMITTED_EXAMPLES_MAX {
                first.push(format!("{place}: {detail}").chars().take(400).collect());
            }
        }
        if self.listed.len() < OFFENDERS_LISTED_MAX {
            // A hostile record may put megabytes into a name; a message may not.
            let line: String = format!("{place}: {detail}").chars().take(400).collect();
            self.listed.push(line);
        }
    }

    /// Ends with a fault when there is an offender.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let total: u64 = self.totals.values().sum();
        if total == 0 || self.on_bad != OnBad::Refuse {
            return Ok(());
        }
        let mut reasons: Vec<(Why, u64)> = self.totals.iter().map(|(why, n)| (*why, *n)).collect();
        reasons.sort_by_key(|(why, n)| (std::cmp::Reverse(*n), *why));
        let counts: Vec<String> = reasons
            .iter()
            .map(|(why, n)| format!("{n} × {}", why.words().0))
            .collect();
        let advice: Vec<&str> = reasons
            .iter()
            .take(3)
            .map(|(why, _)| why.advice())
            .collect();
        let records = if total == 1 { "record" } else { "records" };
        let mut message = format!(
            "{total} {records} refused ({}): {}",
            counts.join(", "),
            self.listed.join("; ")
        );
        let unlisted = total - self.listed.len() as u64;
        if unlisted > 0 {
            message.push_str(&format!("; and {unlisted} more"));
        }
        Err(Fault::integrity(message).with_next(advice.join("; ")))
    }

    /// Reports what was left out: how many of each reason, and the first of each.
    pub(super) fn report(&self, omitted: &mut Omitted) {
        if self.on_bad == OnBad::Refuse {
            return;
        }
        for (why, count) in &self.totals {
            let first = self.skipped.get(why).and_then(|first| first.first());
            let example = format!(
                "{count} × {}, the first at {}",
                why.words().0,
                first.map_or("an unknown place", String::as_str)
            );
            omitted.add_many(Category::BadRecords, *count, [example]);
        }
    }

    #[cfg(test)]
    pub(super) fn count(&self, why: Why) -> u64 {
        self.totals.get(&why).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_the_first_and_counts_all() {
        let mut refusals = Refusals::default();
        assert!(refusals.check().is_ok());
        for n in 0..30 {
            refusals.add(Why::EmptyBox, format!("annotations[{n}]"), "the box is 0x4");
        }
        refusals.add(Why::Nul, "annotations[30]", "it holds a NUL");
        assert_eq!(refusals.count(Why::Nul), 1);
        let fault = refusals.check().unwrap_err();
        assert!(
            fault.message.starts_with("31 records refused (30 × zero or negative box, 1 × NUL in text): annotations[0]: the box is 0x4; ")
        );
        assert!(
            fault
                .message
                .ends_with("annotations[19]: the box is 0x4; and 11 more"),
            "{}",
            fault.message
        );
        assert!(
            fault.next.contains("above zero; remove the NUL"),
            "{}",
            fault.next
        );
    }
}
