//! Images: archives of `docker save`, OCI layouts as archives and folders, compressed or not.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use base::sha256::Sha256;
use source::image::{ImageOptions, ImageSource};
use source::{Content, Source as _, SourceBody, SourceEntry};

use super::{Parts, joined, scratch, write_file};
use crate::Target;
use crate::outcome::{note, taken};

pub(super) const IMAGE: Target = Target {
    name: "image",
    about: "an image: an archive as it is (first byte 0), or made of the given members, compressed or as a folder",
    run: image,
    seeds,
    words: &[
        "index.json",
        "oci-layout",
        "manifest.json",
        "blobs/sha256/",
        "imageLayoutVersion",
        "schemaVersion",
        "mediaType",
        "manifests",
        "config",
        "layers",
        "digest",
        "size",
        "platform",
        "os",
        "architecture",
        "annotations",
        "Config",
        "RepoTags",
        "Layers",
        "rootfs",
        "diff_ids",
        "subject",
        "artifactType",
        "@0@",
        "@1@",
        "@2@",
        "#0#",
        "#1#",
        "../",
        "./",
        "/",
        "org.opencontainers.image.ref.name",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "vnd.docker.reference.digest",
        "PaxHeader",
        "ustar",
    ],
    short: 250,
};

/// Bytes of a member's name in a tar header.
const NAME_BYTES_MAX: usize = 100;

const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
const CONFIG: &[u8] =
    br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["@0@"]}}"#;
const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"@1@","size":#1#},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"@0@","size":#0#}]}"#;
const INDEX: &[u8] = br#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"@2@","size":#2#,"platform":{"os":"linux","architecture":"amd64"},"annotations":{"org.opencontainers.image.ref.name":"v1"}}]}"#;
const REFERRER: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"x","digest":"@0@","size":#0#},"layers":[],"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"@2@","size":#2#}}"#;
const SIGNED_INDEX: &[u8] = br#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"@2@","size":#2#},{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"@3@","size":#3#}]}"#;
const SAVED: &[u8] =
    br#"[{"Config":"config.json","RepoTags":["app:v1"],"Layers":["a/layer.tar","b/layer.tar"]}]"#;
const SAVED_CONFIG: &[u8] =
    br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["@0@","@0@"]}}"#;

fn seeds() -> Vec<Vec<u8>> {
    let member = |kind: u8, name: &str, content: &[u8]| {
        [&[kind, name.len() as u8][..], name.as_bytes(), content].concat()
    };
    let layer = tar(&[Member {
        kind: 0,
        name: b"etc/hostname".to_vec(),
        content: b"panel".to_vec(),
    }]);
    let oci = [
        member(BLOB, "", &layer),
        member(BLOB, "", CONFIG),
        member(BLOB, "", MANIFEST),
        member(FILE, "index.json", INDEX),
        member(FILE, "oci-layout", LAYOUT),
    ];
    let saved = [
        member(FILE, "a/layer.tar", &layer),
        member(SYMLINK, "b/layer.tar", b"../a/layer.tar"),
        member(FILE, "config.json", SAVED_CONFIG),
        member(FILE, "manifest.json", SAVED),
    ];
    let parts = |members: &[Vec<u8>]| {
        let members: Vec<&[u8]> = members.iter().map(|member| &member[..]).collect();
        joined(&[], &members)
    };
    let mut all: Vec<Vec<u8>> = (1..=4)
        .map(|form| [&[form][..], &parts(&oci)[..]].concat())
        .collect();
    let signed = [
        member(BLOB, "", &layer),
        member(BLOB, "", CONFIG),
        member(BLOB, "", MANIFEST),
        member(BLOB, "", REFERRER),
        member(FILE, "index.json", SIGNED_INDEX),
        member(FILE, "oci-layout", LAYOUT),
    ];
    all.push([&[4][..], &parts(&signed)[..]].concat());
    all.extend((1..=3).map(|form| [&[form][..], &parts(&saved)[..]].concat()));
    let archive = |members: &[Vec<u8>]| {
        let parts: Vec<&[u8]> = members.iter().map(|member| &member[..]).collect();
        [&[0][..], &tar(&resolved(&parts))[..]].concat()
    };
    all.extend([archive(&oci), archive(&saved)]);
    all
}

const FILE: u8 = 0;
const BLOB: u8 = 1;
const SYMLINK: u8 = 2;
const HARD_LINK: u8 = 3;
const DIR: u8 = 4;
const LONG_NAME: u8 = 5;
const PAX: u8 = 6;

/// One member of an archive that is made.
struct Member {
    kind: u8,
    name: Vec<u8>,
    content: Vec<u8>,
}

/// The members of an input: each part is a kind, the length of a name, the name, the content. In a
/// content `@N@` stands for the digest of member N, and `#N#` for its size, where N is the number
/// of a member before it; a member of the kind `BLOB` is named by its digest.
fn resolved(parts: &[&[u8]]) -> Vec<Member> {
    let mut members: Vec<Member> = Vec::new();
    for part in parts {
        let mut rest = Parts::new(part);
        let kind = rest.byte() % 8;
        let len = usize::from(rest.byte()).min(rest.rest.len());
        let (name, content) = rest.rest.split_at(len);
        let content = filled(content, &members);
        let name = if kind == BLOB {
            Sha256::of(&content).layout_path().into_bytes()
        } else {
            name.to_vec()
        };
        members.push(Member {
            kind,
            name,
            content,
        });
    }
    members
}

fn filled(content: &[u8], before: &[Member]) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len());
    let mut rest = content;
    while let Some((&first, after)) = rest.split_first() {
        if let [mark @ (b'@' | b'#'), digit @ b'0'..=b'9', end, ..] = rest
            && mark == end
            && let Some(member) = before.get(usize::from(digit - b'0'))
        {
            let text = if *mark == b'@' {
                Sha256::of(&member.content).to_string()
            } else {
                member.content.len().to_string()
            };
            out.extend_from_slice(text.as_bytes());
            rest = &rest[3..];
            continue;
        }
        out.push(first);
        rest = after;
    }
    out
}

fn tar(members: &[Member]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for Member {
        kind,
        name,
        content,
    } in members
    {
        let mut header = tar::Header::new_ustar();
        let (entry, link, data): (_, &[u8], &[u8]) = match *kind {
            SYMLINK => (tar::EntryType::Symlink, content, b""),
            HARD_LINK => (tar::EntryType::Link, content, b""),
            DIR => (tar::EntryType::Directory, b"", b""),
            LONG_NAME => (tar::EntryType::GNULongName, b"", content),
            PAX => (tar::EntryType::XHeader, b"", content),
            7 => (
                tar::EntryType::new(*content.first().unwrap_or(&b'x')),
                b"",
                content,
            ),
            _ => (tar::EntryType::Regular, b"", content),
        };
        let raw = header.as_old_mut();
        let (name, link) = (
            &name[..name.len().min(NAME_BYTES_MAX)],
            &link[..link.len().min(NAME_BYTES_MAX)],
        );
        raw.name[..name.len()].copy_from_slice(name);
        raw.linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(entry);
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        header.set_cksum();
        assert!(archive.append(&header, data).is_ok());
    }
    archive.into_inner().unwrap_or_default()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    assert!(out.write_all(bytes).is_ok());
    out.finish().unwrap_or_default()
}

fn image(input: &[u8]) {
    let dir = scratch();
    let path = dir.path().join("image.in");
    let mut parts = Parts::new(input);
    let form = parts.byte() % 5;
    let written = match form {
        0 => write_file(&path, parts.rest),
        1 => write_file(&path, &tar(&resolved(&parts.all()))),
        2 => write_file(&path, &gzip(&tar(&resolved(&parts.all())))),
        3 => write_file(
            &path,
            &zstd::bulk::compress(&tar(&resolved(&parts.all())), 1).unwrap_or_default(),
        ),
        _ => folder(&path, &resolved(&parts.all())),
    };
    assert!(written.is_ok(), "{written:?}");
    let scratch = dir.path().join("scratch");
    assert!(std::fs::create_dir(&scratch).is_ok());
    let options = ImageOptions {
        referrers: true,
        ..ImageOptions::default()
    };
    let opened = ImageSource::open_for(&path, &scratch, None, &options, &Arc::default());
    let Some(first) = taken(opened) else {
        return;
    };
    let info = first.image_info().clone();
    let layout = dir.path().join("layout");
    write_layout(first, &layout);
    // What was taken, written as the layout that it is, is the same image.
    let again = ImageSource::open_layout(&layout, &options);
    assert!(again.is_ok(), "{:?}", again.err());
    if let Ok(again) = again {
        assert_eq!(
            (&again.image_info().digest, &again.image_info().platforms),
            (&info.digest, &info.platforms)
        );
        assert_eq!(again.image_info().referrers, info.referrers);
        note("the same image");
    }
}

fn folder(at: &Path, members: &[Member]) -> std::io::Result<()> {
    std::fs::create_dir(at)?;
    for member in members {
        // Names as text, which stay in the folder.
        let Some(path) = std::str::from_utf8(&member.name)
            .ok()
            .and_then(|name| name.parse::<base::names::RelPath>().ok())
        else {
            continue;
        };
        let path = path.in_dir(at);
        // A name may be that of a folder, or be in a file.
        if path.exists()
            || path
                .parent()
                .is_some_and(|parent| parent.exists() && !parent.is_dir())
            || path.ancestors().any(Path::is_file)
        {
            continue;
        }
        write_file(&path, &member.content)?;
    }
    Ok(())
}

fn write_layout(mut source: ImageSource, at: &Path) {
    let mut last: Option<SourceEntry> = None;
    while let Ok(Some(entry)) = source.next() {
        assert!(
            last.is_none_or(|last| last.path < entry.path),
            "entries come in the order of manifests"
        );
        let path = entry.path.in_dir(at);
        match &entry.body {
            SourceBody::Dir => assert!(std::fs::create_dir_all(&path).is_ok()),
            SourceBody::Symlink(target) => assert!(target.is_empty(), "a link in a layout"),
            SourceBody::File { size, content } => {
                let bytes = read(content, *size);
                assert_eq!(bytes.len() as u64, *size);
                if let Some(digest) = Sha256::from_layout_path(entry.path.as_str()) {
                    assert_eq!(
                        Sha256::of(&bytes),
                        digest,
                        "a blob has the content that its name says"
                    );
                }
                assert!(write_file(&path, &bytes).is_ok());
            }
        }
        last = Some(entry);
    }
}

fn read(content: &Content, size: u64) -> Vec<u8> {
    match content {
        Content::Memory(bytes) => bytes.to_vec(),
        Content::File(path) | Content::Scratch(path) => std::fs::read(path).unwrap_or_default(),
        Content::Range { file, offset } => {
            let all = std::fs::read(&**file).unwrap_or_default();
            let end = offset.saturating_add(size).min(all.len() as u64);
            all.get(*offset as usize..end as usize)
                .unwrap_or_default()
                .to_vec()
        }
    }
}
