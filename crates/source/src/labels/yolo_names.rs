//! The class names of a YOLO folder: from its YAML, of which only the few keys needed are read, or
//! from a list.

use std::path::{Path, PathBuf};

use crate::inside::Inside;
use base::fault::{Fault, IoContext};

use super::folder::has_extension;
use super::text::side_file;

/// What a YOLO folder says of its classes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    /// The file they came from.
    pub(super) place: String,
    pub(super) classes: Vec<(i64, String)>,
    /// `kpt_shape`: keypoints an object, and numbers a keypoint (2 or 3).
    pub(super) keypoints: Option<(usize, usize)>,
}

/// Finds the names, or says where they could stand.
pub(super) fn find(inside: &Inside) -> Result<Names, Fault> {
    let (mut yaml, mut lists) = (Vec::new(), Vec::new());
    for entry in inside.list(Path::new(""))? {
        let path = PathBuf::from(
            entry
                .at(format_args!("list {}", inside.full("").display()))?
                .file_name(),
        );
        if has_extension(&path, &["yaml", "yml"]) {
            yaml.push(path);
        } else if has_extension(&path, &["names"]) || path.ends_with("classes.txt") {
            lists.push(path);
        }
    }
    lists.extend(Some(PathBuf::from("labels/classes.txt")).filter(|path| inside.is_file(path)));
    yaml.sort();
    lists.sort();
    for path in yaml {
        let place = inside.full(&path).display().to_string();
        let problem = |why: String| {
            Fault::integrity(format!("{place}: {why}"))
                .with_next("list the names under names:, one for each class")
        };
        if let Some(names) = parse_yaml(&side_file(inside, &path)?).map_err(problem)? {
            return Ok(Names {
                place: file_name(&path),
                ..names
            });
        }
    }
    if let Some(path) = lists.first() {
        let text = side_file(inside, path)?;
        // An empty line within the list would shift every class behind it: it stays, and its empty
        // name is refused.
        let classes = text
            .trim_end()
            .lines()
            .map(str::trim)
            .zip(0..)
            .map(|(name, id)| (id, name.to_owned()))
            .collect();
        return Ok(Names {
            place: file_name(path),
            classes,
            keypoints: None,
        });
    }
    Err(Fault::integrity("YOLO labels without class names: there is no YAML file with names, no classes.txt and no *.names file")
        .with_next("add a classes.txt with one name a line to the folder"))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Reads `names`, `nc` and `kpt_shape` of a data YAML; `None` when it has no names. The forms that
/// training tools write are known: `names: [a, b]` over one or more lines, `names:` with `- a`
/// lines, and with `0: a` lines.
fn parse_yaml(text: &str) -> Result<Option<Names>, String> {
    let mut names = Names::default();
    let mut count = None;
    let mut lines = text
        .lines()
        .map(without_comment)
        .filter(|line| !line.trim().is_empty())
        .peekable();
    while let Some(line) = lines.next() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let mut value = value.trim().to_owned();
        match key {
            "nc" => count = value.parse::<usize>().ok(),
            "names" | "kpt_shape" => {
                let inline = value.starts_with(['[', '{']);
                let close = if value.starts_with('{') { '}' } else { ']' };
                while inline && !value.ends_with(close) {
                    let Some(next) = lines.next() else {
                        return Err(format!("the list of {key} is not closed"));
                    };
                    value.push_str(next.trim());
                }
                let mut items: Vec<String> = Vec::new();
                if inline {
                    items = split_items(value[1..].trim_end_matches(close))?;
                } else if value.is_empty() {
                    while let Some(item) = lines.next_if(|line| line.starts_with([' ', '\t', '-']))
                    {
                        items.push(item.trim().to_owned());
                    }
                } else {
                    return Err(format!("{key} is {value:?}, not a list"));
                }
                if key == "names" {
                    names.classes = items
                        .iter()
                        .enumerate()
                        .map(|(at, item)| name_of(at, item))
                        .collect::<Result<_, _>>()?;
                } else {
                    let numbers: Vec<usize> = items
                        .iter()
                        .filter_map(|item| item.trim_start_matches("- ").trim().parse().ok())
                        .collect();
                    names.keypoints = match numbers[..] {
                        [points, values @ (2 | 3)] => Some((points, values)),
                        _ => return Err("kpt_shape is not [points, 2 or 3]".into()),
                    };
                }
            }
            _ => {}
        }
    }
    if let Some(count) =
        count.filter(|count| *count != names.classes.len() && !names.classes.is_empty())
    {
        return Err(format!(
            "nc is {count}, but there are {} names",
            names.classes.len()
        ));
    }
    Ok((!names.classes.is_empty()).then_some(names))
}

/// `- name`, `name` or `7: name`.
fn name_of(at: usize, item: &str) -> Result<(i64, String), String> {
    if let Some(name) = item.strip_prefix("- ") {
        return Ok((at as i64, unquote(name.trim())));
    }
    match item.split_once(':') {
        Some((id, name)) if !item.starts_with(['"', '\'']) => match id.trim().parse() {
            Ok(id) => Ok((id, unquote(name.trim()))),
            Err(_) => Err(format!("{item:?} is not a number and a name")),
        },
        _ => Ok((at as i64, unquote(item))),
    }
}

/// The items of an inline list: split at commas outside of quotes.
fn split_items(text: &str) -> Result<Vec<String>, String> {
    let (mut items, mut item, mut quote) = (Vec::new(), String::new(), None);
    for c in text.chars() {
        match c {
            ',' if quote.is_none() => items.push(std::mem::take(&mut item)),
            '"' | '\'' if quote == Some(c) => {
                quote = None;
                item.push(c);
            }
            '"' | '\''
                if quote.is_none()
                    && matches!(item.trim_end().chars().last(), None | Some(':')) =>
            {
                quote = Some(c);
                item.push(c);
            }
            c => item.push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed".into());
    }
    items.push(item);
    // A comma may stand behind the last item.
    if items.last().is_some_and(|item| item.trim().is_empty()) {
        items.pop();
    }
    Ok(items
        .into_iter()
        .map(|item| item.trim().to_owned())
        .collect())
}

fn unquote(text: &str) -> String {
    for quote in ['"', '\''] {
        if let Some(inner) = text
            .strip_prefix(quote)
            .and_then(|rest| rest.strip_suffix(quote))
        {
            return if quote == '\'' {
                inner.replace("''", "'")
            } else {
                inner.replace("\\\"", "\"")
            };
        }
    }
    text.to_owned()
}

/// The line up to a `#` that starts a comment: at its beginning or behind a space, outside of
/// quotes.
fn without_comment(line: &str) -> &str {
    let (mut quote, mut before) = (None, ' ');
    for (at, c) in line.char_indices() {
        match c {
            '"' | '\'' if quote == Some(c) => quote = None,
            '"' | '\'' if quote.is_none() && !before.is_alphanumeric() => quote = Some(c),
            '#' if quote.is_none() && before.is_whitespace() => return line[..at].trim_end(),
            _ => {}
        }
        before = c;
    }
    line.trim_end()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn names_in_every_form() {
        for text in [
            "path: x\nnames: [scratch, 'a, b', \"划痕\"] # three\nnc: 3\n",
            "names:\n  - scratch\n  - 'a, b'\n  # between\n  - 划痕\nnc: 3",
            "nc: 3\nnames:\n- scratch\n- a, b\n- 划痕\ntrain: images",
            "names:\n  0: scratch\n  1: \"a, b\"\n  2: 划痕\n",
            "names: {0: scratch, 1: 'a, b', 2: 划痕}",
            "names: ['scratch',\n  'a, b',\n  '划痕',\n]\n",
        ] {
            let names = parse_yaml(text).unwrap().unwrap();
            let expected =
                [(0, "scratch"), (1, "a, b"), (2, "划痕")].map(|(id, name)| (id, name.to_owned()));
            assert_eq!(names.classes, expected, "{text}");
        }
        let pose = parse_yaml("names: {0: panel}\nkpt_shape: [4, 3]")
            .unwrap()
            .unwrap();
        assert_eq!(pose.keypoints, Some((4, 3)));
        assert_eq!(parse_yaml("train: x\n").unwrap(), None);
        for bad in [
            "names: [a, b]\nnc: 3",
            "names: [a,\n b",
            "names: a",
            "names:\n  x: a",
            "names: ['a]",
            "names: [a]\nkpt_shape: [1]",
        ] {
            assert!(parse_yaml(bad).is_err(), "{bad}");
        }
    }
}
