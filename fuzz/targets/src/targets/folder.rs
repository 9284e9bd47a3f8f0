//! A folder made of one input.

use std::path::Path;

use base::names::RelPath;

use super::write_file;

/// Files of a folder: each begins with a line `=== NAME`. A content that begins with `\u{2}PNG` or
/// `\u{2}JPEG` gets the header of such an image, so that a changed input still is one.
pub(super) fn write_folder(at: &Path, text: &[u8]) {
    assert!(std::fs::create_dir(at).is_ok());
    let starts: Vec<usize> = (0..text.len())
        .filter(|&at| text[at..].starts_with(b"=== ") && (at == 0 || text[at - 1] == b'\n'))
        .collect();
    for (number, &start) in starts.iter().enumerate() {
        let end = starts.get(number + 1).map_or(text.len(), |next| next - 1);
        let section = &text[start + 4..end.max(start + 4)];
        let line = section
            .iter()
            .position(|&byte| byte == b'\n')
            .unwrap_or(section.len());
        let Some(name) = std::str::from_utf8(&section[..line])
            .ok()
            .and_then(|name| name.parse::<RelPath>().ok())
        else {
            continue;
        };
        let (path, content) = (name.in_dir(at), section.get(line + 1..).unwrap_or_default());
        if path.exists()
            || path.ancestors().skip(1).any(Path::is_file)
            || name.components().count() > 8
        {
            continue;
        }
        assert!(write_file(&path, &with_header(content)).is_ok(), "{path:?}");
    }
}

fn with_header(content: &[u8]) -> Vec<u8> {
    let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x28\0\0\0\x32\x08\x02\0\0\0";
    let jpeg = b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0\xff\xc0\0\x11\x08\0\x32\0\x28\x03\x01\x22\0\x02\x11\x01\x03\x11\x01";
    if let Some(rest) = content.strip_prefix(b"\x02PNG") {
        return [png, rest].concat();
    }
    content
        .strip_prefix(b"\x02JPEG")
        .map_or_else(|| content.to_vec(), |rest| [&jpeg[..], rest].concat())
}
