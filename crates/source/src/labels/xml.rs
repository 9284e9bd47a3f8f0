//! Small XML documents as JSON values.
//!
//! An element with text alone becomes a string; one with children or attributes an object, in
//! order, with `@name` for attributes and `#text` for text between children; a child that comes
//! several times becomes a list. Entities beyond XML's five are refused, so no document can grow
//! while it is read.

use quick_xml::Reader;
use quick_xml::escape::unescape;
use quick_xml::events::{BytesStart, Event};
use serde_json::{Map, Value};

use base::limits::LABEL_DEPTH_MAX;

use super::refuse::Why;

/// What an element holds while it is open.
#[derive(Default)]
pub(super) struct Open {
    name: String,
    members: Map<String, Value>,
    text: String,
}

impl Open {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// An attribute of the start tag.
    pub(super) fn attribute(&self, name: &str) -> Option<&str> {
        self.members
            .get(&format!("@{name}"))
            .and_then(Value::as_str)
    }

    pub(super) fn close(self) -> (String, Value) {
        let text = self.text.trim();
        if self.members.is_empty() {
            return (self.name, Value::from(text));
        }
        let mut members = self.members;
        if !text.is_empty() {
            members.insert("#text".to_owned(), Value::from(text));
        }
        (self.name, Value::Object(members))
    }

    fn add(&mut self, name: String, value: Value) {
        match self.members.get_mut(&name) {
            None => {
                self.members.insert(name, value);
            }
            // Only repeated children make lists, so a list here is one.
            Some(Value::Array(list)) => list.push(value),
            Some(first) => *first = Value::Array(vec![first.take(), value]),
        }
    }
}

/// The document's root element: its name, and what it holds.
pub(super) fn parse(text: &str) -> Result<(String, Value), (Why, String)> {
    let malformed = |error: &dyn std::fmt::Display| (Why::Malformed, error.to_string());
    let mut reader = Reader::from_str(text);
    let mut open: Vec<Open> = Vec::new();
    let mut root = None;
    loop {
        match reader.read_event().map_err(|error| malformed(&error))? {
            Event::Start(tag) => {
                if open.len() as u32 >= LABEL_DEPTH_MAX {
                    return Err((
                        Why::TooDeep,
                        format!("it is nested deeper than {LABEL_DEPTH_MAX}"),
                    ));
                }
                open.push(start(&tag)?);
            }
            Event::Empty(tag) => close(start(&tag)?, &mut open, &mut root)?,
            Event::End(_) => match open.pop() {
                Some(element) => close(element, &mut open, &mut root)?,
                None => return Err(malformed(&"an end tag without its start")),
            },
            Event::Text(text) => add_text(&text, &mut open)?,
            Event::CData(text) => add_text(&text, &mut open)?,
            Event::GeneralRef(name) => add_reference(&name, &mut open)?,
            // The text was decoded before, whatever the declaration says.
            Event::Decl(_) | Event::Comment(_) | Event::PI(_) | Event::DocType(_) => {}
            Event::Eof if !open.is_empty() => {
                return Err(malformed(&"it ends within an element: it is cut off"));
            }
            Event::Eof => return root.ok_or_else(|| malformed(&"it holds no element")),
        }
    }
}

pub(super) fn start(tag: &BytesStart<'_>) -> Result<Open, (Why, String)> {
    let mut element = Open {
        name: tag.name().0.to_owned(),
        ..Open::default()
    };
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(|error| (Why::Malformed, error.to_string()))?;
        let value =
            unescape(&attribute.value).map_err(|error| (Why::Malformed, error.to_string()))?;
        element.add(format!("@{}", attribute.key.0), Value::from(value.as_ref()));
    }
    Ok(element)
}

pub(super) fn close(
    element: Open,
    open: &mut [Open],
    root: &mut Option<(String, Value)>,
) -> Result<(), (Why, String)> {
    let (name, value) = element.close();
    match open.last_mut() {
        Some(parent) => parent.add(name, value),
        None if root.is_none() => *root = Some((name, value)),
        None => return Err((Why::Malformed, "it has two root elements".into())),
    }
    Ok(())
}

/// Text that an entity such as `&amp;` stands for.
pub(super) fn add_reference(name: &str, open: &mut [Open]) -> Result<(), (Why, String)> {
    match unescape(&format!("&{name};")) {
        Ok(text) if !text.contains('\0') => add_text(&text, open),
        Ok(_) => Err((Why::Nul, "it holds a NUL character".into())),
        Err(error) => Err((Why::Malformed, error.to_string())),
    }
}

pub(super) fn add_text(text: &str, open: &mut [Open]) -> Result<(), (Why, String)> {
    match open.last_mut() {
        Some(element) => element.text.push_str(text),
        None if text.trim().is_empty() => {}
        None => {
            return Err((
                Why::Malformed,
                "text stands outside of the root element".into(),
            ));
        }
    }
    Ok(())
}

/// The encoding that a document declares in its first line, which is ASCII in all encodings but
/// UTF-16.
pub(super) fn declared_encoding(bytes: &[u8]) -> Option<&str> {
    let head = &bytes[..bytes.len().min(256)];
    let end = head.windows(2).position(|two| two == b"?>")?;
    let head = std::str::from_utf8(&head[..end]).ok()?;
    let (_, rest) = head.strip_prefix("<?xml")?.split_once("encoding")?;
    let rest = rest.trim_start().strip_prefix('=')?.trim_start();
    let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    rest[1..].split_once(quote).map(|(name, _)| name)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn elements_become_values() {
        let text = "<?xml version='1.0' encoding='UTF-8'?><!-- c --><a k='1&amp;2'><b>x &lt; &#x7f3a;</b><c/><b><![CDATA[<y>]]></b> t </a>";
        let (name, value) = parse(text).unwrap();
        assert_eq!(
            (name.as_str(), value.to_string().as_str()),
            (
                "a",
                r##"{"@k":"1&2","b":["x < 缺","<y>"],"c":"","#text":"t"}"##
            )
        );
    }

    #[test]
    fn declarations() {
        for (text, declared) in [
            ("<?xml version=\"1.0\" encoding=\"GBK\"?><a/>", Some("GBK")),
            ("<?xml version='1.0' encoding = 'utf8'?>", Some("utf8")),
            ("<?xml version='1.0'?><a encoding='x'/>", None),
            ("<a/>", None),
        ] {
            assert_eq!(declared_encoding(text.as_bytes()), declared, "{text}");
        }
        assert!(
            parse("<?xml version='1.0' encoding='GBK'?><a/>").is_ok(),
            "the text was decoded before"
        );
    }

    #[test]
    fn bad_documents() {
        for (text, why) in [
            ("", Why::Malformed),
            ("<a><b></a>", Why::Malformed),
            ("<a>", Why::Malformed),
            ("<a/><b/>", Why::Malformed),
            ("<!DOCTYPE a [<!ENTITY e 'x'>]><a>&e;</a>", Why::Malformed),
            ("x<a/>", Why::Malformed),
            ("<a>&#0;</a>", Why::Malformed),
        ] {
            assert_eq!(parse(text).unwrap_err().0, why, "{text}");
        }
        let deep = "<a>".repeat(200) + &"</a>".repeat(200);
        assert_eq!(parse(&deep).unwrap_err().0, Why::TooDeep);
    }
}
