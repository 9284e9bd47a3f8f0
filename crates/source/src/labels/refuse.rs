//! What is wrong with the labels that are read: how many records for each reason, the first twenty
//! of each, and all of them in a file where the user asks for one (`bad_out`).
//!
//! A format reader reports a bad record here and continues with the next one, so that one run of
//! the command names everything that has to be corrected. Unless the user asks to leave bad
//! records out, nothing is published while there is one.

use std::collections::BTreeMap;
use std::fmt::Display;

use base::fault::Fault;
use base::limits::{LABEL_BAD_DETAIL_CHARS_MAX, OFFENDERS_LISTED_MAX};
use base::omitted::{Category, Omitted};

use super::bad_out::BadOut;

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
    kinds: BTreeMap<Why, Kind>,
    /// Where all of them are written.
    pub(super) out: Option<BadOut>,
}

/// The offenders of one reason.
#[derive(Default)]
struct Kind {
    count: u64,
    /// The first of them.
    first: Vec<String>,
}

impl Refusals {
    /// Notes one offender: where it stands (file and record) and what exactly is wrong with it.
    pub(super) fn add(&mut self, why: Why, place: impl Display, detail: impl Display) {
        self.add_record(why, place, detail, None);
    }

    /// The same with the record itself, as JSON.
    pub(super) fn add_record(
        &mut self,
        why: Why,
        place: impl Display,
        detail: impl Display,
        record: Option<&str>,
    ) {
        let kind = self.kinds.entry(why).or_default();
        kind.count += 1;
        let listed = kind.first.len() < OFFENDERS_LISTED_MAX;
        if !listed && self.out.is_none() {
            return;
        }
        // A hostile record may put megabytes into a name; a message may not.
        let cut = |text: String| -> String {
            match text.char_indices().nth(LABEL_BAD_DETAIL_CHARS_MAX) {
                Some((end, _)) => text[..end].to_owned(),
                None => text,
            }
        };
        let (place, detail) = (cut(place.to_string()), cut(detail.to_string()));
        if let Some(out) = &mut self.out {
            out.write(why.words().0, &place, &detail, record);
        }
        if listed {
            kind.first.push(cut(format!("{place}: {detail}")));
        }
    }

    /// The reasons with their offenders, the most frequent first.
    fn by_count(&self) -> Vec<(Why, &Kind)> {
        let mut kinds: Vec<(Why, &Kind)> =
            self.kinds.iter().map(|(why, kind)| (*why, kind)).collect();
        kinds.sort_by_key(|(why, kind)| (std::cmp::Reverse(kind.count), *why));
        kinds
    }

    /// Ends with a fault when there is an offender and offenders are refused. The file of bad
    /// records is completed in any case.
    pub(super) fn check(&mut self) -> Result<(), Fault> {
        let written = match self.out.take() {
            Some(out) => out.finish()?,
            None => None,
        };
        let total: u64 = self.kinds.values().map(|kind| kind.count).sum();
        if total == 0 || self.on_bad != OnBad::Refuse {
            return Ok(());
        }
        let kinds = self.by_count();
        let counts: Vec<String> = kinds
            .iter()
            .map(|(why, kind)| format!("{} × {}", kind.count, why.words().0))
            .collect();
        let listed = kinds.iter().map(|(_, kind)| {
            let mut list = kind.first.join("; ");
            let unlisted = kind.count - kind.first.len() as u64;
            if unlisted > 0 {
                list.push_str(&format!("; and {unlisted} more"));
            }
            list
        });
        let records = if total == 1 { "record" } else { "records" };
        let mut message = format!(
            "{total} {records} refused ({}): {}",
            counts.join(", "),
            listed.collect::<Vec<_>>().join("; ")
        );
        if let Some(file) = written {
            message.push_str(&format!("; all of them are in {}", file.display()));
        }
        let advice: Vec<&str> = kinds.iter().take(3).map(|(why, _)| why.advice()).collect();
        Err(Fault::integrity(message).with_next(advice.join("; ")))
    }

    /// Reports what was left out: how many of each reason, and the first of each.
    pub(super) fn report(&self, omitted: &mut Omitted) {
        if self.on_bad == OnBad::Refuse {
            return;
        }
        // The counts come first: a reader of an earlier version keeps only a few examples.
        for (why, kind) in &self.kinds {
            let first = kind.first.first();
            let example = format!(
                "{} × {}, the first at {}",
                kind.count,
                why.words().0,
                first.map_or("an unknown place", String::as_str)
            );
            omitted.add_many(Category::BadRecords, kind.count, [example]);
        }
        for (why, kind) in &self.kinds {
            let further = kind.first.iter().skip(1);
            let lines = further.map(|line| format!("{}: {line}", why.words().0));
            omitted.add_examples(Category::BadRecords, lines);
        }
    }

    #[cfg(test)]
    pub(super) fn count(&self, why: Why) -> u64 {
        self.kinds.get(&why).map_or(0, |kind| kind.count)
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
            fault.message.ends_with(
                "annotations[19]: the box is 0x4; and 10 more; annotations[30]: it holds a NUL"
            ),
            "{}",
            fault.message
        );
        assert!(
            fault.next.contains("above zero; remove the NUL"),
            "{}",
            fault.next
        );
        // The same where they are left out.
        refusals.on_bad = OnBad::Skip;
        refusals.check().unwrap();
        let mut omitted = Omitted::default();
        refusals.report(&mut omitted);
        let list = omitted.list();
        assert_eq!(
            (list.len(), list[0].count, list[0].examples.len()),
            (1, 31, 21)
        );
        assert_eq!(
            list[0].examples[..3],
            [
                "30 × zero or negative box, the first at annotations[0]: the box is 0x4",
                "1 × NUL in text, the first at annotations[30]: it holds a NUL",
                "zero or negative box: annotations[1]: the box is 0x4",
            ]
        );
        // What goes to the hub has a few of them.
        assert_eq!(omitted.brief().list()[0].examples.len(), 5);
        assert_eq!(omitted.brief().count(Category::BadRecords), 31);
    }
}
