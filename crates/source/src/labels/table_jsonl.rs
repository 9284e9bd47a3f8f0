//! JSON Lines: one object a row, or one an image with a list of objects.
//!
//! The file is read twice where the form of its boxes is inferred: `table` decides by all rows.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;

use base::fault::Fault;

use super::collect::Collector;
use super::encoding::{Inferred, Utf8Reader};
use super::folder::Input;
use super::json::{self, Fields, JsonReader};
use super::refuse::Refusals;
use super::table::{Parts, Rows, TableSettings};
use super::table_boxes::Evidence;
use super::table_fields::{BBOX, Cells, GEOM, X, choose};
use super::table_objects;

/// Reads a JSON Lines file.
pub(super) fn read(
    input: &Input,
    columns: &BTreeMap<String, String>,
    settings: TableSettings,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let mut evidence = Evidence::default();
    let mut first_pass = JsonlRows::open(input, collector)?;
    // What is wrong with a record is said in the second pass.
    let mut unsaid = Refusals::default();
    while let Some(place) = first_pass.next(&mut unsaid)? {
        let Some(record) = Record::parse(first_pass.text(), columns, &place, &mut unsaid) else {
            continue;
        };
        match record.objects.map(table_objects::read) {
            Some(Ok(objects)) => objects
                .iter()
                .for_each(|object| evidence.add_row(&object.cells)),
            Some(Err(_)) => {}
            None => evidence.add_row(&record.cells),
        }
        if evidence.is_decided() {
            break;
        }
    }
    let mut state = Rows::new(settings, &evidence, input, collector);
    let mut rows = JsonlRows::open(input, collector)?;
    while let Some(place) = rows.next(&mut collector.refusals)? {
        let text = rows.text();
        let Some(record) = Record::parse(text, columns, &place, &mut collector.refusals) else {
            continue;
        };
        let rest = record.fields.rest();
        let parts = Parts {
            rest: rest.as_deref(),
            raw: text,
            hash: None,
        };
        match record.objects {
            None => state.row(&place, &record.cells, parts, collector)?,
            Some(objects) => state.objects(&place, &record.cells, objects, collector)?,
        }
    }
    collector.note_encoding(&input.shown().display().to_string(), rows.inferred.name());
    Ok(())
}

/// The records of a JSON Lines file.
struct JsonlRows {
    json: JsonReader<BufReader<Utf8Reader<File>>>,
    inferred: Inferred,
    record: Vec<u8>,
    number: u64,
}

impl JsonlRows {
    fn open(input: &Input, collector: &Collector) -> Result<Self, Fault> {
        let file = collector.utf8(input.file()?);
        let inferred = file.inferred();
        let reader = BufReader::with_capacity(256 << 10, file);
        let json = JsonReader::new(reader, input.shown().display().to_string());
        Ok(Self {
            json,
            inferred,
            record: Vec::new(),
            number: 0,
        })
    }

    /// Goes to the next record that is text: its place.
    fn next(&mut self, refusals: &mut Refusals) -> Result<Option<String>, Fault> {
        while self.json.peek()?.is_some() {
            self.number += 1;
            let place = format!("record {}", self.number);
            let flags = self.json.capture(&mut self.record)?;
            if json::vet(&self.record, flags, &place, refusals).is_some() {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }

    /// The record that [`JsonlRows::next`] went to.
    fn text(&self) -> &str {
        std::str::from_utf8(&self.record).unwrap_or_default()
    }
}

/// A record of JSON Lines, its fields taken out.
struct Record<'a> {
    cells: Cells,
    /// A list of objects in the image (Hugging Face's `metadata.jsonl`), where the record has no
    /// box of its own.
    objects: Option<&'a str>,
    fields: Fields<'a>,
}

impl<'a> Record<'a> {
    fn parse(
        text: &'a str,
        columns: &BTreeMap<String, String>,
        place: &str,
        refusals: &mut Refusals,
    ) -> Option<Self> {
        let mut fields = Fields::parse(text, place, refusals)?;
        let cells = choose(columns, |name| fields.take(name)).map(|json| json.map(str::to_owned));
        let is_alone = [X, BBOX, GEOM]
            .into_iter()
            .all(|field| cells[field].is_none());
        let objects = fields
            .peek("objects")
            .filter(|json| is_alone && json.starts_with(['{', '[']));
        let objects = objects.filter(|json| table_objects::are_boxes(json));
        if objects.is_some() {
            fields.take("objects");
        }
        Some(Self {
            cells,
            objects,
            fields,
        })
    }
}
