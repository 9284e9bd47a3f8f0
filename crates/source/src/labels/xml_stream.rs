//! XML of any length in a fixed amount of memory: elements are entered, or captured as JSON values
//! as `xml` makes them.
//!
//! `quick-xml` reads the syntax and expands no entity that a document declares; what is bounded here
//! is what it does not bound: one tag or text and one captured element in bytes, elements in depth.

use std::cell::Cell;
use std::io::{self, BufRead, Read};
use std::rc::Rc;

use quick_xml::Reader;
use quick_xml::events::Event;
use serde_json::Value;

use base::fault::Fault;
use base::limits::{LABEL_DEPTH_MAX, LABEL_TASK_BYTES_MAX};

use super::refuse::Why;
use super::xml::{self, Open};

/// A document that is read element by element.
pub(super) struct XmlStream<R> {
    reader: Reader<Bounded<R>>,
    left: Rc<Cell<usize>>,
    buffer: Vec<u8>,
    depth: u32,
    /// The element that [`XmlStream::next`] gave ended with its start tag.
    is_empty: bool,
}

/// An event without its text.
enum Found {
    Start(Result<Open, (Why, String)>),
    Empty(Result<Open, (Why, String)>),
    End,
    Eof,
    Error(String),
}

/// What comes next.
pub(super) enum Step {
    /// An element begins.
    Start(Open),
    /// The element that was entered ends; or the document.
    End,
}

impl<R: BufRead> XmlStream<R> {
    pub(super) fn new(inner: R) -> Self {
        let left = Rc::new(Cell::new(LABEL_TASK_BYTES_MAX));
        let bounded = Bounded {
            inner,
            left: left.clone(),
        };
        Self {
            reader: Reader::from_reader(bounded),
            left,
            buffer: Vec::new(),
            depth: 0,
            is_empty: false,
        }
    }

    /// A fault at this place, which ends the reading.
    pub(super) fn fault(&self, why: impl std::fmt::Display) -> Fault {
        let at = self.reader.buffer_position();
        Fault::integrity(format!("malformed XML at byte {at}: {why}"))
            .with_next(Why::Malformed.advice())
    }

    /// The next child of the element that was entered, or its end. Text is left out. The child is
    /// to be entered, captured or skipped.
    pub(super) fn next(&mut self) -> Result<Step, Fault> {
        if std::mem::take(&mut self.is_empty) {
            self.depth -= 1;
            return Ok(Step::End);
        }
        loop {
            self.left.set(LABEL_TASK_BYTES_MAX);
            self.buffer.clear();
            let found = match self.reader.read_event_into(&mut self.buffer) {
                Ok(Event::Start(tag)) => Found::Start(xml::start(&tag)),
                Ok(Event::Empty(tag)) => Found::Empty(xml::start(&tag)),
                Ok(Event::End(_)) => Found::End,
                Ok(Event::Eof) => Found::Eof,
                Ok(_) => continue,
                Err(error) => Found::Error(error.to_string()),
            };
            let open = match found {
                Found::Start(open) => open,
                Found::Empty(open) => {
                    self.is_empty = true;
                    open
                }
                Found::End => {
                    self.depth = self.depth.saturating_sub(1);
                    return Ok(Step::End);
                }
                Found::Eof if self.depth > 0 => {
                    return Err(self.fault("it ends within an element: it is cut off"));
                }
                Found::Eof => return Ok(Step::End),
                Found::Error(why) => return Err(self.fault(why)),
            };
            self.depth += 1;
            if self.depth > LABEL_DEPTH_MAX {
                return Err(self.fault(format!("it is nested deeper than {LABEL_DEPTH_MAX}")));
            }
            return open.map(Step::Start).map_err(|(_, why)| self.fault(why));
        }
    }

    /// The whole element that [`XmlStream::next`] gave.
    pub(super) fn capture(&mut self, open: Open) -> Result<Value, Fault> {
        if std::mem::take(&mut self.is_empty) {
            self.depth -= 1;
            return Ok(open.close().1);
        }
        let base = self.depth;
        let mut stack = vec![open];
        self.left.set(LABEL_TASK_BYTES_MAX);
        loop {
            self.buffer.clear();
            let deep = stack.len() as u32 + base > LABEL_DEPTH_MAX;
            let mut done = None;
            let taken = match self.reader.read_event_into(&mut self.buffer) {
                Ok(Event::Start(_) | Event::Empty(_)) if deep => Err((
                    Why::TooDeep,
                    format!("it is nested deeper than {LABEL_DEPTH_MAX}"),
                )),
                Ok(Event::Start(tag)) => xml::start(&tag).map(|open| stack.push(open)),
                Ok(Event::Empty(tag)) => {
                    xml::start(&tag).and_then(|open| xml::close(open, &mut stack, &mut done))
                }
                Ok(Event::End(_)) => match stack.pop() {
                    Some(element) => xml::close(element, &mut stack, &mut done),
                    None => Err((Why::Malformed, "an end tag without its start".into())),
                },
                Ok(Event::Text(text)) => xml::add_text(&text, &mut stack),
                Ok(Event::CData(text)) => xml::add_text(&text, &mut stack),
                Ok(Event::GeneralRef(name)) => xml::add_reference(&name, &mut stack),
                Ok(Event::Eof) => Err((
                    Why::Malformed,
                    "it ends within an element: it is cut off".into(),
                )),
                Ok(_) => Ok(()),
                Err(error) => Err((Why::Malformed, error.to_string())),
            };
            taken.map_err(|(_, why)| self.fault(why))?;
            if let Some((_, value)) = done {
                self.depth -= 1;
                return Ok(value);
            }
        }
    }

    /// Passes over the element that [`XmlStream::next`] gave.
    pub(super) fn skip(&mut self) -> Result<(), Fault> {
        let above = self.depth - 1;
        while self.depth > above {
            self.next()?;
        }
        Ok(())
    }
}

/// A reader that gives up after so many bytes since the last event.
struct Bounded<R> {
    inner: R,
    left: Rc<Cell<usize>>,
}

impl<R: BufRead> Read for Bounded<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(out.len());
        out[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Bounded<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.left.get() == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("an element is larger than {LABEL_TASK_BYTES_MAX} bytes"),
            ));
        }
        let available = self.inner.fill_buf()?;
        let most = available.len().min(self.left.get());
        Ok(&available[..most])
    }

    fn consume(&mut self, count: usize) {
        self.left.set(self.left.get().saturating_sub(count));
        self.inner.consume(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_entered_captured_and_skipped() {
        let text =
            "<?xml version=\"1.0\"?><a><b x=\"1\"/><c><d>t &amp; u</d><d/></c><e><f/></e>tail</a>";
        let mut xml = XmlStream::new(text.as_bytes());
        let start = |xml: &mut XmlStream<&[u8]>| match xml.next().unwrap() {
            Step::Start(open) => open,
            Step::End => unreachable!(),
        };
        assert_eq!(start(&mut xml).name(), "a");
        let b = start(&mut xml);
        assert_eq!(xml.capture(b).unwrap(), serde_json::json!({"@x": "1"}));
        let c = start(&mut xml);
        assert_eq!(
            xml.capture(c).unwrap(),
            serde_json::json!({"d": ["t & u", ""]})
        );
        assert_eq!(start(&mut xml).name(), "e");
        xml.skip().unwrap();
        assert!(matches!(xml.next().unwrap(), Step::End));
        assert!(matches!(xml.next().unwrap(), Step::End));
        let mut cut = XmlStream::new("<a><b>".as_bytes());
        let _a = start(&mut cut);
        let b = start(&mut cut);
        assert!(cut.capture(b).unwrap_err().message.contains("cut off"));
    }
}
