//! The trainer of the quickstart's last act. It is part of this program, so that the quickstart
//! needs no other software.
//!
//! It trains a small classifier: for each class of defects it computes the mean of a few features
//! of the pixels in a box, from three quarters of the boxes. It tests the classifier on the other
//! boxes. The site's daemon starts it like any other trainer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::ZlibDecoder;
use serde_json::{Value, json};

use base::durable;
use base::fault::{Fault, IoContext};
use content::label_rows::{ANNOTATIONS, AnnotationRow, CLASSES, ClassRow};

/// The largest accepted picture, in pixels.
const PIXELS_MAX: usize = 64 << 20;
/// The number of features of a box.
const FEATURES: usize = 5;

/// A grey picture.
struct Picture {
    width: usize,
    levels: Vec<u8>,
}

/// Trains with the inputs of the descriptor, and writes the model to its output folder.
pub(crate) fn run(descriptor: &Path) -> Result<(), Fault> {
    let text = std::fs::read(descriptor).at(descriptor.display())?;
    let run: Value = serde_json::from_slice(&text).map_err(|e| malformed(descriptor, &e))?;
    let input = |kind: &str, field: &str| -> Result<PathBuf, Fault> {
        let found = run["inputs"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|input| input["kind"] == kind);
        let value = found.and_then(|input| input[field].as_str());
        value.map(PathBuf::from).ok_or_else(|| {
            Fault::usage(format!(
                "{}: no {kind} with a {field}",
                descriptor.display()
            ))
        })
    };
    let (images, rows) = (input("dataset", "path")?, input("labels", "rows")?);
    let classes: BTreeMap<i64, String> = lines::<ClassRow>(&rows.join(CLASSES))?
        .into_iter()
        .map(|c| (c.id, c.name))
        .collect();
    let mut examples: Vec<(String, [f64; FEATURES])> = Vec::new();
    let mut open: Option<(String, Picture)> = None;
    for row in lines::<AnnotationRow>(&rows.join(ANNOTATIONS))? {
        let (Some(class), Some(x), Some(y), Some(w), Some(h)) =
            (row.class, row.x, row.y, row.w, row.h)
        else {
            continue;
        };
        // The rows of one picture are adjacent.
        let picture = match open.take() {
            Some((path, picture)) if path == row.sample => picture,
            _ => png(&images.join(&row.sample))?,
        };
        let name = classes
            .get(&class)
            .cloned()
            .unwrap_or_else(|| class.to_string());
        examples.push((name, features(&picture, [x, y, w, h])));
        open = Some((row.sample, picture));
    }
    let (tests, lessons): (Vec<_>, Vec<_>) =
        examples.iter().enumerate().partition(|(i, _)| i % 4 == 0);
    if lessons.is_empty() {
        return Err(Fault::usage("there are too few boxes to train with"));
    }
    let scale = spread(&lessons.iter().map(|(_, (_, features))| features));
    let mut means: BTreeMap<&str, ([f64; FEATURES], f64)> = BTreeMap::new();
    for (_, (name, features)) in &lessons {
        let (sum, count) = means.entry(name).or_default();
        sum.iter_mut()
            .zip(features)
            .for_each(|(sum, value)| *sum += value);
        *count += 1.0;
    }
    for (sum, count) in means.values_mut() {
        sum.iter_mut().for_each(|value| *value /= *count);
    }
    let far = |a: &[f64; FEATURES], b: &[f64; FEATURES]| -> f64 {
        (0..FEATURES)
            .map(|i| ((a[i] - b[i]) / scale[i]).powi(2))
            .sum()
    };
    let guess = |features| {
        means
            .iter()
            .min_by(|a, b| far(&a.1.0, features).total_cmp(&far(&b.1.0, features)))
            .map(|(name, _)| *name)
    };
    let right = tests
        .iter()
        .filter(|(_, (name, features))| guess(features) == Some(name.as_str()))
        .count();
    let model = json!({
        "format": "nearest mean", "scale": scale, "learned_from": lessons.len(), "tried_on": tests.len(), "right": right,
        "means": means.iter().map(|(name, (mean, _))| ((*name).to_owned(), json!(mean))).collect::<serde_json::Map<_, _>>(),
    });
    let out = PathBuf::from(run["output"].as_str().unwrap_or_default()).join("model.json");
    let text = serde_json::to_vec_pretty(&model).map_err(|e| malformed(&out, &e))?;
    durable::replace(&out, &text)?;
    println!(
        "trained with {} boxes; of {} test boxes, {right} were classified correctly",
        lessons.len(),
        tests.len()
    );
    Ok(())
}

fn malformed(path: &Path, error: &dyn std::fmt::Display) -> Fault {
    Fault::integrity(format!("{}: {error}", path.display()))
}

fn lines<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, Fault> {
    let mut out = Vec::new();
    for line in BufReader::new(File::open(path).at(path.display())?).lines() {
        out.push(serde_json::from_str(&line.at(path.display())?).map_err(|e| malformed(path, &e))?);
    }
    Ok(out)
}

/// The features of a box: its size, its shape, and how its grey levels differ from the mean of the
/// whole picture.
fn features(picture: &Picture, [x, y, w, h]: [f64; 4]) -> [f64; FEATURES] {
    let height = picture.levels.len() / picture.width.max(1);
    let (left, top) = (x.max(0.0) as usize, y.max(0.0) as usize);
    let (right, bottom) = (
        ((x + w) as usize).min(picture.width),
        ((y + h) as usize).min(height),
    );
    let level = |x: usize, y: usize| f64::from(picture.levels[y * picture.width + x]);
    let mut inside: Vec<f64> = (top..bottom)
        .flat_map(|y| (left..right).map(move |x| (x, y)))
        .map(|(x, y)| level(x, y))
        .collect();
    let whole = picture.levels.iter().map(|v| f64::from(*v)).sum::<f64>()
        / picture.levels.len().max(1) as f64;
    inside.sort_by(f64::total_cmp);
    let at = |part: f64| {
        inside
            .get((inside.len() as f64 * part) as usize)
            .copied()
            .unwrap_or(whole)
    };
    let mean = inside.iter().sum::<f64>() / inside.len().max(1) as f64;
    [
        (w * h).sqrt(),
        (w.max(h) / w.min(h).max(1.0)).ln(),
        mean - whole,
        at(0.02) - whole,
        at(0.98) - whole,
    ]
}

fn spread<'a>(all: &(impl Iterator<Item = &'a [f64; FEATURES]> + Clone)) -> [f64; FEATURES] {
    let count = all.clone().count().max(1) as f64;
    std::array::from_fn(|i| {
        let mean = all.clone().map(|f| f[i]).sum::<f64>() / count;
        (all.clone().map(|f| (f[i] - mean).powi(2)).sum::<f64>() / count)
            .sqrt()
            .max(1e-9)
    })
}

/// Reads a PNG in the form that the sample data has: 8-bit grey, no filter, one IDAT chunk.
fn png(path: &Path) -> Result<Picture, Fault> {
    let bytes = std::fs::read(path).at(path.display())?;
    let odd = |why: &str| malformed(path, &why);
    let body = bytes
        .strip_prefix(b"\x89PNG\r\n\x1a\n")
        .ok_or_else(|| odd("not a PNG"))?;
    let word = |at: usize| {
        body.get(at..at + 4)
            .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize)
    };
    let (width, height) = (word(8).unwrap_or(0), word(12).unwrap_or(0));
    let length = word(25).ok_or_else(|| odd("the file is truncated"))?;
    let data = body
        .get(33..33usize.saturating_add(length))
        .filter(|_| body.get(29..33) == Some(b"IDAT"));
    let data =
        data.ok_or_else(|| odd("its pixel data is not at the offset that the sample data uses"))?;
    if width == 0 || width.saturating_mul(height) > PIXELS_MAX || body.get(16..18) != Some(&[8, 0])
    {
        return Err(odd("it is not 8-bit grey, or too large"));
    }
    let mut rows = Vec::new();
    ZlibDecoder::new(data)
        .take(((width + 1) * height) as u64)
        .read_to_end(&mut rows)
        .at(path.display())?;
    let levels: Vec<u8> = rows
        .chunks_exact(width + 1)
        .flat_map(|row| &row[1..])
        .copied()
        .collect();
    if levels.len() == width * height {
        Ok(Picture { width, levels })
    } else {
        Err(odd("the file is truncated"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trainer_learns_from_the_sample_data() {
        let dir = tempfile::tempdir().unwrap();
        let set = crate::sample::make(dir.path(), 3, 1).unwrap();
        let coco: Value = serde_json::from_slice(&std::fs::read(&set.labels).unwrap()).unwrap();
        let (rows, out) = (dir.path().join("rows"), dir.path().join("out"));
        std::fs::create_dir_all(&rows).unwrap();
        std::fs::create_dir_all(&out).unwrap();
        let path = |id: &Value| {
            coco["images"]
                .as_array()
                .unwrap()
                .iter()
                .find(|i| i["id"] == *id)
                .unwrap()["file_name"]
                .clone()
        };
        let annotations: String = coco["annotations"].as_array().unwrap().iter().map(|a| {
            let b = |i: usize| a["bbox"][i].as_f64();
            json!({"sample": path(&a["image_id"]), "class": a["category_id"], "kind": "bbox", "x": b(0), "y": b(1), "w": b(2), "h": b(3),
                   "geom": null, "attrs": null, "raw": {}}).to_string() + "\n"
        }).collect();
        let classes: String = coco["categories"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| json!({"id": c["id"], "name": c["name"], "attrs": null}).to_string() + "\n")
            .collect();
        durable::replace(&rows.join(ANNOTATIONS), annotations.as_bytes()).unwrap();
        durable::replace(&rows.join(CLASSES), classes.as_bytes()).unwrap();
        let run_json = dir.path().join("run.json");
        let inputs =
            json!([{"kind": "dataset", "path": set.dataset}, {"kind": "labels", "rows": rows}]);
        durable::replace(
            &run_json,
            json!({"inputs": inputs, "output": out})
                .to_string()
                .as_bytes(),
        )
        .unwrap();
        run(&run_json).unwrap();
        let model: Value =
            serde_json::from_slice(&std::fs::read(out.join("model.json")).unwrap()).unwrap();
        let (right, tried) = (
            model["right"].as_u64().unwrap(),
            model["tried_on"].as_u64().unwrap(),
        );
        assert!(
            tried >= 20 && right * 100 >= tried * 80,
            "{right} of {tried}"
        );
        assert_eq!(model["means"].as_object().unwrap().len(), 4);
    }
}
