//! The annotations of one image in one record: Hugging Face's `objects`, as a list of objects or as
//! an object of lists.

use serde_json::{Map, Value};

use super::refuse::Why;
use super::table_fields::{BBOX, CLASS, CLASS_ID, Cells};

/// One annotation.
pub(super) struct Object {
    pub(super) cells: Cells,
    /// What stands for no field.
    pub(super) rest: Option<String>,
    pub(super) raw: String,
}

/// The members that a field is read from.
const MEMBERS: [(usize, &[&str]); 3] = [
    (BBOX, &["bbox", "bboxes", "box", "boxes"]),
    (
        CLASS,
        &[
            "category",
            "categories",
            "label",
            "labels",
            "class",
            "classes",
            "name",
            "names",
        ],
    ),
    (
        CLASS_ID,
        &["category_id", "category_ids", "class_id", "class_ids"],
    ),
];

/// Whether this is a list of annotations with boxes.
pub(super) fn are_boxes(json: &str) -> bool {
    read(json).is_ok_and(|objects| {
        objects.iter().any(|object| object.cells[BBOX].is_some()) || json == "[]"
    })
}

/// Reads them.
pub(super) fn read(json: &str) -> Result<Vec<Object>, (Why, String)> {
    let wrong = |error: &dyn std::fmt::Display| {
        (Why::Shape, format!("its objects cannot be read: {error}"))
    };
    let objects: Vec<Map<String, Value>> =
        match serde_json::from_str::<Value>(json).map_err(|error| wrong(&error))? {
            Value::Array(list) => list
                .into_iter()
                .map(|item| match item {
                    Value::Object(object) => Ok(object),
                    other => Err(wrong(&format_args!("{other} is not an object"))),
                })
                .collect::<Result<_, _>>()?,
            Value::Object(lists) => by_column(lists)?,
            other => return Err(wrong(&format_args!("{other} is not a list"))),
        };
    Ok(objects.into_iter().map(object).collect())
}

/// An object of lists that are of one length, as a list of objects.
fn by_column(columns: Map<String, Value>) -> Result<Vec<Map<String, Value>>, (Why, String)> {
    let mut out: Option<Vec<Map<String, Value>>> = None;
    for (name, column) in columns {
        let Value::Array(values) = column else {
            return Err((Why::Shape, format!("{name} of its objects is not a list")));
        };
        let rows = out.get_or_insert_with(|| vec![Map::new(); values.len()]);
        if rows.len() != values.len() {
            let detail = format!(
                "its objects have {} in one list and {} in {name}",
                rows.len(),
                values.len()
            );
            return Err((Why::Shape, detail));
        }
        for (row, value) in rows.iter_mut().zip(values) {
            row.insert(name.clone(), value);
        }
    }
    Ok(out.unwrap_or_default())
}

fn object(mut object: Map<String, Value>) -> Object {
    let raw = Value::Object(object.clone()).to_string();
    let mut cells = Cells::default();
    for (field, names) in MEMBERS {
        let Some(name) = names
            .iter()
            .find(|name| object.get(**name).is_some_and(|value| !value.is_null()))
        else {
            continue;
        };
        cells[field] = object.shift_remove(*name).map(|value| value.to_string());
    }
    let rest = (!object.is_empty()).then(|| Value::Object(object).to_string());
    Object { cells, rest, raw }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_objects_and_objects_of_lists() {
        for json in [
            r#"{"bbox":[[1,2,3,4],[5,6,7,8]],"categories":[0,"dent"],"area":[12,56]}"#,
            r#"[{"bbox":[1,2,3,4],"category":0,"area":12},{"bbox":[5,6,7,8],"category":"dent","area":56}]"#,
        ] {
            let objects = read(json).unwrap();
            let shown: Vec<_> = objects
                .iter()
                .map(|o| {
                    (
                        o.cells[BBOX].as_deref(),
                        o.cells[CLASS].as_deref(),
                        o.rest.as_deref(),
                    )
                })
                .collect();
            assert_eq!(
                shown,
                [
                    (Some("[1,2,3,4]"), Some("0"), Some(r#"{"area":12}"#)),
                    (Some("[5,6,7,8]"), Some("\"dent\""), Some(r#"{"area":56}"#)),
                ]
            );
            assert!(are_boxes(json));
        }
        assert!(read(r#"{"bbox":[],"categories":[]}"#).unwrap().is_empty());
        assert!(!are_boxes(r#"{"count":[1]}"#));
        for bad in [
            r#"{"bbox":[[1,2,3,4]],"categories":[]}"#,
            r#"{"bbox":1}"#,
            "[1]",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
