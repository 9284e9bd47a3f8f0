//! The box of a table's row, in the forms that tables have it in; and what all boxes of a table say
//! of their unit and form.

use serde_json::Value;

use base::fault::Fault;

use super::collect::{Extent, number_list};
use super::json;
use super::polygon;
use super::refuse::Why;
use super::table_fields::{
    BBOX, BBOX_XYXY, CX, CY, Cells, FIELDS, GEOM, H, HEIGHT, W, WIDTH, X, X2, Y, Y2,
};

/// What four numbers of a box are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum BoxForm {
    /// Left, top, width, height.
    #[default]
    Xywh,
    /// Left, top, right, bottom.
    Xyxy,
    /// Centre, width, height.
    Cxcywh,
}

impl std::str::FromStr for BoxForm {
    type Err = Fault;
    fn from_str(word: &str) -> Result<Self, Fault> {
        match word {
            "xywh" => Ok(BoxForm::Xywh),
            "xyxy" => Ok(BoxForm::Xyxy),
            "cxcywh" => Ok(BoxForm::Cxcywh),
            other => Err(Fault::usage(format!(
                "bbox_format is xywh, xyxy or cxcywh, not {other:?}"
            ))),
        }
    }
}

impl BoxForm {
    pub(super) fn extent(self, [a, b, c, d]: [f64; 4]) -> Extent {
        match self {
            BoxForm::Xywh => Extent::Box {
                x: a,
                y: b,
                w: c,
                h: d,
            },
            BoxForm::Xyxy => Extent::Box {
                x: a,
                y: b,
                w: c - a,
                h: d - b,
            },
            BoxForm::Cxcywh => Extent::Box {
                x: a - c / 2.0,
                y: b - d / 2.0,
                w: c,
                h: d,
            },
        }
    }
}

/// How the boxes of a table are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// What a column with four numbers holds.
    pub(super) form: BoxForm,
    /// Numbers are fractions of the image.
    pub(super) normalised: bool,
}

/// What all boxes say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Evidence {
    pub(super) boxes: u64,
    /// All numbers lie within 0 and 1, and one of them is a fraction.
    within_one: bool,
    fraction: bool,
    /// Every list of four numbers can be left, top, right, bottom; and one cannot be left, top,
    /// width, height.
    can_be_xyxy: bool,
    not_xywh: bool,
    /// The same, if the numbers are fractions.
    not_xywh_of_one: bool,
    lists: u64,
}

impl Default for Evidence {
    fn default() -> Self {
        Self {
            boxes: 0,
            within_one: true,
            fraction: false,
            can_be_xyxy: true,
            not_xywh: false,
            not_xywh_of_one: false,
            lists: 0,
        }
    }
}

impl Evidence {
    /// Takes a box as the input has it into account.
    pub(super) fn add(&mut self, numbers: &[f64]) {
        self.boxes += 1;
        self.within_one &= numbers.iter().all(|n| (-1e-6..=1.0 + 1e-6).contains(n));
        self.fraction |= numbers.iter().any(|n| n.fract() != 0.0);
    }

    /// Takes a row into account. What is wrong with it is found when it is read.
    pub(super) fn add_row(&mut self, cells: &Cells) {
        let size = [WIDTH, HEIGHT].map(|field| number(cells, field).ok().flatten());
        for numbers in four(cells, BBOX).into_iter().flatten().flatten() {
            self.add(&numbers);
            self.lists += 1;
            let [a, b, c, d] = numbers;
            self.can_be_xyxy &= c > a && d > b;
            let beyond = |start: f64, side: f64, size: Option<f64>| {
                size.is_some_and(|size| size > 1.0 && start + side > size + 1.0)
            };
            self.not_xywh |= beyond(a, c, size[0]) || beyond(b, d, size[1]);
            self.not_xywh_of_one |= a + c > 1.01 || b + d > 1.01;
        }
        for numbers in four(cells, BBOX_XYXY).into_iter().flatten().flatten() {
            self.add(&numbers);
        }
        let plain: Vec<f64> = [X, Y, W, H, X2, Y2, CX, CY]
            .iter()
            .filter_map(|field| number(cells, *field).ok().flatten())
            .collect();
        if plain.len() > 1 {
            self.add(&plain);
        }
        // Where there is no box, the points of a polygon say it.
        if plain.is_empty()
            && [BBOX, BBOX_XYXY]
                .iter()
                .all(|field| cells[*field].is_none())
            && let Some(geom) = &cells[GEOM]
            && let Ok((_, rings)) =
                polygon::rings(&json::as_string(geom).unwrap_or_else(|| geom.clone()))
        {
            self.add(&rings.concat());
        }
    }

    /// Whether the boxes are fractions of their images.
    pub(super) fn is_normalised(&self) -> bool {
        self.boxes > 0 && self.within_one && self.fraction
    }

    /// What lists of four numbers are.
    pub(super) fn form(&self) -> BoxForm {
        let not_xywh = if self.is_normalised() {
            self.not_xywh_of_one
        } else {
            self.not_xywh
        };
        if self.lists > 0 && not_xywh && self.can_be_xyxy {
            BoxForm::Xyxy
        } else {
            BoxForm::Xywh
        }
    }

    /// Whether no further row can change what the boxes say.
    pub(super) fn is_decided(&self) -> bool {
        self.boxes > 0 && !self.within_one && self.lists == 0
    }
}

type Wrong = (Why, String);

/// The boxes of a row as the row has them: none, one, or those of a list of lists.
pub(super) fn extents(cells: &Cells, form: BoxForm) -> Result<Vec<Extent>, Wrong> {
    let plain = extent(cells)?;
    if plain != Extent::None {
        return Ok(vec![plain]);
    }
    if let Some(boxes) = four(cells, BBOX)? {
        return Ok(boxes
            .into_iter()
            .map(|numbers| form.extent(numbers))
            .collect());
    }
    let boxes = four(cells, BBOX_XYXY)?.unwrap_or_default();
    Ok(boxes
        .into_iter()
        .map(|numbers| BoxForm::Xyxy.extent(numbers))
        .collect())
}

fn extent(cells: &Cells) -> Result<Extent, Wrong> {
    let [x, y] = [number(cells, X)?, number(cells, Y)?];
    let [w, h] = [number(cells, W)?, number(cells, H)?];
    let [x2, y2] = [number(cells, X2)?, number(cells, Y2)?];
    let [cx, cy] = [number(cells, CX)?, number(cells, CY)?];
    match (x, y, w, h, x2, y2) {
        (None, None, Some(w), Some(h), None, None) if cx.is_some() && cy.is_some() => {
            let (cx, cy) = (cx.unwrap_or_default(), cy.unwrap_or_default());
            Ok(BoxForm::Cxcywh.extent([cx, cy, w, h]))
        }
        (None, None, None, None, None, None) if cx.is_none() && cy.is_none() => Ok(Extent::None),
        (Some(x), Some(y), None, None, Some(x2), Some(y2)) => Ok(Extent::Box {
            x,
            y,
            w: x2 - x,
            h: y2 - y,
        }),
        (Some(x), Some(y), Some(w), Some(h), _, _) => Ok(Extent::Box { x, y, w, h }),
        (Some(x), Some(y), None, None, None, None) => Ok(Extent::Point { x, y }),
        (None, None, None, None, None, None) => match (cx, cy) {
            (Some(x), Some(y)) => Ok(Extent::Point { x, y }),
            _ => Err((Why::Shape, "of cx and cy only one is there".into())),
        },
        _ => Err((
            Why::Shape,
            "of x, y and w, h (or x2, y2) only some are there".into(),
        )),
    }
}

/// A number from a cell.
pub(super) fn number(cells: &Cells, field: usize) -> Result<Option<f64>, Wrong> {
    let Some(json) = &cells[field] else {
        return Ok(None);
    };
    let text = json::as_string(json).unwrap_or_else(|| json.clone());
    match text.trim().parse::<f64>() {
        Ok(n) if n.is_finite() => Ok(Some(n)),
        Ok(_) => Err((Why::NotFinite, format!("{} is {json}", FIELDS[field].0))),
        Err(_) => Err((
            Why::Shape,
            format!("{} is {json}, not a number", FIELDS[field].0),
        )),
    }
}

/// The lists of four numbers in a cell: `[1,2,3,4]`, `"1 2 3 4"`,
/// `{"x":1,"y":2,"width":3,"height":4}`, or a list of these.
fn four(cells: &Cells, field: usize) -> Result<Option<Vec<[f64; 4]>>, Wrong> {
    let Some(json) = &cells[field] else {
        return Ok(None);
    };
    let wrong = || {
        let shown: String = json.chars().take(80).collect();
        (
            Why::Shape,
            format!("{} is {shown}, not four numbers", FIELDS[field].0),
        )
    };
    let text = json::as_string(json).unwrap_or_else(|| json.clone());
    // Python writes tuples and single quotes.
    let text = text.trim().replace(['(', ')'], " ").replace('\'', "\"");
    let value: Option<Value> = serde_json::from_str(&text).ok();
    let list = |values: &[Value]| -> Option<[f64; 4]> {
        let numbers: Option<Vec<f64>> = values.iter().map(Value::as_f64).collect();
        numbers?.try_into().ok()
    };
    let one = |value: &Value| match value {
        Value::Array(values) => list(values),
        Value::Object(members) => {
            let find = |names: &[&str]| names.iter().find_map(|name| members.get(*name)?.as_f64());
            let (x, y) = (
                find(&["x", "xmin", "x1", "left"])?,
                find(&["y", "ymin", "y1", "top"])?,
            );
            let sides = find(&["w", "width"]).zip(find(&["h", "height"]));
            let ends = find(&["x2", "xmax", "right"]).zip(find(&["y2", "ymax", "bottom"]));
            let (w, h) = sides.or(ends.map(|(right, bottom)| (right - x, bottom - y)))?;
            Some([x, y, w, h])
        }
        _ => None,
    };
    match &value {
        Some(Value::Array(values)) if values.is_empty() => return Ok(Some(Vec::new())),
        Some(Value::Array(values))
            if values
                .iter()
                .all(|value| value.is_array() || value.is_object()) =>
        {
            return values
                .iter()
                .map(one)
                .collect::<Option<Vec<_>>>()
                .map(Some)
                .ok_or_else(wrong);
        }
        Some(value @ (Value::Array(_) | Value::Object(_))) => {
            return one(value).map(|n| Some(vec![n])).ok_or_else(wrong);
        }
        _ => {}
    }
    let separators = |c: char| c.is_whitespace() || matches!(c, ',' | ';' | '[' | ']');
    let numbers: Option<Vec<f64>> = text
        .split(separators)
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().ok())
        .collect();
    let numbers: [f64; 4] = numbers
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(wrong)?;
    if numbers.iter().any(|n| !n.is_finite()) {
        return Err((Why::NotFinite, format!("{} is {json}", FIELDS[field].0)));
    }
    Ok(Some(vec![numbers]))
}

/// The extent in pixels of one that is a fraction of an image of this size.
pub(super) fn to_pixels(extent: Extent, (width, height): (i64, i64)) -> Extent {
    let (sx, sy) = (width as f64, height as f64);
    match extent {
        Extent::None => Extent::None,
        Extent::Point { x, y } => Extent::Point {
            x: x * sx,
            y: y * sy,
        },
        Extent::Box { x, y, w, h } => Extent::Box {
            x: x * sx,
            y: y * sy,
            w: w * sx,
            h: h * sy,
        },
    }
}

/// The points of a polygon, a line or keypoints in pixels, if they are fractions of an image of this
/// size; else as they are.
pub(super) fn geom_to_pixels(kind: &str, json: &str, (width, height): (i64, i64)) -> String {
    let sides = [width as f64, height as f64];
    let is_fraction = |n: &f64| (-1e-6..=1.0 + 1e-6).contains(n);
    let scaled = |numbers: &mut [f64], step: usize| {
        for point in numbers.chunks_exact_mut(step) {
            point[0] *= sides[0];
            point[1] *= sides[1];
        }
    };
    let new = match kind {
        "polygon" | "polyline" => lists(json).and_then(|mut lists| {
            let are_fractions = lists.iter().flatten().all(is_fraction);
            lists.iter_mut().for_each(|list| scaled(list, 2));
            are_fractions.then(|| polygon::list(&lists))
        }),
        "keypoints" => json::as_numbers(json).and_then(|mut numbers| {
            let mut points = numbers.chunks_exact(3);
            let are_fractions = points.all(|point| point[..2].iter().all(is_fraction));
            scaled(&mut numbers, 3);
            are_fractions.then(|| number_list(&numbers))
        }),
        _ => None,
    };
    new.unwrap_or_else(|| json.to_owned())
}

/// The rings of a polygon, or the parts of a line.
fn lists(json: &str) -> Option<Vec<Vec<f64>>> {
    match polygon::rings(json) {
        Ok((_, rings)) => Some(rings),
        Err(_) => serde_json::from_str(json).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(list: &[(usize, &str)]) -> Cells {
        let mut cells = Cells::default();
        for (field, json) in list {
            cells[*field] = Some((*json).to_owned());
        }
        cells
    }

    #[test]
    fn boxes_in_every_form() {
        let boxed = Extent::Box {
            x: 10.0,
            y: 20.0,
            w: 30.0,
            h: 40.0,
        };
        for list in [
            &[(X, "10"), (Y, "20"), (W, "30"), (H, "40")][..],
            &[(X, "\"10\""), (Y, "20"), (X2, "40"), (Y2, "60")],
            &[(CX, "25"), (CY, "40"), (W, "30"), (H, "40")],
            &[(BBOX, "[10,20,30,40]")],
            &[(BBOX, r#""[10.0, 20.0, 30.0, 40.0]""#)],
            &[(BBOX, r#""(10, 20, 30, 40)""#)],
            &[(BBOX, r#""10 20 30 40""#)],
            &[(BBOX, r#""10,20,30,40""#)],
            &[(BBOX, r#"{"x":10,"y":20,"width":30,"height":40}"#)],
            &[(
                BBOX,
                r#""{'xmin': 10, 'ymin': 20, 'xmax': 40, 'ymax': 60}""#,
            )],
            &[(BBOX, "[[10,20,30,40]]")],
            &[(BBOX_XYXY, "[10,20,40,60]")],
        ] {
            assert_eq!(
                extents(&cells(list), BoxForm::Xywh),
                Ok(vec![boxed]),
                "{list:?}"
            );
        }
        assert_eq!(
            extents(&cells(&[(BBOX, "[[1,2,3,4],[5,6,7,8]]")]), BoxForm::Xywh)
                .unwrap()
                .len(),
            2
        );
        assert_eq!(extents(&cells(&[(BBOX, "[]")]), BoxForm::Xywh).unwrap(), []);
        for bad in [
            "[1,2,3]",
            "\"wide\"",
            "{\"x\":1}",
            "[[1,2,3]]",
            "7",
            "\"1,2,3,nan\"",
        ] {
            assert!(
                extents(&cells(&[(BBOX, bad)]), BoxForm::Xywh).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn what_all_boxes_say() {
        let of = |rows: &[&[(usize, &str)]]| {
            let mut evidence = Evidence::default();
            for row in rows {
                evidence.add_row(&cells(row));
            }
            (evidence.form(), evidence.is_normalised())
        };
        assert_eq!(of(&[&[(BBOX, "[10,20,30,40]")]]), (BoxForm::Xywh, false));
        assert_eq!(of(&[&[(BBOX, "[0.1,0.2,0.3,0.4]")]]), (BoxForm::Xywh, true));
        assert_eq!(
            of(&[
                &[(BBOX, "[0.1,0.2,0.3,0.4]")],
                &[(BBOX, "[0.5,0.5,0.9,0.9]")]
            ]),
            (BoxForm::Xyxy, true)
        );
        assert_eq!(
            of(&[&[(BBOX, "[50,50,90,90]"), (WIDTH, "100"), (HEIGHT, "100")]]),
            (BoxForm::Xyxy, false)
        );
        assert_eq!(
            of(&[&[(X, "0"), (Y, "0"), (W, "1"), (H, "1")]]),
            (BoxForm::Xywh, false)
        );
        assert_eq!(
            of(&[&[(X, "0.1"), (Y, "0"), (X2, "1"), (Y2, "1")]]),
            (BoxForm::Xywh, true)
        );
        assert_eq!(
            of(&[
                &[(X, "0.1"), (Y, "0"), (X2, "1"), (Y2, "1")],
                &[(X, "5"), (Y, "0")]
            ]),
            (BoxForm::Xywh, false)
        );
    }
}
