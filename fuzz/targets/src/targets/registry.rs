//! What registries answer: status, headers, bodies.

use registry::testing::answers;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use base::text::is_unsafe;

use crate::Target;
use crate::outcome::{note, taken};

pub(super) const ANSWER: Target = Target {
    name: "registry_answer",
    about: "an answer of a registry: the status, header lines, an empty line, the body",
    run: answer,
    seeds: || {
        let manifest = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":3}],"subject":{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":3}}"#;
        [
            "401\nwww-authenticate: Bearer realm=\"https://auth.example.com/token\",service=\"registry\",scope=\"repository:a:pull\"\n\n{\"errors\":[{\"code\":\"UNAUTHORIZED\",\"message\":\"no\"}]}",
            "401\nwww-authenticate: Basic realm=\"x\", Bearer realm=\"y\"\n\n",
            "429\nretry-after: 7\n\nslow down",
            "503\nretry-after: Fri, 01 Jan 2100 00:00:00 GMT\ncontent-type: text/html\n\n<html>",
            "202\nlocation: /v2/a/blobs/uploads/1?_state=x\nrange: 0-1023\n\n",
            "200\nlink: </v2/a/tags/list?n=100&last=b>; rel=\"next\"\n\n{\"name\":\"a\",\"tags\":[\"v1\",\"v2\"]}",
            "500\n\n{\"errors\":[{\"code\":\"UNKNOWN\",\"message\":\"unknown error\",\"detail\":{\"Err\":28}}]}",
            "200\n\n{\"token\":\"a.eyJhY2Nlc3MiOltdfQ.c\",\"access_token\":\"b\",\"expires_in\":300}",
            "200\n\n{\"manifests\":[{\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"digest\":\"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\",\"size\":3,\"platform\":{\"os\":\"linux\",\"architecture\":\"amd64\"}}]}",
            &format!("200\ncontent-type: application/vnd.oci.image.manifest.v1+json\ndocker-content-digest: sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n\n{manifest}"),
        ]
        .iter()
        .map(|text| text.as_bytes().to_vec())
        .collect()
    },
    words: &[
        "www-authenticate",
        "bearer",
        "basic",
        "realm",
        "service",
        "retry-after",
        "link",
        "rel=\"next\"",
        "range",
        "content-type",
        "text/html",
        "docker-content-digest",
        "location",
        "errors",
        "code",
        "message",
        "detail",
        "DENIED",
        "token",
        "expires_in",
        "manifests",
        "layers",
        "config",
        "platform",
        "schemaVersion",
        "\\\"",
        "<",
        ">",
        ";",
    ],
    short: 1500,
};

fn answer(input: &[u8]) {
    let mut rest = input;
    let status = line(&mut rest).map_or(0, |text| {
        String::from_utf8_lossy(text)
            .trim()
            .parse::<u16>()
            .unwrap_or(200)
    });
    let mut headers = HeaderMap::new();
    while let Some(text) = line(&mut rest).filter(|text| !text.is_empty()) {
        let Some(colon) = text.iter().position(|&byte| byte == b':') else {
            continue;
        };
        let name = HeaderName::from_bytes(&text[..colon]);
        if let (Ok(name), Ok(value)) = (
            name,
            HeaderValue::from_bytes(text[colon + 1..].trim_ascii()),
        ) && headers.len() < 100
        {
            headers.append(name, value);
        }
    }
    let read = answers::read(status, &headers, rest);
    let fault = &read.fault;
    note(&fault.message);
    assert!(!fault.message.contains(is_unsafe), "{:?}", fault.message);
    assert!(
        fault.message.len() < 4096 && !fault.next.is_empty(),
        "{fault:?}"
    );
    if let base::fault::Retry::AfterMs(pause) = fault.retry {
        assert!(pause <= 24 * 3_600_000, "a pause of {pause} ms");
    }
    for what in read.notes {
        note(&what);
    }
    taken(read.manifest);
}

/// The next line, without its end.
fn line<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    if rest.is_empty() {
        return None;
    }
    let end = rest
        .iter()
        .position(|&byte| byte == b'\n')
        .unwrap_or(rest.len());
    let text = &rest[..end];
    *rest = &rest[(end + 1).min(rest.len())..];
    Some(text)
}
