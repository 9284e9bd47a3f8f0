//! Polygons as lists of rings: read in the forms that tools write, checked, cut at their image.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::collect::number_list;
use super::json;

/// A ring needs three points.
const RING_NUMBERS_MIN: usize = 6;

/// The polygon as a list of rings `[[x,y,…],…]`, and its rings. A ring without a list around it
/// (VGG Image Annotator) and rings of points `[x,y]` are brought into that form.
pub(super) fn rings(json: &str) -> Result<(Cow<'_, str>, Vec<Vec<f64>>), String> {
    if let Some(rings) = canonical(json) {
        if rings.len() > 2 && rings.iter().all(|ring| ring.len() == 2) {
            let ring = rings.concat();
            return checked(Cow::Owned(json.replace("],[", ",")), vec![ring]);
        }
        return checked(Cow::Borrowed(json), rings);
    }
    let wrong = || "it is not a list of rings of x, y".to_owned();
    let outer = items(json).ok_or_else(wrong)?;
    let rings: Option<Vec<Vec<f64>>> = if outer.iter().all(|item| !item.starts_with('[')) {
        numbers(&outer).map(|ring| vec![ring])
    } else {
        outer.iter().map(|ring| ring_of(ring)).collect()
    };
    let mut rings = rings.ok_or_else(wrong)?;
    if rings.len() > 2 && rings.iter().all(|ring| ring.len() == 2) {
        rings = vec![rings.concat()];
    }
    checked(Cow::Owned(list(&rings)), rings)
}

/// Rings as a list.
pub(super) fn list(rings: &[Vec<f64>]) -> String {
    let lists: Vec<String> = rings.iter().map(|ring| number_list(ring)).collect();
    format!("[{}]", lists.join(","))
}

fn checked(
    json: Cow<'_, str>,
    rings: Vec<Vec<f64>>,
) -> Result<(Cow<'_, str>, Vec<Vec<f64>>), String> {
    if rings.is_empty() {
        return Err("it has no ring".into());
    }
    for (at, ring) in rings.iter().enumerate() {
        if ring.len() % 2 == 1 {
            return Err(format!(
                "its ring {at} has {} numbers, not pairs of x, y",
                ring.len()
            ));
        }
        if ring.len() < RING_NUMBERS_MIN {
            return Err(format!(
                "its ring {at} has {} points; 3 are needed",
                ring.len() / 2
            ));
        }
        if ring.chunks_exact(2).all(|point| point == &ring[..2]) {
            return Err(format!("all points of its ring {at} are the same"));
        }
    }
    Ok((json, rings))
}

/// The rings of a compact list of lists of numbers.
fn canonical(json: &str) -> Option<Vec<Vec<f64>>> {
    let inner = json.strip_prefix("[[")?.strip_suffix("]]")?;
    let ring = |ring: &str| match ring {
        "" => Some(Vec::new()),
        ring => ring.split(',').map(json::as_number).collect(),
    };
    inner.split("],[").map(ring).collect()
}

fn items(json: &str) -> Option<Vec<&str>> {
    let items: Vec<&RawValue> = serde_json::from_str(json).ok()?;
    Some(items.into_iter().map(RawValue::get).collect())
}

fn numbers(items: &[&str]) -> Option<Vec<f64>> {
    items.iter().map(|item| json::as_number(item)).collect()
}

/// A ring of numbers, or of points of two numbers.
fn ring_of(json: &str) -> Option<Vec<f64>> {
    let items = items(json)?;
    if items.iter().all(|item| !item.starts_with('[')) {
        return numbers(&items);
    }
    let mut ring = Vec::with_capacity(items.len() * 2);
    for point in items {
        let point = numbers(&self::items(point)?)?;
        ring.extend::<[f64; 2]>(point.try_into().ok()?);
    }
    Some(ring)
}

/// The part of each ring that lies within an image of this size (Sutherland and Hodgman); rings
/// without any are left out.
pub(super) fn clipped(rings: &[Vec<f64>], width: f64, height: f64) -> Vec<Vec<f64>> {
    rings
        .iter()
        .map(|ring| {
            let points = ring.chunks_exact(2).map(|point| [point[0], point[1]]);
            let mut points: Vec<[f64; 2]> = points.collect();
            for (axis, edge, keeps_above) in [
                (0, 0.0, true),
                (0, width, false),
                (1, 0.0, true),
                (1, height, false),
            ] {
                points = cut(&points, axis, edge, keeps_above);
            }
            points.dedup();
            if points.len() > 1 && points.first() == points.last() {
                points.pop();
            }
            points.concat()
        })
        .filter(|ring| ring.len() >= RING_NUMBERS_MIN && area(ring) > 0.0)
        .collect()
}

/// The part of a ring on one side of an edge of the image.
fn cut(points: &[[f64; 2]], axis: usize, edge: f64, keeps_above: bool) -> Vec<[f64; 2]> {
    let is_inside = |point: &[f64; 2]| match keeps_above {
        true => point[axis] >= edge,
        false => point[axis] <= edge,
    };
    let crossing = |a: &[f64; 2], b: &[f64; 2]| {
        let part = (edge - a[axis]) / (b[axis] - a[axis]);
        let other = 1 - axis;
        let mut point = [edge; 2];
        point[other] = a[other] + part * (b[other] - a[other]);
        point
    };
    let mut out = Vec::with_capacity(points.len() + 4);
    let Some(mut before) = points.last() else {
        return out;
    };
    for point in points {
        match (is_inside(before), is_inside(point)) {
            (true, true) => out.push(*point),
            (true, false) => out.push(crossing(before, point)),
            (false, true) => out.extend([crossing(before, point), *point]),
            (false, false) => {}
        }
        before = point;
    }
    out
}

/// The area within a ring.
pub(super) fn area(ring: &[f64]) -> f64 {
    let points: Vec<[f64; 2]> = ring.chunks_exact(2).map(|p| [p[0], p[1]]).collect();
    let next = points.iter().cycle().skip(1);
    let doubled: f64 = points
        .iter()
        .zip(next)
        .map(|(a, b)| a[0] * b[1] - b[0] * a[1])
        .sum();
    doubled.abs() / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_becomes_a_list_of_rings() {
        for (json, expected) in [
            ("[[1,2,3,4,5,6.50]]", "[[1,2,3,4,5,6.50]]"),
            ("[1,2,3,4,5,6]", "[[1.0,2.0,3.0,4.0,5.0,6.0]]"),
            ("[[1,2],[3,4],[5,6]]", "[[1,2,3,4,5,6]]"),
            ("[[[1,2],[3,4],[5,6]]]", "[[1.0,2.0,3.0,4.0,5.0,6.0]]"),
            ("[[1, 2, 3, 4, 5, 6]]", "[[1.0,2.0,3.0,4.0,5.0,6.0]]"),
        ] {
            assert_eq!(rings(json).unwrap().0, expected, "{json}");
        }
        for bad in [
            "[]",
            "[[]]",
            "[[1,2]]",
            "[[1,2,3,4]]",
            "[[1,2,3,4,5,6],[]]",
            "[[1,2,3,4,5]]",
            "[[1,2,1,2,1,2]]",
            "[[1,2],[3,4]]",
            "[[[1,2],[3,4,5],[5,6]]]",
            "[[1,2,\"a\",4,5,6]]",
            "[1,[2,3]]",
            "{}",
            "7",
        ] {
            assert!(rings(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rings_are_cut_at_the_edges() {
        let ring = vec![10.0, 20.0, 1300.0, 20.0, 10.0, 470.0];
        let cut = clipped(&[ring], 640.0, 480.0);
        assert_eq!(cut.len(), 1);
        let expected = 0.5 * 1290.0 * 450.0 - 0.5 * 660.0 * (450.0 * 660.0 / 1290.0);
        assert!((area(&cut[0]) - expected).abs() < 1e-6, "{cut:?}");
        assert_eq!(cut[0].len(), 8);
        // A triangle over a corner, and one beside the image.
        let cut = clipped(
            &[
                vec![-10.0, -10.0, 10.0, -10.0, -10.0, 30.0],
                vec![700.0, 0.0, 800.0, 0.0, 700.0, 9.0],
            ],
            640.0,
            480.0,
        );
        assert_eq!(cut, [[0.0, 0.0, 5.0, 0.0, 0.0, 10.0]]);
    }
}
