//! One table, a row for each annotation, with the columns that `publish` knows by these names. A
//! sample without annotations has a row with nothing but what is known of it.

use base::fault::Fault;
use content::label_rows::{AnnotationRow, SampleRow};

use super::super::collect::push_number;
use super::{Item, LeftOut, Set};

const COLUMNS: [&str; 13] = [
    "sample_path",
    "class",
    "class_id",
    "kind",
    "x",
    "y",
    "w",
    "h",
    "geom",
    "attrs",
    "width",
    "height",
    "split",
];

pub(super) fn write(set: &Set<'_>, left_out: &mut LeftOut) -> Result<(u64, u64), Fault> {
    let mut out = set.create_top("labels.csv")?;
    out.put(&line(&COLUMNS.map(str::to_owned)))?;
    let mut used = std::collections::BTreeSet::new();
    // A sample whose annotations have not come.
    let mut waiting: Option<SampleRow> = None;
    let counts = set.each(|item| match item {
        Item::Sample(_, sample) => {
            if sample.meta.is_some() {
                left_out.add("metadata of samples is left out", &sample.path);
            }
            match waiting.replace(sample.clone()) {
                Some(sample) if !sample.path.is_empty() => out.put(&row(set, &sample, None)?),
                _ => Ok(()),
            }
        }
        Item::Annotation(_, annotation) => {
            used.extend(annotation.class);
            let Some(sample) = &mut waiting else {
                return Ok(());
            };
            let text = row(
                set,
                &SampleRow {
                    path: annotation.sample.clone(),
                    ..sample.clone()
                },
                Some(annotation),
            )?;
            // It has a row now, and needs none of its own.
            sample.path.clear();
            out.put(&text)
        }
    })?;
    if let Some(sample) = waiting.filter(|sample| !sample.path.is_empty()) {
        out.put(&row(set, &sample, None)?)?;
    }
    for class in &set.classes {
        if !used.contains(&class.id) {
            left_out.add("classes without annotations are left out", &class.name);
        }
        if class.attrs.is_some() {
            left_out.add("attributes of classes are left out", &class.name);
        }
    }
    out.end()?;
    Ok(counts)
}

fn row(
    set: &Set<'_>,
    sample: &SampleRow,
    annotation: Option<&AnnotationRow>,
) -> Result<String, Fault> {
    let number = |number: Option<f64>| {
        let mut text = String::new();
        if let Some(number) = number {
            push_number(&mut text, number);
        }
        text
    };
    let whole = |number: Option<i64>| number.map_or(String::new(), |number| number.to_string());
    let class = match annotation.and_then(|annotation| annotation.class) {
        Some(id) => set.class(id)?.to_owned(),
        None => String::new(),
    };
    let json = |json: Option<&serde_json::value::RawValue>| {
        json.map_or(String::new(), |json| json.get().to_owned())
    };
    Ok(line(&[
        sample.path.clone(),
        class,
        whole(annotation.and_then(|a| a.class)),
        annotation.map_or(String::new(), |a| a.kind.clone()),
        number(annotation.and_then(|a| a.x)),
        number(annotation.and_then(|a| a.y)),
        number(annotation.and_then(|a| a.w)),
        number(annotation.and_then(|a| a.h)),
        json(annotation.and_then(|a| a.geom.as_deref())),
        json(annotation.and_then(|a| a.attrs.as_deref())),
        whole(sample.width),
        whole(sample.height),
        sample.split.clone().unwrap_or_default(),
    ]))
}

/// Cells as a line of RFC 4180.
fn line(cells: &[String; COLUMNS.len()]) -> String {
    let mut text = String::new();
    for (at, cell) in cells.iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        if cell.contains(['"', ',', ';', '\n', '\r', '\t']) || cell.trim() != cell {
            text.push('"');
            text.push_str(&cell.replace('"', "\"\""));
            text.push('"');
        } else {
            text.push_str(cell);
        }
    }
    text.push('\n');
    text
}
