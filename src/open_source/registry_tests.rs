//! How the settings of a registry change the way to it.

use super::*;

fn access(more: &str) -> Access {
    let text = format!(
        "role = \"hub\"\nname = \"hub\"\ndata_dir = \"/d\"\n[listen]\nquic = \"127.0.0.1:0\"\n{more}"
    );
    Access::of_daemon(
        &config::parse(&text, "a test").unwrap(),
        None,
        content::manifest::FORMAT_MAX,
    )
}

#[test]
fn a_certificate_of_a_registry_on_this_machine_means_tls() {
    let uses_tls = |access: &Access, source: &str, options: &SourceOptions| {
        let reference = source.parse().unwrap();
        let (reference, _) = access.to_registry(reference, options).unwrap();
        reference.origin.https
    };
    let none = SourceOptions::default();
    let plain = access("");
    let with_ca = access("[registry.\"127.0.0.1:5000\"]\nca_file = \"/etc/ca.pem\"\n");
    let insecure = access("[registry.\"127.0.0.1:5000\"]\ninsecure = true\n");
    for (source, of_plain, of_settings) in [
        ("registry://127.0.0.1:5000/a:v1", false, true),
        ("docker://127.0.0.1:5000/a:v1", false, true),
        ("registry+http://127.0.0.1:5000/a:v1", false, false),
        ("http://127.0.0.1:5000/a:v1", false, false),
        ("https://127.0.0.1:5000/a:v1", true, true),
        // Another registry.
        ("registry://127.0.0.1:5001/a:v1", false, false),
        ("registry://r.example.com/a:v1", true, true),
    ] {
        assert_eq!(uses_tls(&plain, source, &none), of_plain, "{source}");
        assert_eq!(uses_tls(&with_ca, source, &none), of_settings, "{source}");
        assert_eq!(uses_tls(&insecure, source, &none), of_settings, "{source}");
    }
    let dir = tempfile::tempdir().unwrap();
    let user = Access::of_user(dir.path(), content::manifest::FORMAT_MAX);
    let options = SourceOptions {
        ca_file: Some("/etc/ca.pem".into()),
        ..SourceOptions::default()
    };
    let source = "registry://127.0.0.1:5000/a:v1";
    assert!(uses_tls(&user, source, &options) && !uses_tls(&user, source, &none));
}
