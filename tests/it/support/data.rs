//! Data that is generated from a seed: the same in every run.

use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// A random generator whose seed is this purpose.
pub(crate) fn rng(purpose: &str) -> StdRng {
    StdRng::from_seed(*blake3::hash(purpose.as_bytes()).as_bytes())
}

/// Incompressible bytes.
pub(crate) fn noise(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// Writes a file, and creates its folders.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().expect("a file has a parent folder"))
        .expect("create a folder");
    std::fs::write(path, bytes).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}

/// Sets permission bits.
pub(crate) fn chmod(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("set permissions");
}

/// A valid grey PNG of noise, which represents a photo.
pub(crate) fn png(rng: &mut StdRng, width: u32, height: u32) -> Vec<u8> {
    let mut pixels = Vec::new();
    for _ in 0..height {
        pixels.push(0); // the row's filter: none
        pixels.extend(noise(rng, width as usize));
    }
    let mut deflated = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    deflated.write_all(&pixels).expect("write to memory");
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 0, 0, 0, 0]); // 8 bits, grey, no options
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    for (name, body) in [
        (b"IHDR", header),
        (b"IDAT", deflated.finish().expect("write to memory")),
        (b"IEND", Vec::new()),
    ] {
        png.extend((body.len() as u32).to_be_bytes());
        let mut crc = flate2::Crc::new();
        crc.update(name);
        crc.update(&body);
        png.extend(name);
        png.extend(&body);
        png.extend(crc.sum().to_be_bytes());
    }
    png
}

/// An image of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Photo {
    /// Its path in the dataset.
    pub(crate) path: String,
    pub(crate) width: u32,
    pub(crate) height: u32,
}

/// A dataset on disk.
pub(crate) struct Dataset {
    pub(crate) root: PathBuf,
    pub(crate) photos: Vec<Photo>,
}

/// A dataset as factories use it: Chinese names, sub-folders, an empty folder, links, unusual
/// modes, an empty file.
pub(crate) fn dataset(root: &Path, photos: usize) -> Dataset {
    let mut rng = rng("dataset");
    let mut made = Vec::new();
    for i in 0..photos {
        let (width, height) = (rng.random_range(32..160), rng.random_range(24..120));
        let path = format!(
            "产线{}/相机-{}/缺陷 {i:04}.png",
            i % 3 + 1,
            ["甲", "乙"][i % 2]
        );
        write(&root.join(&path), &png(&mut rng, width, height));
        made.push(Photo {
            path,
            width,
            height,
        });
    }
    write(&root.join("说明.txt"), "数据集说明\n".as_bytes());
    write(&root.join("空文件"), b"");
    write(&root.join("tools/convert.sh"), b"#!/bin/sh\necho convert\n");
    chmod(&root.join("tools/convert.sh"), 0o755);
    write(&root.join("tools/private.key"), b"not for everybody\n");
    chmod(&root.join("tools/private.key"), 0o600);
    std::fs::create_dir_all(root.join("待标注/空")).expect("create an empty folder");
    chmod(&root.join("待标注"), 0o750);
    symlink(&made[0].path, root.join("latest.png")).expect("link to a file");
    symlink("../产线1", root.join("tools/line")).expect("link to a folder");
    Dataset {
        root: root.into(),
        photos: made,
    }
}

/// Creates the next version in another folder: some files are changed, added, removed or renamed.
/// Returns it with the number of new bytes.
pub(crate) fn next_dataset(v1: &Dataset, root: &Path) -> (Dataset, u64) {
    copy_tree(&v1.root, root);
    let mut rng = rng("next dataset");
    let mut photos = v1.photos.clone();
    let mut new_bytes = 0;
    for photo in &photos[1..6] {
        let bytes = png(&mut rng, photo.width, photo.height);
        new_bytes += bytes.len() as u64;
        write(&root.join(&photo.path), &bytes);
    }
    for photo in &mut photos[6..26] {
        let moved = format!("归档/{}", photo.path);
        std::fs::create_dir_all(root.join(&moved).parent().expect("it has a folder"))
            .expect("create a folder");
        std::fs::rename(root.join(&photo.path), root.join(&moved)).expect("move a file");
        photo.path = moved;
    }
    for photo in photos.drain(26..30) {
        std::fs::remove_file(root.join(&photo.path)).expect("remove a file");
    }
    for i in 0..4 {
        let photo = Photo {
            path: format!("新增/缺陷 {i}.png"),
            width: 100,
            height: 80,
        };
        let bytes = png(&mut rng, photo.width, photo.height);
        new_bytes += bytes.len() as u64;
        write(&root.join(&photo.path), &bytes);
        photos.push(photo);
    }
    (
        Dataset {
            root: root.into(),
            photos,
        },
        new_bytes,
    )
}

/// An operator project: many small text files, some of them programs.
pub(crate) fn operator(root: &Path) {
    for package in ["detect", "classify", "postprocess"] {
        for module in 0..15 {
            let mut text = format!("\"\"\"Operator {package}, module {module}.\"\"\"\n\n\n");
            for function in 0..20 {
                text += &format!(
                    "def step_{function}(image, threshold=0.{function}):\n    return {package}_{module}(image) > threshold\n\n\n"
                );
            }
            write(
                &root.join(format!("src/{package}/module_{module}.py")),
                text.as_bytes(),
            );
        }
        write(&root.join(format!("src/{package}/__init__.py")), b"");
    }
    write(
        &root.join("run.sh"),
        b"#!/bin/sh\nexec python3 -m detect \"$@\"\n",
    );
    chmod(&root.join("run.sh"), 0o755);
    write(&root.join(".gitignore"), b"__pycache__\n");
    symlink("src/detect/module_0.py", root.join("main.py")).expect("link to a file");
}

/// A model: one large file of noise and a small one.
pub(crate) fn model(root: &Path, len: usize) {
    write(
        &root.join("model.safetensors"),
        &noise(&mut rng("model"), len),
    );
    write(
        &root.join("配置.json"),
        br#"{"classes":3,"input":[1,3,640,640]}"#,
    );
}

/// Copies a folder, links and modes included.
pub(crate) fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("create a folder");
    let source = format!("{}/.", from.display());
    super::command::tool("cp", &["-a", &source, to.to_str().expect("a UTF-8 path")]);
}
