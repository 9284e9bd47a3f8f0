//! The rows of a database query, as `sink::labels` sends them, and the classes of their version.

use base::fault::Fault;
use base::limits::LABEL_LINE_BYTES_MAX;
use content::chunk::Hash;
use content::label_rows::{QUERY_COLUMNS, QueryRow};

use super::ClassesOf;
use super::collect::{Collector, push_number};
use super::json;
use super::refuse::Why;
use super::table::{Parts, Rows};
use super::table_fields::{
    ATTRS, CLASS, CLASS_ID, Cells, FIELDS, GEOM, H, HEIGHT, KIND, SAMPLE_PATH, SPLIT, W, WIDTH, X,
    Y,
};
use super::text::json_string;

/// A row of a query, so that its canonical line fits too.
const QUERY_ROW_BYTES_MAX: usize = LABEL_LINE_BYTES_MAX - (64 << 10);

/// Reads the rows of a query, in whatever order they come.
pub(super) fn read(
    rows: impl Iterator<Item = Vec<QueryRow>>,
    classes_of: &mut ClassesOf<'_>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    const FIELD_OF: [(&str, usize); 13] = [
        ("sample_path", SAMPLE_PATH),
        ("class", CLASS),
        ("class_id", CLASS_ID),
        ("kind", KIND),
        ("x", X),
        ("y", Y),
        ("w", W),
        ("h", H),
        ("geom", GEOM),
        ("attrs", ATTRS),
        ("width", WIDTH),
        ("height", HEIGHT),
        ("split", SPLIT),
    ];
    let column = |name: &str| QUERY_COLUMNS.iter().position(|known| *known == name);
    let fields: Vec<(usize, usize)> = FIELD_OF
        .iter()
        .filter_map(|(name, field)| Some((column(name)?, *field)))
        .collect();
    let (hash_column, raw_column) = (column("sample_hash"), column("raw"));
    let take = |row: &QueryRow, column: Option<usize>| column.and_then(|at| row[at].clone());
    let mut state = Rows::default();
    let mut of_version = None;
    for row in rows.flatten() {
        // All rows state the same one.
        if of_version.is_none() {
            let text = |name| take(&row, column(name)).and_then(|json| json::as_string(&json));
            of_version = Some(text("label_set").zip(text("version")));
        }
        // Rows have no numbers: what stands for one is the sample that it speaks of.
        let place = format!("a row of {}", row[0].as_deref().unwrap_or("no sample"));
        let plain = |json: &String| json::as_string(json).map_or(json.len(), |text| text.len());
        if row.iter().flatten().map(String::len).sum::<usize>() > QUERY_ROW_BYTES_MAX
            && row.iter().flatten().map(plain).sum::<usize>() > QUERY_ROW_BYTES_MAX
        {
            let detail = format!("it is larger than {QUERY_ROW_BYTES_MAX} bytes");
            collector.refusals.add(Why::TooLarge, place, detail);
            continue;
        }
        let mut cells = Cells::default();
        for (from, field) in &fields {
            cells[*field] = row[*from].clone();
        }
        let hash = match take(&row, hash_column) {
            None => None,
            Some(json) => match json::as_string(&json).and_then(|text| text.parse::<Hash>().ok()) {
                Some(hash) => Some(hash),
                None => {
                    let detail = format!("sample_hash is {json}, not 64 hex digits");
                    collector.refusals.add(Why::Shape, place, detail);
                    continue;
                }
            },
        };
        let holds_nul = |json: &&String| {
            json.contains("\\u0000") && json::as_string(json).is_some_and(|t| t.contains('\0'))
        };
        if let Some(nul) = row.iter().flatten().find(holds_nul) {
            collector
                .refusals
                .add(Why::Nul, place, format!("{nul} holds a NUL"));
            continue;
        }
        let raw = match take(&row, raw_column) {
            Some(json) => json::compact(
                &json::as_string(&json).unwrap_or(json),
                &place,
                &mut collector.refusals,
            ),
            None => Some(rendered(&cells)),
        };
        let Some(raw) = raw else { continue };
        state.row(
            &place,
            &cells,
            Parts {
                rest: None,
                raw: &raw,
                hash,
            },
            collector,
        )?;
    }
    if let Some((set, version)) = of_version.flatten() {
        for class in classes_of(&set, &version)? {
            let attrs = class.attrs.map(|json| json.get().to_owned());
            collector.classes.complete(class.id, &class.name, attrs)?;
        }
    }
    Ok(())
}

/// A row without a record of its own, as an object of its fields.
fn rendered(cells: &Cells) -> String {
    let mut out = String::from("{");
    for ((name, _), json) in FIELDS
        .iter()
        .zip(cells)
        .filter_map(|(field, cell)| Some((field, cell.as_ref()?)))
    {
        if out.len() > 1 {
            out.push(',');
        }
        out.push_str(&json_string(name));
        out.push(':');
        let text = json::as_string(json);
        let is_number = matches!(
            *name,
            "x" | "y" | "w" | "h" | "width" | "height" | "class_id"
        );
        match text {
            Some(text) if is_number && text.trim().parse::<f64>().is_ok_and(f64::is_finite) => {
                push_number(&mut out, text.trim().parse().unwrap_or_default());
            }
            // Checked as JSON where the field itself is taken.
            Some(text) if matches!(*name, "geom" | "attrs") => out.push_str(&json_string(&text)),
            _ => out.push_str(json),
        }
    }
    out + "}"
}
