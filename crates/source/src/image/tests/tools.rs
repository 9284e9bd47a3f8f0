//! Images of skopeo and umoci, and their view of generated images; both programs must be installed.

use std::collections::BTreeMap;
use std::process::Command;

use super::*;

pub(super) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| unreachable!("this test needs {program}: apt install {program} ({e})"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn skopeo(from: &str, to: &str) {
    run(
        "skopeo",
        &["--insecure-policy", "copy", "--quiet", from, to],
    );
}

/// An OCI layout with gzip layers, created by umoci: `<dir>/base:v1`.
fn umoci_image(case: &Case) -> String {
    let base = case.path("base").display().to_string();
    let image = format!("{base}:v1");
    run("umoci", &["init", "--layout", &base]);
    run("umoci", &["new", "--image", &image]);
    write(&case.path("tree/app/模型.txt"), b"weights");
    write(&case.path("more"), &b"0123456789".repeat(5000));
    run(
        "umoci",
        &[
            "insert",
            "--rootless",
            "--image",
            &image,
            case.path("tree").to_str().unwrap(),
            "/opt",
        ],
    );
    run(
        "umoci",
        &[
            "insert",
            "--rootless",
            "--image",
            &image,
            case.path("more").to_str().unwrap(),
            "/opt/more",
        ],
    );
    image
}

/// The tree that umoci unpacks from a layout, and the digest that skopeo reports.
pub(super) fn unpacked(case: &Case, layout: &Path) -> (String, PathBuf) {
    let inspected: Value = serde_json::from_str(&run(
        "skopeo",
        &["inspect", &format!("oci:{}", layout.display())],
    ))
    .unwrap();
    let tagged = case.path("tagged").display().to_string();
    let _ = fs::remove_dir_all(&tagged);
    let bundle = case.path("bundle");
    let _ = fs::remove_dir_all(&bundle);
    skopeo(
        &format!("oci:{}", layout.display()),
        &format!("oci:{tagged}:t"),
    );
    run(
        "umoci",
        &[
            "unpack",
            "--rootless",
            "--image",
            &format!("{tagged}:t"),
            bundle.to_str().unwrap(),
        ],
    );
    (
        inspected["Digest"].as_str().unwrap().to_owned(),
        bundle.join("rootfs"),
    )
}

#[test]
fn images_of_skopeo_and_umoci_are_read_and_unpack() {
    let case = Case::new();
    let image = umoci_image(&case);
    let raw: Value =
        serde_json::from_str(&run("skopeo", &["inspect", &format!("oci:{image}")])).unwrap();
    let forms = [("oci-archive", "oci.tar"), ("docker-archive", "docker.tar")];
    for (kind, name) in forms {
        skopeo(
            &format!("oci:{image}"),
            &format!("{kind}:{}:app:v1", case.path(name).display()),
        );
    }
    let mut digests = BTreeMap::new();
    for name in ["base", "oci.tar", "docker.tar"] {
        let source = ImageSource::open(&case.path(name), &case.path("none")).unwrap();
        let info = source.image_info().clone();
        assert_eq!(info.platforms.len(), 1, "{info:?}");
        assert!(info.platforms[0].starts_with("linux/"), "{info:?}");
        let out = case.path(&format!("{name}.out"));
        write_out(source, &out);
        let (digest, rootfs) = unpacked(&case, &out);
        assert_eq!(digest, info.digest);
        assert_eq!(
            fs::read(rootfs.join("opt/app/模型.txt")).unwrap(),
            b"weights"
        );
        assert_eq!(fs::metadata(rootfs.join("opt/more")).unwrap().len(), 50_000);
        digests.insert(name, digest);
    }
    // An OCI form keeps the original bytes; a docker archive gets a generated manifest, always the
    // same one.
    assert_eq!(digests["base"], raw["Digest"].as_str().unwrap());
    assert_eq!(digests["oci.tar"], digests["base"]);
    let again = ImageSource::open(&case.path("docker.tar"), &case.path("none")).unwrap();
    assert_eq!(again.image_info().digest, digests["docker.tar"]);
}
