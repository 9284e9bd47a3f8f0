//! How the path that a record has for its image becomes the sample's path in the dataset.
//!
//! The rules, in this order: the setting `path_strip` takes a leading part away; of a URL the part
//! behind the host counts; a backslash is a slash; a drive (`D:`) or a share (`\\host\share`) is
//! taken away; `./` in front is; `path_keep` keeps so many components from the end; `path_prefix`
//! and `path_suffix` are put around. An absolute path is refused. What a rule other than a setting
//! changed is reported. Nothing here does I/O.

use std::borrow::Cow;

/// The settings.
#[derive(Debug, Default, Clone)]
pub(super) struct PathRules {
    /// A leading part that is taken away.
    pub(super) strip: Option<String>,
    /// How many components from the end stay.
    pub(super) keep: Option<usize>,
    /// A folder that is put in front.
    pub(super) prefix: Option<String>,
    /// What is put behind: an extension.
    pub(super) suffix: Option<String>,
    /// Where sample paths come from.
    pub(super) from: PathFrom,
}

/// Where the path of a sample comes from, for formats that have both a record's word and images
/// beside it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathFrom {
    /// The image that the record names, where it is there; else the one with the name of the label
    /// file, where it is there.
    #[default]
    Either,
    /// What the record says.
    Record,
    /// An image that is there.
    Image,
}

impl PathRules {
    /// The path, and whether a rule changed it.
    pub(super) fn apply(&self, text: &str) -> (String, bool) {
        let text = text.trim();
        let mut stripped = false;
        let text = self.strip.as_deref().map_or(Cow::Borrowed(text), |strip| {
            match strip_start(text, strip) {
                Some(rest) => {
                    stripped = true;
                    rest
                }
                None => Cow::Borrowed(text),
            }
        });
        let (mut path, mut changed) = match of_url(&text) {
            Some(path) => (path, true),
            None => (text.into_owned(), false),
        };
        if path.contains('\\') {
            path = path.replace('\\', "/");
            changed = true;
        }
        if let Some(rest) = without_drive(&path).filter(|_| !stripped) {
            path = rest.to_owned();
            changed = true;
        }
        while let Some(rest) = path.strip_prefix("./") {
            path = rest.to_owned();
        }
        if let Some(keep) = self.keep {
            let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
            path = parts[parts.len().saturating_sub(keep)..].join("/");
        }
        if let Some(prefix) = &self.prefix {
            path = format!("{}/{path}", prefix.trim_end_matches('/'));
        }
        if let Some(suffix) = &self.suffix {
            path.push_str(suffix);
        }
        (path, changed)
    }
}

/// The rest behind a leading part, whichever way either writes its slashes.
fn strip_start<'a>(text: &'a str, strip: &str) -> Option<Cow<'a, str>> {
    let separators = ['/', '\\'];
    if let Some(rest) = text.strip_prefix(strip) {
        return Some(Cow::Borrowed(rest.trim_start_matches(separators)));
    }
    // One byte takes the place of one byte, so positions stay.
    let rest = text
        .replace('\\', "/")
        .strip_prefix(&strip.replace('\\', "/"))
        .map(str::len)?;
    Some(Cow::Borrowed(
        text[text.len() - rest..].trim_start_matches(separators),
    ))
}

/// Whether a path names a place on one machine: it has a drive, a share or a root.
pub(super) fn is_of_one_machine(path: &str) -> bool {
    path.starts_with(['/', '\\']) || without_drive(path).is_some() || of_url(path).is_some()
}

/// The rest of `D:/x` or `//host/share/x`, slashes only.
fn without_drive(path: &str) -> Option<&str> {
    if let Some(unc) = path.strip_prefix("//") {
        // `//?/D:/x` is the long form of `D:/x`.
        if let Some(long) = unc.strip_prefix("?/") {
            return Some(without_drive(long).unwrap_or(long));
        }
        let mut parts = unc.splitn(3, '/');
        return parts.nth(2);
    }
    let bytes = path.as_bytes();
    let is_drive = bytes.len() >= 2 && bytes[0].is_ascii_alphabetic() && bytes[1] == b':';
    is_drive.then(|| path[2..].trim_start_matches(['/', '\\']))
}

/// The path that a URL has on its host: `http://host/KEY?x` gives KEY, its escapes decoded,
/// `s3://bucket/KEY` gives KEY as it is, and `file:///D:/x` gives `D:/x`. `None` for what is no
/// URL.
pub(super) fn of_url(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let is_scheme = scheme.len() > 1
        && scheme
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    if !is_scheme {
        return None;
    }
    let (_, key) = rest.split_once('/')?;
    Some(match scheme.to_ascii_lowercase().as_str() {
        "http" | "https" => decode_percent(key.split(['?', '#']).next().unwrap_or(key)),
        "file" => decode_percent(key),
        _ => key.to_owned(),
    })
}

/// `%E5%9B%BE` as it was meant; what is no such escape stays.
pub(super) fn decode_percent(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let escape = (bytes[at] == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten();
        match escape.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_other_machines() {
        let rules = PathRules::default();
        for (text, path, changed) in [
            ("images/a b.png", "images/a b.png", false),
            (" ./a.png ", "a.png", false),
            (r"images\板1.png", "images/板1.png", true),
            (r".\a.png", "a.png", true),
            (r"D:\数据\板1.jpg", "数据/板1.jpg", true),
            ("c:/x/a.jpg", "x/a.jpg", true),
            (r"\\nas\share\x\a.jpg", "x/a.jpg", true),
            (r"\\?\D:\x\a.jpg", "x/a.jpg", true),
            (
                "https://host:80/line3/a%20b.png?sig=1#x",
                "line3/a b.png",
                true,
            ),
            ("s3://bucket/line3/a%20b.png", "line3/a%20b.png", true),
            ("gs://bucket/a.png", "a.png", true),
            ("file:///D:/x/a.png", "x/a.png", true),
            ("/data/a.png", "/data/a.png", false),
            ("100%.png", "100%.png", false),
        ] {
            assert_eq!(rules.apply(text), (path.to_owned(), changed), "{text}");
        }
    }

    #[test]
    fn settings() {
        let rules = PathRules {
            strip: Some("D:/数据/".into()),
            ..PathRules::default()
        };
        assert_eq!(rules.apply(r"D:\数据\x\a.jpg"), ("x/a.jpg".into(), true));
        assert_eq!(rules.apply("D:/数据/a.jpg"), ("a.jpg".into(), false));
        let rules = PathRules {
            keep: Some(2),
            ..PathRules::default()
        };
        assert_eq!(rules.apply("/data/1/x/a.jpg").0, "x/a.jpg");
        assert_eq!(rules.apply("a.jpg").0, "a.jpg");
        let rules = PathRules {
            prefix: Some("images/".into()),
            suffix: Some(".jpg".into()),
            ..PathRules::default()
        };
        assert_eq!(rules.apply("abc").0, "images/abc.jpg");
    }
}
