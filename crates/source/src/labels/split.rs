//! Splits of a set (`train`, `val`, `test`), as folders and lists name them.

/// The split that a name stands for, in any case: `Train`, `training`, `train2017`, `validation`.
pub(super) fn of_name(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "train" | "training" => Some("train"),
        "val" | "valid" | "validation" => Some("val"),
        "test" | "testing" => Some("test"),
        _ => None,
    }
}

/// The split that the innermost such folder of a path names.
pub(super) fn of_folder(path: &str) -> Option<&'static str> {
    path.split('/').rev().skip(1).find_map(of_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_splits() {
        for (path, split) in [
            ("images/train/a.png", Some("train")),
            ("Train/a.png", Some("train")),
            ("labels/Validation/x/a.txt", Some("val")),
            ("images/VAL2017/a.png", Some("val")),
            ("TEST/images/a.png", Some("test")),
            ("train/val/a.png", Some("val")),
            ("images/train", None),
            ("trainer/a.png", None),
        ] {
            assert_eq!(of_folder(path), split, "{path}");
        }
    }
}
