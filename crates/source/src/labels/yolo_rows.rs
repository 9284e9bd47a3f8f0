//! What the numbers of a YOLO row mean.
//!
//! A row is a class and numbers; how many tells what they are, but not always: six are a box with
//! confidence and track id, or a triangle, and `4 + 2k` are a box with keypoints, or a polygon.
//! `kpt_shape` in the YAML or a setting decides. Without them, what all rows of the set say
//! together does ([`Profile`]). Nothing here does I/O.

use super::collect::{Extent, number_list, push_number};
use super::refuse::Why;

/// How far a box or a keypoint may be beyond where it belongs, as a fraction of the image.
const TOLERANCE: f64 = 0.02;
/// The most points of a polygon that is tested for crossing edges: no object has so many keypoints.
const CROSSING_POINTS_MAX: usize = 64;

/// What rows of more than five numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Boxes, with confidence and track id.
    Detect,
    /// Polygons.
    Segment,
    /// Boxes with so many keypoints of so many numbers (2 or 3).
    Pose(usize, usize),
}

/// A row's class and numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) class: i64,
    numbers: Vec<f64>,
    /// The last number is written without a point.
    ends_whole: bool,
}

impl Row {
    /// Reads a line that is not empty.
    pub(super) fn parse(text: &str) -> Result<Self, (Why, String)> {
        let mut words = text.split_whitespace();
        let class = words.next().unwrap_or_default();
        // numpy writes the class as 0.0 or 0.000000000000000000e+00.
        let whole = class
            .parse::<f64>()
            .ok()
            .filter(|n| n.fract() == 0.0 && n.abs() < 1e15);
        let Some(class_id) = class.parse::<i64>().ok().or(whole.map(|n| n as i64)) else {
            return Err((
                Why::Shape,
                format!("its class is {class:?}, not a whole number"),
            ));
        };
        let mut numbers = Vec::new();
        let mut ends_whole = false;
        for word in words {
            match word.parse::<f64>() {
                Ok(n) if n.is_finite() => numbers.push(n),
                Ok(_) => return Err((Why::NotFinite, format!("it holds {word}"))),
                Err(_) => return Err((Why::Shape, format!("it holds {word:?}, not a number"))),
            }
            ends_whole = word.bytes().all(|byte| byte.is_ascii_digit());
        }
        Ok(Self {
            class: class_id,
            numbers,
            ends_whole,
        })
    }

    /// Whether the row means the same whatever the other rows of its set are.
    pub(super) fn is_plain(&self) -> bool {
        match self.numbers.len() {
            5 => !self.ends_whole,
            n => n < 5,
        }
    }

    /// Whether the last number can only be a track id: a whole number above 1.
    fn ends_in_id(&self) -> bool {
        self.ends_whole && self.numbers.last().is_some_and(|n| *n > 1.0)
    }

    /// Whether the first four numbers are a box within the image.
    fn begins_with_box(&self) -> bool {
        let [cx, cy, w, h, ..] = self.numbers[..] else {
            return false;
        };
        let fits = |centre: f64, side: f64| {
            side > 0.0 && centre - side / 2.0 > -TOLERANCE && centre + side / 2.0 < 1.0 + TOLERANCE
        };
        fits(cx, w) && fits(cy, h)
    }

    /// Whether these points, x and y first, are in or near the box of the first four numbers.
    fn keypoints_in_box(&self, values: usize) -> bool {
        let [cx, cy, w, h, ..] = self.numbers[..] else {
            return false;
        };
        let near = |centre: f64, side: f64, at: f64| (at - centre).abs() <= side / 2.0 + TOLERANCE;
        self.numbers[4..].chunks_exact(values).all(|point| {
            // A point that is not marked is 0, 0.
            (point[0] == 0.0 && point[1] == 0.0) || (near(cx, w, point[0]) && near(cy, h, point[1]))
        })
    }
}

/// What all rows of a set say of what they are.
#[derive(Debug, Clone, Default)]
pub(super) struct Profile {
    rows: u64,
    /// The numbers of the longest row, and of the shortest with more than five.
    most: usize,
    least: Option<usize>,
    /// A row of five numbers ends in a track id.
    ids: bool,
    /// A row of six numbers that cannot be a box with confidence and track id.
    not_tracked: bool,
    /// A row that cannot be a box with keypoints of two or three numbers.
    not_pose: [bool; 2],
    /// A row that is no polygon: its edges cross or touch.
    crossing: bool,
}

impl Profile {
    /// Takes a row that is not plain into account.
    pub(super) fn add(&mut self, row: &Row) {
        let numbers = &row.numbers;
        let n = numbers.len();
        self.rows += 1;
        self.most = self.most.max(n);
        if n == 5 {
            self.ids |= row.ends_in_id();
            return;
        }
        self.least = Some(self.least.map_or(n, |least| least.min(n)));
        let boxed = row.begins_with_box();
        if n == 6 {
            self.not_tracked |= !(boxed && row.ends_whole && (0.0..=1.0).contains(&numbers[4]));
        }
        let [two, three] = &mut self.not_pose;
        *two |= !(boxed && n.is_multiple_of(2) && row.keypoints_in_box(2));
        let marked = |point: &[f64]| [0.0, 1.0, 2.0].contains(&point[2]);
        let is_three = boxed && n > 6 && (n - 4).is_multiple_of(3) && row.keypoints_in_box(3);
        *three |= !(is_three && numbers[4..].chunks_exact(3).all(marked));
        if n.is_multiple_of(2) && !self.crossing {
            self.crossing = crosses(numbers);
        }
    }

    /// What the rows are, and why.
    pub(super) fn infer(&self) -> (Task, &'static str) {
        let same = self.least == Some(self.most);
        match self.most {
            0..=6 if !self.not_tracked => (
                Task::Detect,
                "boxes with confidence or track id: no row has more than six numbers",
            ),
            n if same && n > 6 && !self.not_pose[1] => (
                Task::Pose((n - 4) / 3, 3),
                "boxes with keypoints of x, y and visibility: all rows have as many numbers, and these fit",
            ),
            n if same && n > 6 && !self.not_pose[0] && self.crossing => (
                Task::Pose((n - 4) / 2, 2),
                "boxes with keypoints of x and y: all rows have as many numbers, the points are within the boxes, and as polygons their edges would cross",
            ),
            _ => (
                Task::Segment,
                "polygons: their rows have six numbers or more",
            ),
        }
    }

    /// Whether five numbers end in a track id, not in a confidence.
    pub(super) fn five_end_in_id(&self) -> bool {
        self.ids
    }

    /// How many rows were taken into account.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }
}

/// Whether edges of a polygon that are not neighbours meet.
fn crosses(numbers: &[f64]) -> bool {
    let points: Vec<[f64; 2]> = numbers
        .chunks_exact(2)
        .map(|pair| [pair[0], pair[1]])
        .collect();
    let n = points.len();
    if !(4..=CROSSING_POINTS_MAX).contains(&n) {
        return false;
    }
    let side = |a: [f64; 2], b: [f64; 2], p: [f64; 2]| {
        let cross = (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]);
        if cross.abs() < 1e-12 {
            0.0
        } else {
            cross.signum()
        }
    };
    let within = |a: [f64; 2], b: [f64; 2], p: [f64; 2]| {
        (0..2).all(|axis| p[axis] >= a[axis].min(b[axis]) && p[axis] <= a[axis].max(b[axis]))
    };
    let meet = |a, b, c, d| {
        let (s1, s2, s3, s4) = (side(a, b, c), side(a, b, d), side(c, d, a), side(c, d, b));
        (s1 * s2 < 0.0 && s3 * s4 < 0.0)
            || (s1 == 0.0 && within(a, b, c))
            || (s2 == 0.0 && within(a, b, d))
            || (s3 == 0.0 && within(c, d, a))
            || (s4 == 0.0 && within(c, d, b))
    };
    (0..n).any(|i| {
        (i + 2..n)
            .filter(|j| (j + 1) % n != i)
            .any(|j| meet(points[i], points[i + 1], points[j], points[(j + 1) % n]))
    })
}

/// An annotation, in pixels.
#[derive(Debug, PartialEq)]
pub(super) struct Object {
    pub(super) kind: &'static str,
    pub(super) extent: Extent,
    pub(super) geom: Option<String>,
    pub(super) attrs: Option<String>,
}

/// How the rows of a set are read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    pub(super) task: Task,
    /// Five numbers end in a track id.
    pub(super) five_end_in_id: bool,
}

impl Reading {
    /// What a row says of an image of this size.
    pub(super) fn object(
        self,
        row: &Row,
        width: f64,
        height: f64,
    ) -> Result<Object, (Why, String)> {
        let n = row.numbers.len();
        if let Task::Pose(points, values) = self.task
            && n > 5
        {
            let shape = 4 + points * values;
            if !(shape..=shape + 2).contains(&n) {
                let detail = format!(
                    "{n} numbers follow the class; a box with {points} keypoints of {values} numbers (kpt_shape) has {shape}"
                );
                return Err((Why::Shape, detail));
            }
            let mut geom = Vec::with_capacity(points * 3);
            for point in row.numbers[4..shape].chunks_exact(values) {
                geom.extend([
                    point[0] * width,
                    point[1] * height,
                    point.get(2).copied().unwrap_or(2.0),
                ]);
            }
            let extent = box_of(&row.numbers, width, height);
            let geom = Some(number_list(&geom));
            return Ok(Object {
                kind: "keypoints",
                extent,
                geom,
                attrs: scores(row, shape),
            });
        }
        let tracked = n == 6 && (self.task == Task::Detect || row.ends_in_id());
        match n {
            4 | 5 => {
                let attrs = match n {
                    5 if row.ends_in_id() || (self.five_end_in_id && row.ends_whole) => {
                        Some(members(&[("track_id", row.numbers[4])]))
                    }
                    _ => scores(row, 4),
                };
                Ok(Object {
                    kind: "bbox",
                    extent: box_of(&row.numbers, width, height),
                    geom: None,
                    attrs,
                })
            }
            6 if tracked => {
                let extent = box_of(&row.numbers, width, height);
                Ok(Object {
                    kind: "bbox",
                    extent,
                    geom: None,
                    attrs: scores(row, 4),
                })
            }
            n if n >= 6 && self.task != Task::Detect => {
                let points = match n {
                    n if n % 2 == 1 => n - 1,
                    n if n >= 8 && row.ends_in_id() => n - 2,
                    n => n,
                };
                let mut ring = row.numbers[..points].to_vec();
                for pair in ring.chunks_exact_mut(2) {
                    pair[0] *= width;
                    pair[1] *= height;
                }
                let extent = Extent::around(&ring).unwrap_or(Extent::None);
                let geom = Some(format!("[{}]", number_list(&ring)));
                Ok(Object {
                    kind: "polygon",
                    extent,
                    geom,
                    attrs: scores(row, points),
                })
            }
            n => Err((
                Why::Shape,
                format!(
                    "{n} numbers follow the class; a box has 4, one with confidence 5, one with confidence and track id 6, a polygon 6 or more in pairs"
                ),
            )),
        }
    }
}

fn box_of(n: &[f64], width: f64, height: f64) -> Extent {
    let (w, h) = (n[2] * width, n[3] * height);
    Extent::Box {
        x: n[0] * width - w / 2.0,
        y: n[1] * height - h / 2.0,
        w,
        h,
    }
}

/// What follows the shape: a confidence, a track id, or both in this order.
fn scores(row: &Row, shape: usize) -> Option<String> {
    match row.numbers[shape..] {
        [] => None,
        [one] if row.ends_in_id() => Some(members(&[("track_id", one)])),
        [one] => Some(members(&[("confidence", one)])),
        [confidence, id, ..] => Some(members(&[("confidence", confidence), ("track_id", id)])),
    }
}

fn members(list: &[(&str, f64)]) -> String {
    let mut out = String::new();
    for (name, number) in list {
        out.push_str(if out.is_empty() { "{\"" } else { ",\"" });
        out.push_str(name);
        out.push_str("\":");
        if *name == "track_id" {
            out.push_str(&(*number as i64).to_string());
        } else {
            push_number(&mut out, *number);
        }
    }
    out + "}"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn infer(rows: &[&str]) -> Task {
        let mut profile = Profile::default();
        for row in rows
            .iter()
            .map(|text| Row::parse(text).unwrap())
            .filter(|row| !row.is_plain())
        {
            profile.add(&row);
        }
        profile.infer().0
    }

    fn object(task: Task, text: &str) -> Result<Object, (Why, String)> {
        Reading {
            task,
            five_end_in_id: false,
        }
        .object(&Row::parse(text).unwrap(), 100.0, 100.0)
    }

    #[test]
    fn classes() {
        for (text, class) in [
            ("0.0 1", 0),
            ("7 1", 7),
            ("3.000000000000000000e+00 1", 3),
            ("-1 1", -1),
        ] {
            assert_eq!(Row::parse(text).unwrap().class, class);
        }
        for bad in ["0.5 1", "dent 1", "nan 1", "1e300 1"] {
            assert_eq!(Row::parse(bad).unwrap_err().0, Why::Shape, "{bad}");
        }
    }

    #[test]
    fn what_all_rows_say() {
        let pose2 = "0 0.5 0.5 0.25 0.5 0.4 0.4 0.6 0.6";
        for (rows, task) in [
            (&["0 0.5 0.5 0.25 0.5 0.91 1"][..], Task::Detect),
            (
                &["0 0.5 0.5 0.25 0.5 0.91 7", "1 0.5 0.5 0.2 0.2"],
                Task::Detect,
            ),
            // A triangle: the last number has a point, or the first four are no box.
            (&["0 0 0 1 0 1 1"], Task::Segment),
            (&["0 0.5 0.5 0.25 0.5 0.91 0.7"], Task::Segment),
            (
                &[
                    "0 0.5 0.5 0.25 0.5 0.91 1",
                    "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2",
                ],
                Task::Segment,
            ),
            (&[pose2], Task::Pose(2, 2)),
            (
                &[pose2, "0 0.3 0.3 0.2 0.2 0.25 0.25 0 0"],
                Task::Pose(2, 2),
            ),
            // Not as many numbers in all rows, or a point far from its box, or an ordinary polygon.
            (&[pose2, "0 0.1 0.1 0.2 0.1 0.2 0.2"], Task::Segment),
            (&[pose2, "0 0.1 0.1 0.2 0.1 0.9 0.9 0.1 0.2"], Task::Segment),
            (&["0 0.5 0.5 0.52 0.5 0.52 0.52 0.5 0.52"], Task::Segment),
            (&["0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1"], Task::Pose(2, 3)),
            (&["0 0.5 0.5 0.4 0.4 0.4 0.4 2"], Task::Pose(1, 3)),
            (&["0 .1 .1 .2 .1 .2 .2 .88"], Task::Segment),
        ] {
            assert_eq!(infer(rows), task, "{rows:?}");
        }
    }

    #[test]
    fn objects() {
        let shown = |task, text: &str| {
            let Object {
                kind, geom, attrs, ..
            } = object(task, text).unwrap();
            format!(
                "{kind} {} {}",
                geom.unwrap_or_default(),
                attrs.unwrap_or_default()
            )
        };
        for (task, text, expected) in [
            (
                Task::Detect,
                "0 .5 .5 .2 .2 0.875",
                r#"bbox  {"confidence":0.875}"#,
            ),
            (Task::Detect, "0 .5 .5 .2 .2 12", r#"bbox  {"track_id":12}"#),
            (
                Task::Detect,
                "0 .5 .5 .2 .2 0.91 1",
                r#"bbox  {"confidence":0.91,"track_id":1}"#,
            ),
            (
                Task::Segment,
                "0 .5 .5 .2 .2 0.91 3",
                r#"bbox  {"confidence":0.91,"track_id":3}"#,
            ),
            (
                Task::Segment,
                "0 0 0 1 0 1 1",
                "polygon [[0.0,0.0,100.0,0.0,100.0,100.0]] ",
            ),
            (
                Task::Segment,
                "0 0 0 1 0 1 1 .88",
                r#"polygon [[0.0,0.0,100.0,0.0,100.0,100.0]] {"confidence":0.88}"#,
            ),
            (
                Task::Segment,
                "0 0 0 1 0 1 1 .88 5",
                r#"polygon [[0.0,0.0,100.0,0.0,100.0,100.0]] {"confidence":0.88,"track_id":5}"#,
            ),
            (
                Task::Segment,
                "0 0 0 1 0 1 1 5",
                r#"polygon [[0.0,0.0,100.0,0.0,100.0,100.0]] {"track_id":5}"#,
            ),
            (
                Task::Pose(1, 2),
                "0 .5 .5 1 1 .5 1",
                "keypoints [50.0,100.0,2.0] ",
            ),
            (
                Task::Pose(1, 3),
                "0 .5 .5 1 1 .5 1 0 .5 9",
                r#"keypoints [50.0,100.0,0.0] {"confidence":0.5,"track_id":9}"#,
            ),
            (Task::Pose(1, 3), "0 .5 .5 1 1", "bbox  "),
        ] {
            assert_eq!(shown(task, text), expected, "{text}");
        }
        for (task, text) in [
            (Task::Detect, "0 .5 .5"),
            (Task::Detect, "0 .1 .1 .2 .1 .2 .2 .1 .2"),
            (Task::Pose(2, 3), "0 .5 .5 1 1 .5 1 0"),
        ] {
            assert_eq!(object(task, text).unwrap_err().0, Why::Shape, "{text}");
        }
    }
}
