//! Shapes and classes as VGG Image Annotator writes them (robots.ox.ac.uk/~vgg/software/via), in
//! its CSV and its JSON.

use serde_json::{Map, Value};

use super::collect::Extent;
use super::refuse::Why;
use super::shapes::Shape;

/// The shape of `region_shape_attributes`, in pixels; `None` for an empty one.
pub(super) fn shape(attributes: &Map<String, Value>) -> Result<Option<Shape>, (Why, String)> {
    let Some(name) = attributes.get("name").and_then(Value::as_str) else {
        return match attributes.is_empty() {
            true => Ok(None),
            false => Err((
                Why::Shape,
                "its region_shape_attributes have no name".into(),
            )),
        };
    };
    let number = |key: &str| {
        attributes.get(key).and_then(Value::as_f64).ok_or_else(|| {
            let found = attributes
                .get(key)
                .map_or("missing".to_owned(), Value::to_string);
            (Why::Shape, format!("its {key} is {found}, not a number"))
        })
    };
    let numbers = |key: &str| {
        let list = attributes.get(key).and_then(Value::as_array);
        let list: Option<Vec<f64>> = list.and_then(|list| list.iter().map(Value::as_f64).collect());
        list.filter(|list| !list.is_empty())
            .ok_or_else(|| (Why::Shape, format!("its {key} is not a list of numbers")))
    };
    Ok(Some(match name {
        "rect" => {
            let (x, y, w, h) = (
                number("x")?,
                number("y")?,
                number("width")?,
                number("height")?,
            );
            Shape::plain("bbox", Extent::Box { x, y, w, h }, None)
        }
        "point" => Shape::plain(
            "point",
            Extent::Point {
                x: number("cx")?,
                y: number("cy")?,
            },
            None,
        ),
        "circle" | "ellipse" => {
            let (cx, cy) = (number("cx")?, number("cy")?);
            let (rx, ry) = if name == "circle" {
                (number("r")?, number("r")?)
            } else {
                (number("rx")?, number("ry")?)
            };
            let theta = if attributes.contains_key("theta") {
                number("theta")?
            } else {
                0.0
            };
            Shape::ellipse([cx, cy], rx, ry, theta.to_degrees())?
        }
        "polygon" | "polyline" => {
            let (xs, ys) = (numbers("all_points_x")?, numbers("all_points_y")?);
            if xs.len() != ys.len() {
                return Err((
                    Why::Shape,
                    format!("it has {} x and {} y", xs.len(), ys.len()),
                ));
            }
            let points: Vec<f64> = xs.into_iter().zip(ys).flat_map(|(x, y)| [x, y]).collect();
            let kind = if name == "polygon" {
                "polygon"
            } else {
                "polyline"
            };
            Shape::rings(kind, &[points])?
        }
        other => {
            return Err((
                Why::Shape,
                format!("there is no shape {other:?} of VIA that is read"),
            ));
        }
    }))
}

/// The class among `region_attributes`: the member that is called so, or the only one.
pub(super) fn class(attributes: &Map<String, Value>) -> Option<String> {
    const NAMES: [&str; 8] = [
        "class", "label", "name", "type", "category", "defect", "类别", "缺陷",
    ];
    let by_name = NAMES.iter().find_map(|name| {
        attributes
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    });
    let only = attributes.values().next().filter(|_| attributes.len() == 1);
    match by_name.or(only)? {
        Value::String(name) => Some(name.trim().to_owned()).filter(|name| !name.is_empty()),
        Value::Number(number) => Some(number.to_string()),
        // A group of check boxes: `{"dent": true}`.
        Value::Object(ticked) => {
            let mut names = ticked
                .iter()
                .filter(|(_, on)| **on == Value::Bool(true))
                .map(|(name, _)| name.clone());
            names.next().filter(|_| names.next().is_none())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: &Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    #[test]
    fn shapes() {
        let boxed = |x, y, w, h| Extent::Box { x, y, w, h };
        for (value, kind, extent, geom) in [
            (
                json!({"name": "rect", "x": 10, "y": 20, "width": 30, "height": 40}),
                "bbox",
                boxed(10.0, 20.0, 30.0, 40.0),
                None,
            ),
            (
                json!({"name": "point", "cx": 1, "cy": 2}),
                "point",
                Extent::Point { x: 1.0, y: 2.0 },
                None,
            ),
            (
                json!({"name": "circle", "cx": 10, "cy": 10, "r": 5.5}),
                "other",
                boxed(4.5, 4.5, 11.0, 11.0),
                Some(r#"{"cx":10.0,"cy":10.0,"rx":5.5,"ry":5.5,"rotation":0.0}"#),
            ),
            (
                json!({"name": "polygon", "all_points_x": [0, 10, 5], "all_points_y": [0, 0, 8]}),
                "polygon",
                boxed(0.0, 0.0, 10.0, 8.0),
                Some("[[0.0,0.0,10.0,0.0,5.0,8.0]]"),
            ),
        ] {
            let shape = shape(&map(&value)).unwrap().unwrap();
            assert_eq!(
                (shape.kind, shape.extent, shape.geom.as_deref()),
                (kind, extent, geom)
            );
        }
        assert!(shape(&map(&json!({}))).unwrap().is_none());
        for bad in [
            json!({"x": 1}),
            json!({"name": "rect", "x": "1"}),
            json!({"name": "blob"}),
            json!({"name": "polygon", "all_points_x": [1], "all_points_y": []}),
        ] {
            assert!(shape(&map(&bad)).is_err());
        }
    }

    #[test]
    fn classes() {
        for (value, class_name) in [
            (json!({"class": "划痕", "n": 1}), Some("划痕")),
            (json!({"缺陷码": "7"}), Some("7")),
            (json!({"type": {"dent": true, "deep": false}}), Some("dent")),
            (json!({"a": "x", "b": "y"}), None),
            (json!({}), None),
        ] {
            assert_eq!(class(&map(&value)).as_deref(), class_name);
        }
    }
}
