//! The same labels give the same bytes, in whatever order their records come, and whether they fit
//! the memory or not.

use proptest::prelude::*;

use super::*;

/// (sample, class, left): a record of a small world.
type Record = (u8, u8, u8);

fn coco_of(records: &[Record], samples: &[u8]) -> String {
    let images: Vec<String> = samples
        .iter()
        .map(|s| {
            format!(
                r#"{{"id":{s},"file_name":"d{}/图{s}.png","width":400,"height":400}}"#,
                s % 3
            )
        })
        .collect();
    let annotations: Vec<String> = records
        .iter()
        .map(|(s, c, x)| {
            format!(
                r#"{{"image_id":{s},"category_id":{},"bbox":[{x},0.5,10,10],"note":"划\u75d5"}}"#,
                c % 3
            )
        })
        .collect();
    let categories = [
        r#"{"id":0,"name":"b"}"#,
        r#"{"id":1,"name":"a"}"#,
        r#"{"id":2,"name":"c"}"#,
    ]
    .join(",");
    format!(
        r#"{{"annotations":[{}],"categories":[{categories}],"images":[{}]}}"#,
        annotations.join(", "),
        images.join(",\n")
    )
}

fn csv_of(records: &[Record]) -> String {
    let rows: String = records
        .iter()
        .map(|(s, c, x)| format!("d{}/{s}.png,c{c},{x},0.5,10,10\n", s % 3))
        .collect();
    format!("path,class,x,y,w,h\n{rows}")
}

/// Another order of the records that keeps the order within each sample: samples get new ranks,
/// records are dealt out by them.
fn reorder(records: &[Record], ranks: &[u8]) -> Vec<Record> {
    let mut out: Vec<(u8, Record)> = records.iter().map(|r| (ranks[r.0 as usize], *r)).collect();
    out.sort_by_key(|(rank, _)| *rank);
    out.into_iter().map(|(_, record)| record).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_order_of_samples_does_not_matter(
        records in prop::collection::vec((0u8..12, 0u8..6, 0u8..200), 0..40),
        ranks in prop::collection::vec(any::<u8>(), 12),
    ) {
        let samples: Vec<u8> = (0..12).collect();
        let mut shuffled_samples = samples.clone();
        shuffled_samples.sort_by_key(|s| ranks[*s as usize]);
        let shuffled = reorder(&records, &ranks);
        let read = |name: &str, text: String| Input::file(name, text).read().unwrap();
        let coco = read("a.json", coco_of(&records, &samples));
        prop_assert_eq!(coco.annotations.lines().count(), records.len());
        prop_assert_eq!(coco, read("a.json", coco_of(&shuffled, &shuffled_samples)));
        prop_assert_eq!(read("a.csv", csv_of(&records)), read("a.csv", csv_of(&shuffled)));
    }
}

/// More rows than a sort keeps in memory: 10,000 annotations of about 4 KiB.
#[test]
fn spilled_rows_come_back_in_order() {
    const ANNOTATIONS: usize = 10_000;
    const IMAGES: usize = 500;
    let note = "x".repeat(4000);
    let mut text = String::from(r#"{"annotations":["#);
    for n in 0..ANNOTATIONS {
        let comma = if n > 0 { "," } else { "" };
        text.push_str(&format!(r#"{comma}{{"id":{n},"image_id":{},"category_id":1,"bbox":[{n},0,1,1],"note":"{note}"}}"#, n * 7 % IMAGES));
    }
    text.push_str(r#"],"images":["#);
    for n in 0..IMAGES {
        text.push_str(&format!(
            r#"{}{{"id":{n},"file_name":"{:05}.png"}}"#,
            if n > 0 { "," } else { "" },
            IMAGES - n
        ));
    }
    text.push_str(r#"],"categories":[{"id":1,"name":"dent"}]}"#);
    let output = Input::file("a.json", text).read().unwrap();
    let rows = output.each(|row| format!("{} {:06}", row.sample, row.x.unwrap_or(-1.0)));
    assert_eq!(rows.len(), ANNOTATIONS);
    assert!(
        rows.is_sorted(),
        "rows are sorted by sample, and within one as they came"
    );
}
