//! Shapes that several formats have: turned boxes, ellipses, and masks as COCO's runs.

use base::fault::Fault;
use base::limits::LABEL_RECORD_BYTES_MAX;
use base::names::RelPath;

use super::collect::{Annotation, ClassRef, Collector, Extent, number_list, push_number};
use super::refuse::Why;

/// A shape as a reader hands it on.
#[derive(Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) kind: &'static str,
    pub(super) extent: Extent,
    /// The extent is the box around a shape that turns or bends, and may reach over the image.
    pub(super) is_hull: bool,
    pub(super) geom: Option<String>,
}

/// What is wrong with a shape.
pub(super) type Checked<T> = Result<T, (Why, String)>;

impl Shape {
    /// A shape whose extent is its own.
    pub(super) fn plain(kind: &'static str, extent: Extent, geom: Option<String>) -> Self {
        Self {
            kind,
            extent,
            is_hull: false,
            geom,
        }
    }

    /// A class of the whole image.
    pub(super) fn class() -> Self {
        Self::plain("class", Extent::None, None)
    }

    /// A box from two corners in any order.
    pub(super) fn corners(a: [f64; 2], b: [f64; 2]) -> Self {
        let extent = Extent::Box {
            x: a[0].min(b[0]),
            y: a[1].min(b[1]),
            w: (a[0] - b[0]).abs(),
            h: (a[1] - b[1]).abs(),
        };
        Self::plain("bbox", extent, None)
    }

    /// A box of this size around a centre, turned clockwise by an angle in radians.
    pub(super) fn turned([cx, cy]: [f64; 2], w: f64, h: f64, angle: f64) -> Checked<Self> {
        if w <= 0.0 || h <= 0.0 {
            return Err((
                Why::EmptyBox,
                format!("the turned box is {w} wide and {h} high"),
            ));
        }
        let (sin, cos) = angle.sin_cos();
        let half = [
            (w * cos.abs() + h * sin.abs()) / 2.0,
            (w * sin.abs() + h * cos.abs()) / 2.0,
        ];
        let geom = object(&[("cx", cx), ("cy", cy), ("w", w), ("h", h), ("angle", angle)]);
        Ok(Self::hull("bbox", [cx, cy], half, geom))
    }

    /// An ellipse, turned clockwise by an angle in degrees.
    pub(super) fn ellipse([cx, cy]: [f64; 2], rx: f64, ry: f64, degrees: f64) -> Checked<Self> {
        if rx <= 0.0 || ry <= 0.0 {
            let detail = format!("the radii of the ellipse are {rx} and {ry}");
            return Err((Why::EmptyBox, detail));
        }
        let (sin, cos) = degrees.to_radians().sin_cos();
        let half = [(rx * cos).hypot(ry * sin), (rx * sin).hypot(ry * cos)];
        let geom = object(&[
            ("cx", cx),
            ("cy", cy),
            ("rx", rx),
            ("ry", ry),
            ("rotation", degrees),
        ]);
        Ok(Self::hull("other", [cx, cy], half, geom))
    }

    fn hull(kind: &'static str, [cx, cy]: [f64; 2], half: [f64; 2], geom: String) -> Self {
        let extent = Extent::Box {
            x: cx - half[0],
            y: cy - half[1],
            w: 2.0 * half[0],
            h: 2.0 * half[1],
        };
        Self {
            kind,
            extent,
            is_hull: true,
            geom: Some(geom),
        }
    }

    /// A polygon of rings, or a line of parts.
    pub(super) fn rings(kind: &'static str, rings: &[Vec<f64>]) -> Checked<Self> {
        let least = if kind == "polygon" { 6 } else { 4 };
        if let Some(ring) = rings
            .iter()
            .find(|ring| ring.len() < least || ring.len() % 2 == 1)
        {
            let detail = format!("its {kind} has {} numbers", ring.len());
            return Err((Why::Shape, detail));
        }
        let extent = Extent::around(&rings.concat()).unwrap_or(Extent::None);
        let lists: Vec<String> = rings.iter().map(|ring| number_list(ring)).collect();
        Ok(Self::plain(
            kind,
            extent,
            Some(format!("[{}]", lists.join(","))),
        ))
    }

    /// Points `x, y, v, …`, of which those with `v` 0 have no position.
    pub(super) fn keypoints(points: &[f64]) -> Checked<Self> {
        let marked: Vec<f64> = points
            .chunks_exact(3)
            .filter(|point| point[2] > 0.0)
            .flat_map(|point| [point[0], point[1]])
            .collect();
        let extent = match Extent::around(&marked) {
            None => Extent::None,
            // Points on one line have no box.
            Some(Extent::Box { x, y, w, h }) if w == 0.0 || h == 0.0 => {
                if w == 0.0 && h == 0.0 {
                    Extent::Point { x, y }
                } else {
                    Extent::None
                }
            }
            Some(extent) => extent,
        };
        let geom = number_list(points);
        Ok(Self::plain("keypoints", extent, Some(geom)))
    }
}

/// What a record says beside its shape.
pub(super) struct Row<'a> {
    pub(super) place: &'a str,
    pub(super) class: Option<ClassRef>,
    pub(super) attrs: Option<&'a str>,
    /// The record, as JSON.
    pub(super) raw: &'a str,
}

impl Row<'_> {
    /// Hands the row with its shape to the collector, or notes what is wrong with it.
    pub(super) fn take(
        &self,
        path: &RelPath,
        shape: Checked<Shape>,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let shape = match shape {
            Ok(_) if self.raw.len() > LABEL_RECORD_BYTES_MAX => Err((
                Why::TooLarge,
                "the record is larger than a record may be".to_owned(),
            )),
            other => other,
        };
        let shape = match shape {
            Ok(shape) => shape,
            Err((why, detail)) => {
                let refusals = &mut collector.refusals;
                refusals.add_record(why, self.place, detail, Some(self.raw));
                return Ok(());
            }
        };
        let annotation = Annotation {
            place: self.place,
            class: self.class,
            kind: shape.kind,
            extent: shape.extent,
            is_hull: shape.is_hull,
            geom: shape.geom.as_deref(),
            attrs: self.attrs,
            raw: self.raw,
        };
        collector.annotation(path, &annotation)
    }
}

/// Numbers by name, as a JSON object.
fn object(members: &[(&str, f64)]) -> String {
    let mut out = String::new();
    for (name, value) in members {
        out.push_str(if out.is_empty() { "{\"" } else { ",\"" });
        out.push_str(name);
        out.push_str("\":");
        push_number(&mut out, *value);
    }
    out + "}"
}

/// The runs of one mask in the order of COCO: column by column, zeros first.
#[derive(Debug, Default)]
pub(super) struct Runs {
    counts: String,
    /// Where the last run of ones ends, and how long it is so far.
    end: u64,
    open: u64,
    /// Where it begins.
    first: Option<(u64, u64)>,
    left: u64,
    top: u64,
    right: u64,
    bottom: u64,
    is_too_large: bool,
}

impl Runs {
    /// Adds `length` pixels of column `x` from row `y` on, in an image of this height. They come in
    /// the order of COCO.
    pub(super) fn add(&mut self, x: u64, y: u64, length: u64, height: u64) {
        let at = x * height + y;
        match self.first {
            None => {
                self.first = Some((x, y));
                (self.left, self.top) = (x, y);
                self.push(at);
            }
            Some(_) if at > self.end => {
                let ones = self.open;
                self.push(ones);
                self.push(at - self.end);
                self.open = 0;
            }
            Some(_) => {}
        }
        self.open += length;
        self.end = at + length;
        self.top = self.top.min(y);
        self.right = self.right.max(x + 1);
        self.bottom = self.bottom.max(y + length);
    }

    fn push(&mut self, count: u64) {
        if self.counts.len() > LABEL_RECORD_BYTES_MAX {
            self.is_too_large = true;
            return;
        }
        if !self.counts.is_empty() {
            self.counts.push(',');
        }
        self.counts.push_str(&count.to_string());
    }

    /// The mask in an image of this size; `None` without a pixel.
    pub(super) fn finish(mut self, width: u64, height: u64) -> Checked<Option<Shape>> {
        if self.first.is_none() {
            return Ok(None);
        }
        let ones = self.open;
        self.push(ones);
        let rest = width * height - self.end;
        if rest > 0 {
            self.push(rest);
        }
        if self.is_too_large {
            let detail = format!("its mask has more than {LABEL_RECORD_BYTES_MAX} bytes of runs");
            return Err((Why::TooLarge, detail));
        }
        let extent = Extent::Box {
            x: self.left as f64,
            y: self.top as f64,
            w: (self.right - self.left) as f64,
            h: (self.bottom - self.top) as f64,
        };
        let geom = format!(
            "{{\"size\":[{height},{width}],\"counts\":[{}]}}",
            self.counts
        );
        Ok(Some(Shape::plain("rle", extent, Some(geom))))
    }
}

/// A mask of part of an image: its place, its size, and its rows, one byte a pixel.
pub(super) struct Patch<'a> {
    pub(super) left: i64,
    pub(super) top: i64,
    pub(super) width: usize,
    pub(super) pixels: &'a [u8],
}

impl Patch<'_> {
    /// The shape in an image of this size. What reaches over the image is left out.
    pub(super) fn shape(&self, (width, height): (i64, i64)) -> Checked<Shape> {
        let rows = self.pixels.len().checked_div(self.width).unwrap_or(0) as i64;
        let mut runs = Runs::default();
        for column in 0..self.width as i64 {
            let x = self.left + column;
            if !(0..width).contains(&x) {
                continue;
            }
            let mut start: Option<i64> = None;
            for row in 0..=rows {
                let y = self.top + row;
                let at = (row * self.width as i64 + column) as usize;
                let is_set = row < rows
                    && (0..height).contains(&y)
                    && self.pixels.get(at).is_some_and(|pixel| *pixel != 0);
                match (is_set, start) {
                    (true, None) => start = Some(y),
                    (false, Some(from)) => {
                        runs.add(x as u64, from as u64, (y - from) as u64, height as u64);
                        start = None;
                    }
                    _ => {}
                }
            }
        }
        let shape = runs.finish(width as u64, height as u64)?;
        shape.ok_or_else(|| (Why::EmptyBox, "its mask has no pixel in the image".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_become_runs_by_columns() {
        // Columns of an image of 4 × 3: the patch covers x 1..3, y 1..3.
        let patch = Patch {
            left: 1,
            top: 1,
            width: 2,
            pixels: &[1, 0, 1, 1],
        };
        let shape = patch.shape((4, 3)).unwrap();
        assert_eq!(
            shape.geom.as_deref(),
            Some(r#"{"size":[3,4],"counts":[4,2,2,1,3]}"#)
        );
        assert_eq!(
            shape.extent,
            Extent::Box {
                x: 1.0,
                y: 1.0,
                w: 2.0,
                h: 2.0
            }
        );
        // A run goes on from the bottom of a column to the top of the next.
        let all = Patch {
            left: -1,
            top: 0,
            width: 3,
            pixels: &[1; 6],
        };
        let shape = all.shape((2, 2)).unwrap();
        assert_eq!(
            shape.geom.as_deref(),
            Some(r#"{"size":[2,2],"counts":[0,4]}"#)
        );
        let none = Patch {
            left: 5,
            top: 0,
            width: 1,
            pixels: &[1],
        };
        assert!(none.shape((2, 2)).is_err());
    }
}
