//! Which pixel the numbers of a Pascal VOC box count from, and whether its right and lower edge
//! belong to the box.
//!
//! The development kit counts from 1 and includes both ends. Most annotation tools write the same
//! file with other numbers: labelImg, CVAT, Label Studio and others count from 0 and write `x +
//! width`. Nothing in the file says which, so without the setting it is inferred from who wrote the
//! file and from the numbers of all its files ([`Evidence`]).

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

use base::fault::Fault;

use super::collect::Extent;

/// How the numbers of a box are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VocBase {
    /// The first pixel is 1, not 0.
    from_one: bool,
    /// `xmax` and `ymax` belong to the box.
    inclusive: bool,
}

impl VocBase {
    /// As the development kit writes them.
    const KIT: Self = Self {
        from_one: true,
        inclusive: true,
    };
    /// As most tools write them.
    const TOOLS: Self = Self {
        from_one: false,
        inclusive: false,
    };

    /// The box from its edges: left, top, right, bottom.
    pub(super) fn extent(self, [left, top, right, bottom]: [f64; 4]) -> Extent {
        let extra = f64::from(u8::from(self.inclusive));
        Extent::Box {
            x: self.position(left),
            y: self.position(top),
            w: right - left + extra,
            h: bottom - top + extra,
        }
    }

    /// A position counted from 0.
    pub(super) fn position(self, number: f64) -> f64 {
        number - f64::from(u8::from(self.from_one))
    }
}

impl fmt::Display for VocBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ends = if self.inclusive {
            "inclusive"
        } else {
            "exclusive"
        };
        write!(f, "{}-{ends}", u8::from(self.from_one))
    }
}

impl FromStr for VocBase {
    type Err = Fault;
    fn from_str(word: &str) -> Result<Self, Fault> {
        Ok(match word {
            "0" | "0-exclusive" => Self::TOOLS,
            "1" | "1-inclusive" => Self::KIT,
            "0-inclusive" => Self {
                from_one: false,
                inclusive: true,
            },
            "1-exclusive" => Self {
                from_one: true,
                inclusive: false,
            },
            other => {
                return Err(Fault::usage(format!("there is no base {other:?} of Pascal VOC boxes")).with_next(
                    "name 0 (0-exclusive), 1 (1-inclusive), 0-inclusive or 1-exclusive: the number of the first pixel, and whether xmax belongs to the box",
                ));
            }
        })
    }
}

/// The database that files of our own export name as their source.
pub(super) const OWN_DATABASE: &str = "packhorse";

/// Who wrote a file, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Writer {
    /// The file names no source: the format's own definition holds.
    Unnamed,
    /// The development kit's database.
    Kit,
    /// Roboflow and its library supervision, which count from 1.
    Roboflow,
    /// An export of this program, whose base is known.
    Own,
    /// Any other tool.
    Tool,
}

impl Writer {
    /// Who wrote this annotation.
    pub(super) fn of(annotation: &Value) -> Self {
        let text = |value: Option<&Value>| {
            value
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_ascii_lowercase()
        };
        let source = annotation.get("source");
        let database = text(source.and_then(|source| source.get("database")));
        match database.as_str() {
            OWN_DATABASE => Writer::Own,
            kit if kit.starts_with("the voc") || kit.starts_with("pascal voc") => Writer::Kit,
            roboflow if roboflow.contains("roboflow") => Writer::Roboflow,
            // The kit's files have no <path>: labelImg and what came after it write one.
            _ if source.is_some() || annotation.get("path").is_some() => Writer::Tool,
            _ => Writer::Unnamed,
        }
    }

    fn base(self) -> (VocBase, &'static str) {
        match self {
            Writer::Unnamed => (
                VocBase::KIT,
                "the files name no tool, and no number says otherwise",
            ),
            Writer::Kit => (
                VocBase::KIT,
                "the files name the VOC development kit's database",
            ),
            Writer::Roboflow => (VocBase::KIT, "the files name Roboflow"),
            Writer::Own => (VocBase::TOOLS, "the files are an export of packhorse"),
            Writer::Tool => (
                VocBase::TOOLS,
                "the files are of an annotation tool, not of the VOC development kit",
            ),
        }
    }
}

/// What the numbers of all boxes of one writer say.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Evidence {
    boxes: u64,
    /// A box begins before 1: no file that counts from 1 has that.
    zero: bool,
    /// A number has a fraction.
    fraction: bool,
    /// A box ends at the image's width or height.
    at_size: bool,
    /// A box ends one pixel behind that.
    beyond: bool,
    /// A box from 0 to one pixel before the image's width or height: the whole side, if ends are
    /// inclusive.
    whole_side: bool,
}

impl Evidence {
    /// Takes a box and the size of its image into account.
    pub(super) fn add(&mut self, edges: [f64; 4], size: [Option<i64>; 2]) {
        self.boxes += 1;
        self.fraction |= edges.iter().any(|n| n.fract() != 0.0);
        let [left, top, right, bottom] = edges;
        for (start, end, size) in [(left, right, size[0]), (top, bottom, size[1])] {
            self.zero |= start < 1.0;
            let Some(size) = size else { continue };
            let size = size as f64;
            self.at_size |= end == size;
            self.beyond |= end == size + 1.0;
            self.whole_side |= start == 0.0 && end == size - 1.0;
        }
    }

    /// How many boxes were seen.
    pub(super) fn boxes(&self) -> u64 {
        self.boxes
    }

    /// What follows from the numbers and from who wrote them, and why.
    pub(super) fn infer(&self, writer: Writer) -> (VocBase, &'static str) {
        let inclusive = self.whole_side && !self.at_size;
        let counts_from_one = matches!(writer, Writer::Unnamed | Writer::Roboflow);
        match () {
            () if writer == Writer::Own => writer.base(),
            () if self.zero && inclusive => (
                VocBase {
                    from_one: false,
                    inclusive,
                },
                "a box begins at 0, and boxes over a whole side end at its size less 1",
            ),
            () if self.zero => (VocBase::TOOLS, "a box begins at 0"),
            () if self.fraction && writer != Writer::Kit => {
                (VocBase::TOOLS, "numbers have fractions")
            }
            () if self.beyond && counts_from_one => (
                VocBase {
                    from_one: true,
                    inclusive: false,
                },
                "a box ends one pixel behind its image",
            ),
            () => writer.base(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn words() {
        for (word, shown, expected) in [
            ("0", "0-exclusive", [64.0, 96.0, 192.0, 192.0]),
            ("1", "1-inclusive", [63.0, 95.0, 193.0, 193.0]),
            ("0-inclusive", "0-inclusive", [64.0, 96.0, 193.0, 193.0]),
            ("1-exclusive", "1-exclusive", [63.0, 95.0, 192.0, 192.0]),
        ] {
            let base: VocBase = word.parse().unwrap();
            assert_eq!(base.to_string(), shown);
            let [x, y, w, h] = expected;
            assert_eq!(
                base.extent([64.0, 96.0, 256.0, 288.0]),
                Extent::Box { x, y, w, h }
            );
        }
        assert!("2".parse::<VocBase>().is_err());
    }

    #[test]
    fn writers() {
        for (annotation, writer) in [
            (json!({"filename": "a"}), Writer::Unnamed),
            (
                json!({"source": {"database": "The VOC2007 Database"}}),
                Writer::Kit,
            ),
            (
                json!({"source": {"database": "roboflow.ai"}}),
                Writer::Roboflow,
            ),
            (json!({"source": {"database": "Unknown"}}), Writer::Tool),
            (json!({"source": ""}), Writer::Tool),
            (json!({"path": "D:\\a.jpg"}), Writer::Tool),
        ] {
            assert_eq!(Writer::of(&annotation), writer, "{annotation}");
        }
    }

    #[test]
    fn numbers_say_more_than_writers() {
        let infer = |writer, boxes: &[[f64; 4]]| {
            let mut evidence = Evidence::default();
            for edges in boxes {
                evidence.add(*edges, [Some(640), Some(480)]);
            }
            evidence.infer(writer).0.to_string()
        };
        let inner = [64.0, 96.0, 256.0, 288.0];
        for (writer, boxes, expected) in [
            (Writer::Unnamed, &[inner][..], "1-inclusive"),
            (Writer::Kit, &[inner], "1-inclusive"),
            (Writer::Roboflow, &[inner], "1-inclusive"),
            (Writer::Tool, &[inner], "0-exclusive"),
            (Writer::Tool, &[[1.0, 1.0, 640.0, 480.0]], "0-exclusive"),
            (Writer::Kit, &[inner, [0.0, 5.0, 640.0, 9.0]], "0-exclusive"),
            (Writer::Unnamed, &[[0.0, 5.0, 639.0, 9.0]], "0-inclusive"),
            (
                Writer::Unnamed,
                &[[0.0, 5.0, 639.0, 9.0], [5.0, 5.0, 640.0, 9.0]],
                "0-exclusive",
            ),
            (Writer::Unnamed, &[[5.5, 5.0, 639.0, 9.0]], "0-exclusive"),
            (Writer::Kit, &[[5.5, 5.0, 639.0, 9.0]], "1-inclusive"),
            (Writer::Roboflow, &[[1.0, 1.0, 641.0, 481.0]], "1-exclusive"),
            (Writer::Tool, &[[1.0, 1.0, 641.0, 481.0]], "0-exclusive"),
        ] {
            assert_eq!(infer(writer, boxes), expected, "{writer:?} {boxes:?}");
        }
    }
}
