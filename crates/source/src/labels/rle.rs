//! The box around a mask in COCO's runs (cocoapi, `maskApi.c`): a list of counts, or counts as
//! text.

use serde::Deserialize;

use super::collect::Extent;

/// The largest side of an image that a mask may state.
const SIDE_MAX: u64 = 1 << 31;

#[derive(Deserialize)]
struct Rle<'a> {
    size: [u64; 2],
    #[serde(borrow)]
    counts: &'a serde_json::value::RawValue,
}

/// Checks a mask: COCO's runs completely; those of Label Studio and of Kaggle, which do not hold
/// their size, as far as they can be.
pub(super) fn check(json: &str) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Other<'a> {
        format: Option<String>,
        #[serde(borrow)]
        rle: Option<&'a serde_json::value::RawValue>,
        counts: Option<&'a serde_json::value::RawValue>,
    }
    let bytes = |json: &str| serde_json::from_str::<Vec<u8>>(json).is_ok();
    if json.starts_with('[') {
        return match bytes(json) {
            true => Ok(()),
            false => Err("its rle is not a list of bytes".into()),
        };
    }
    let other: Other<'_> = serde_json::from_str(json)
        .map_err(|error| format!("its rle is not an object with size and counts: {error}"))?;
    match other.format.as_deref() {
        None => extent(json).map(|_| ()),
        Some("label_studio") if other.rle.is_some_and(|rle| bytes(rle.get())) => Ok(()),
        Some("label_studio") => Err("its rle is not a list of bytes".into()),
        Some("kaggle") => {
            let text = other
                .counts
                .and_then(|counts| serde_json::from_str::<String>(counts.get()).ok());
            let is_right = text.is_some_and(|text| kaggle(&text).is_some());
            is_right
                .then_some(())
                .ok_or_else(|| "its mask is not pairs of a start and a length".into())
        }
        Some(format) => Err(format!("the format {format:?} of its rle is not known")),
    }
}

/// Kaggle's pairs of a start, counted from 1 down the columns, and a length.
pub(super) fn kaggle(text: &str) -> Option<Vec<i64>> {
    let numbers: Option<Vec<i64>> = text
        .split_whitespace()
        .map(|word| word.parse().ok().filter(|n| *n > 0))
        .collect();
    numbers.filter(|numbers| !numbers.is_empty() && numbers.len() % 2 == 0)
}

/// The box around the pixels of `{"size": [height, width], "counts": …}`; nothing for a mask
/// without pixels.
pub(super) fn extent(json: &str) -> Result<Extent, String> {
    let rle: Rle<'_> = serde_json::from_str(json)
        .map_err(|error| format!("its rle is not an object with size and counts: {error}"))?;
    let [height, width] = rle.size;
    if !(1..SIDE_MAX).contains(&height) || !(1..SIDE_MAX).contains(&width) {
        return Err(format!("the size of its rle is {height}, {width}"));
    }
    let counts = rle.counts.get();
    let counts: Vec<u64> = if counts.starts_with('"') {
        let text: String = serde_json::from_str(counts).map_err(|error| error.to_string())?;
        uncompress(&text).ok_or("the counts of its rle are no counts of COCO")?
    } else {
        serde_json::from_str(counts).map_err(|error| format!("its counts: {error}"))?
    };
    let pixels = height * width;
    let (mut at, mut around) = (0u64, None::<[u64; 4]>);
    for (index, count) in counts.iter().enumerate() {
        let end = at.checked_add(*count).filter(|end| *end <= pixels);
        let end = end.ok_or("its rle has more pixels than its size")?;
        if index % 2 == 1 && *count > 0 {
            let (left, right) = (at / height, (end - 1) / height);
            let (top, bottom) = match left == right {
                true => (at % height, (end - 1) % height),
                false => (0, height - 1),
            };
            around = Some(match around {
                None => [left, top, right, bottom],
                Some([l, t, r, b]) => [l.min(left), t.min(top), r.max(right), b.max(bottom)],
            });
        }
        at = end;
    }
    if at != pixels {
        return Err(format!(
            "the counts of its rle make {at} pixels, and its size {height}, {width} has {pixels}"
        ));
    }
    Ok(
        around.map_or(Extent::None, |[left, top, right, bottom]| Extent::Box {
            x: left as f64,
            y: top as f64,
            w: (right - left + 1) as f64,
            h: (bottom - top + 1) as f64,
        }),
    )
}

/// Counts as text: five bits a character, from the third on the difference to the one before the
/// last.
fn uncompress(text: &str) -> Option<Vec<u64>> {
    let mut counts: Vec<i64> = Vec::new();
    let mut bytes = text.bytes();
    while let Some(mut byte) = bytes.next() {
        let (mut value, mut shift) = (0i64, 0u32);
        loop {
            let part = i64::from(byte.checked_sub(48).filter(|part| *part < 64)?);
            value |= (part & 0x1f) << shift;
            shift += 5;
            if part & 0x20 == 0 {
                if part & 0x10 != 0 {
                    value |= -1 << shift;
                }
                break;
            }
            if shift > 50 {
                return None;
            }
            byte = bytes.next()?;
        }
        if counts.len() > 2 {
            value = value.checked_add(counts[counts.len() - 2])?;
        }
        counts.push(value);
    }
    counts.into_iter().map(|n| u64::try_from(n).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_around_masks() {
        let boxed = |x, y, w, h| Extent::Box { x, y, w, h };
        // The same mask as pycocotools writes it: 3 × 2 pixels at 1, 1 of an image of 6 × 5.
        for counts in [r#""6230009""#, "[6,2,3,2,3,2,12]"] {
            let rle = format!(r#"{{"size":[5,6],"counts":{counts}}}"#);
            assert_eq!(extent(&rle), Ok(boxed(1.0, 1.0, 3.0, 2.0)), "{counts}");
        }
        // A run over two columns fills their height.
        assert_eq!(
            extent(r#"{"size":[3,3],"counts":[2,2,5]}"#),
            Ok(boxed(0.0, 0.0, 2.0, 3.0))
        );
        assert_eq!(extent(r#"{"size":[3,3],"counts":[9]}"#), Ok(Extent::None));
        for bad in [
            r#"{"size":[3,3],"counts":[2,9]}"#,
            r#"{"size":[3,3],"counts":[2,6]}"#,
            r#"{"size":[3,3],"counts":[]}"#,
            r#"{"size":[3,3],"counts":[-1,10]}"#,
            r#"{"size":[3,3],"counts":[4.5,4.5]}"#,
            r#"{"size":[3,3],"counts":""}"#,
            r#"{"counts":[9]}"#,
            r#"{"size":[0,3],"counts":[0]}"#,
            r#"{"size":[3,3],"counts":"~"}"#,
            r#"{"size":[3,3],"counts":"oooooooooooooooo"}"#,
            "{}",
        ] {
            assert!(extent(bad).is_err(), "{bad}");
            assert!(check(bad).is_err(), "{bad}");
        }
        for (json, is_right) in [
            (r#"{"size":[3,3],"counts":[9]}"#, true),
            (r#"{"format":"kaggle","counts":"1 3 10 5"}"#, true),
            (r#"{"format":"kaggle","counts":"1 3 10"}"#, false),
            (r#"{"format":"label_studio","rle":[1,255]}"#, true),
            (r#"{"format":"label_studio","rle":[1,256]}"#, false),
            (r#"{"format":"label_studio"}"#, false),
            (r#"{"format":"other","counts":[9]}"#, false),
            (r#"{"foo":1}"#, false),
            ("[0,9]", true),
            ("[0,-9]", false),
            ("7", false),
        ] {
            assert_eq!(check(json).is_ok(), is_right, "{json}");
        }
    }
}
