//! YAML documents as a tree, for the few small files that describe a label set.
//!
//! `saphyr-parser` reads the syntax and gives events. An alias is kept as one and never replaced by
//! what it refers to, so a document cannot grow while it is read. Depth is bounded here, size by
//! the file's ([`super::text::side_file`]).

use saphyr_parser::{Event, Parser};

use base::limits::LABEL_DEPTH_MAX;

/// A node of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Yaml {
    /// A scalar's text; null and numbers are text too, and nothing at all is an empty one.
    Scalar(String),
    List(Vec<Yaml>),
    Map(Vec<(Yaml, Yaml)>),
    /// A reference to another node, which is not followed.
    Alias,
}

impl Yaml {
    /// The value of this key.
    pub(crate) fn get(&self, key: &str) -> Option<&Yaml> {
        let Yaml::Map(members) = self else {
            return None;
        };
        members
            .iter()
            .find(|(name, _)| name.text() == Some(key))
            .map(|(_, value)| value)
    }

    /// A scalar's text.
    pub(crate) fn text(&self) -> Option<&str> {
        if let Yaml::Scalar(text) = self {
            Some(text)
        } else {
            None
        }
    }
}

/// What is open while events come.
enum Open {
    List(Vec<Yaml>),
    /// With the key whose value comes next.
    Map(Vec<(Yaml, Yaml)>, Option<Yaml>),
}

/// Reads the first document; an empty text is an empty scalar.
///
/// Lists in brackets may go on at the beginning of a line, which YAML's own rules forbid: PyYAML,
/// and so every trainer, reads them.
pub(crate) fn parse(text: &str) -> Result<Yaml, String> {
    parse_strictly(text).or_else(|error| match indent_flow(text) {
        Some(indented) => parse_strictly(&indented).map_err(|_| error),
        None => Err(error),
    })
}

/// The text with a deeper indent of the lines within brackets that begin as a value; `None` without
/// any.
fn indent_flow(text: &str) -> Option<String> {
    let (mut out, mut depth, mut quote, mut changed) = (String::new(), 0u32, None, false);
    for line in text.lines() {
        if depth > 0 {
            out.push_str("  ");
            changed = true;
        }
        out.push_str(line);
        out.push('\n');
        let flow = match depth {
            // After `key:`, or as the whole line.
            0 => line
                .find(": ")
                .map_or(line, |at| &line[at + 2..])
                .trim_start(),
            _ => line,
        };
        if depth == 0 && !flow.starts_with(['[', '{']) {
            continue;
        }
        let mut before = ' ';
        for c in flow.chars() {
            match (quote, c) {
                (Some(open), c) if open == c && before != '\\' => quote = None,
                (Some(_), _) => {}
                (None, '#') if before.is_whitespace() => break,
                (None, '"' | '\'') if !before.is_alphanumeric() => quote = Some(c),
                (None, '[' | '{') => depth += 1,
                (None, ']' | '}') => depth = depth.saturating_sub(1),
                (None, _) => {}
            }
            before = c;
        }
    }
    changed.then_some(out)
}

fn parse_strictly(text: &str) -> Result<Yaml, String> {
    let mut open: Vec<Open> = Vec::new();
    for event in Parser::new_from_str(text) {
        let (event, _) = event.map_err(|error| format!("it is not YAML: {error}"))?;
        let node = match event {
            Event::Scalar(text, ..) => Yaml::Scalar(text.into_owned()),
            Event::Alias(_) => Yaml::Alias,
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                if open.len() >= LABEL_DEPTH_MAX as usize {
                    return Err(format!("it is nested deeper than {LABEL_DEPTH_MAX}"));
                }
                let is_list = matches!(event, Event::SequenceStart(..));
                open.push(if is_list {
                    Open::List(Vec::new())
                } else {
                    Open::Map(Vec::new(), None)
                });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List(items)) => Yaml::List(items),
                Some(Open::Map(members, _)) => Yaml::Map(members),
                None => return Err("it is not YAML: an end without its start".into()),
            },
            Event::StreamEnd => break,
            Event::Nothing | Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd => {
                continue;
            }
        };
        match open.last_mut() {
            None => return Ok(node),
            Some(Open::List(items)) => items.push(node),
            Some(Open::Map(members, key)) => match key.take() {
                None => *key = Some(node),
                Some(name) => members.push((name, node)),
            },
        }
    }
    Ok(Yaml::Scalar(String::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scalar(text: &str) -> Yaml {
        Yaml::Scalar(text.to_owned())
    }

    #[test]
    fn documents() {
        for text in [
            "names: [\"\\u5212\\u75D5\", 'it''s', a b]",
            "\"names\" :\n- \"\\u5212\\x75\\u75d5\"\n",
            "{\"names\": [\"划痕\"], \"nc\": 1}",
            "%YAML 1.2\n---\nnames:\n  - |-\n    划痕\n...\n",
        ] {
            assert!(
                matches!(parse(text).unwrap().get("names"), Some(Yaml::List(_))),
                "{text}"
            );
        }
        let tree =
            parse("names: [\"\\u5212\\u75D5\", 'it''s', \"\\t\\\"\", a#b, ~] # c\nnc : 2").unwrap();
        assert_eq!(
            tree.get("names"),
            Some(&Yaml::List(vec![
                scalar("划痕"),
                scalar("it's"),
                scalar("\t\""),
                scalar("a#b"),
                scalar("~")
            ]))
        );
        assert_eq!(tree.get("nc").and_then(Yaml::text), Some("2"));
        assert_eq!(parse("").unwrap(), scalar(""));
        assert_eq!(parse("a").unwrap(), scalar("a"));
    }

    #[test]
    fn lists_that_go_on_at_the_beginning_of_a_line() {
        for text in [
            "names: [\n'a', # ]\n'b]',\n]\nnc: 2\n",
            "names: ['a',\n'b]']\nnc: 2",
            "nc: 2\nnames: {0: a,\n1: 'b]'\n}\n",
        ] {
            let tree = parse(text).unwrap();
            let (Some(Yaml::List(_) | Yaml::Map(_)), Some("2")) =
                (tree.get("names"), tree.get("nc").and_then(Yaml::text))
            else {
                unreachable!("{text}: {tree:?}")
            };
        }
    }

    #[test]
    fn what_is_refused() {
        for bad in ["names: [a", "names: 'a", "a: b: c", "\"\\uD800\""] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&"- ".repeat(100_000)).is_err());
        // An alias is not replaced, so this stays as small as it is.
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for n in 1..30 {
            bomb.push_str(&format!(
                "a{n}: &a{n} [{}]\n",
                vec![format!("*a{}", n - 1); 10].join(", ")
            ));
        }
        assert_eq!(
            parse(&bomb).unwrap().get("a29"),
            Some(&Yaml::List(vec![Yaml::Alias; 10]))
        );
    }
}
