//! YOLO as its tools write it.

use super::*;

fn yolo(rows: &[u8], more: &[(&str, &[u8])]) -> Input {
    let image = png(640, 480);
    let mut files: Vec<(&str, &[u8])> = vec![("a.txt", rows), ("a.png", &image)];
    files.extend(more);
    Input::folder(&files)
}

#[test]
fn yolo_rows_by_what_all_of_them_say() {
    let names: (&str, &[u8]) = ("classes.txt", "划痕\n凹坑\n".as_bytes());
    for (rows, expected, attrs) in [
        (
            &b"0 0.5 0.5 0.25 0.5 0.91 1"[..],
            "0 bbox 240,120,160,240",
            r#"{"confidence":0.91,"track_id":1}"#,
        ),
        (
            b"0 0.5 0.5 0.25 0.5 7",
            "0 bbox 240,120,160,240",
            r#"{"track_id":7}"#,
        ),
        (
            b"0 0.5 0.5 0.25 0.5 0.4 0.4 0.6 0.6",
            "0 keypoints 240,120,160,240",
            "-",
        ),
        (
            b"0 0.1 0.1 0.2 0.1 0.2 0.2 0.88",
            "0 polygon 64,48,64,48",
            r#"{"confidence":0.88}"#,
        ),
        (b"1.0 0.5 0.5 0.25 0.5", "1 bbox 240,120,160,240", "-"),
    ] {
        let output = yolo(rows, &[names]).read().unwrap();
        assert_eq!(output.rows(), [format!("a.png {expected}")]);
        assert_eq!(output.attrs(), [attrs]);
    }
    let pose = yolo(b"0 0.5 0.5 0.25 0.5 0.4 0.4 0.6 0.6", &[names]);
    assert_eq!(
        pose.read().unwrap().geoms(),
        ["[256.0,192.0,2.0,384.0,288.0,2.0]"]
    );
    assert!(notes(&pose, Category::Inferred)[0].contains("boxes with keypoints of x and y"));
    // A setting says it.
    let pose = pose.column("yolo_task", "segment");
    assert_eq!(
        pose.read().unwrap().rows(),
        ["a.png 0 polygon 160,192,224,96"]
    );
    assert!(notes(&pose, Category::Inferred).is_empty());
    let wrong = yolo(b"0 0.5 0.5 0.25 0.5 0.4 0.4 0.6 0.6", &[names]).column("kpt_shape", "2x3");
    assert!(
        wrong
            .read()
            .unwrap_err()
            .message
            .contains("(kpt_shape) has 10")
    );
    // The rows of a file keep their order, whichever of them had to wait.
    let mixed = yolo(
        b"0 0.5 0.5 0.5 0.5\n1 0 0 1 0 1 1\n0 0.5 0.5 0.25 0.5\n",
        &[names],
    );
    let kinds: Vec<String> = mixed.read().unwrap().rows();
    assert_eq!(
        kinds,
        [
            "a.png 0 bbox 160,120,320,240",
            "a.png 1 polygon 0,0,640,480",
            "a.png 0 bbox 240,120,160,240"
        ]
    );
}

#[test]
fn yolo_folders_of_every_tool() {
    let image = png(640, 480);
    let row: &[u8] = b"0 0.5 0.5 0.25 0.5";
    let turned = [
        &b"\xff\xd8\xff\xe1\0\x22Exif\0\0II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"[..],
        b"\xff\xc0\0\x11\x08\x01\xe0\x02\x80\x03",
    ]
    .concat();
    let webp = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\x7f\x02\0\xdf\x01\0";
    let yaml: (&str, &[u8]) = ("data.yaml", b"names: [\"\\u5212\\u75D5\"]\n");
    for (files, samples) in [
        (
            &[yaml, ("a.txt", row), ("a.Jpg", &image)][..],
            &["a.Jpg 640 480 -"][..],
        ),
        (
            &[yaml, ("a.txt", row), ("a.webp", webp)],
            &["a.webp 640 480 -"],
        ),
        (
            &[yaml, ("a.txt", row), ("a.jpg", &turned)],
            &["a.jpg 480 640 -"],
        ),
        (
            &[
                ("set/data.yaml", b"names: [\"\\u5212\\u75D5\"]"),
                ("set/train/labels/a.txt", row),
                ("set/train/images/a.png", &image),
                ("set/Valid/images/b.png", &image),
            ],
            &[
                "set/Valid/images/b.png 640 480 val",
                "set/train/images/a.png 640 480 train",
            ],
        ),
        (
            &[
                (
                    "data.yaml",
                    "names:\n  0: 划痕\nTrain: train.txt\nValidation: Validation.txt\n".as_bytes(),
                ),
                (
                    "train.txt",
                    b"data/images/x/a.png\r\ndata/images/x/gone.png\n",
                ),
                ("Validation.txt", b"D:\\data\\images\\x\\b.png\n"),
                ("labels/x/a.txt", row),
                ("labels/x/b.txt", row),
                ("images/x/a.png", &image),
                ("images/x/b.png", &image),
            ],
            &["images/x/a.png 640 480 train", "images/x/b.png 640 480 val"],
        ),
        // A list comes before a folder's name, and the first of two lists counts.
        (
            &[
                yaml,
                ("train.txt", b"a.png\n"),
                ("val.txt", b"a.png\ntrain/b.png\n"),
                ("a.txt", row),
                ("a.png", &image),
                ("train/b.png", &image),
            ],
            &["a.png 640 480 train", "train/b.png 640 480 val"],
        ),
        (
            &[
                (
                    "data.yaml",
                    b"names: [\"\\u5212\\u75D5\"]\ntrain: images/a\nval: ../images/b\n",
                ),
                ("labels/a/a.txt", row),
                ("images/a/a.png", &image),
                ("images/b/b.png", &image),
            ],
            &["images/a/a.png 640 480 train", "images/b/b.png 640 480 val"],
        ),
    ] {
        let output = Input::folder(files).format("yolo").read().unwrap();
        assert_eq!(output.sample_rows(), samples);
        assert_eq!(output.class_names(), ["0=划痕"]);
        assert_eq!(
            output.rows().len(),
            files.iter().filter(|(_, bytes)| *bytes == row).count()
        );
    }
    let lists = Input::folder(&[
        yaml,
        ("train.txt", b"gone.png\n"),
        ("a.txt", row),
        ("a.png", &image),
    ]);
    assert_eq!(
        notes(&lists, Category::UnmatchedNames),
        ["train.txt line 1: gone.png"]
    );
    let twice = yolo(row, &[yaml, ("a.jpg", &turned)]);
    assert_eq!(twice.read().unwrap().sample_rows(), ["a.jpg 480 640 -"]);
    assert_eq!(
        notes(&twice, Category::SameName),
        ["a.png: the labels of a.jpg"]
    );
    // An image that cannot be read is passed over for another of its name, and reported.
    let passed = yolo(row, &[yaml, ("a.jpg", b"GIF")]);
    assert_eq!(passed.read().unwrap().sample_rows(), ["a.png 640 480 -"]);
    assert_eq!(
        notes(&passed, Category::SameName),
        ["a.jpg: the labels of a.png"]
    );
    // No image, and one whose size cannot be read, are told apart.
    for (file, said) in [
        ("b.png", "no image that it belongs to was found"),
        ("a.png", "of its image a.png cannot be read"),
    ] {
        let message = Input::folder(&[yaml, ("a.txt", row), (file, b"GIF")])
            .read()
            .unwrap_err()
            .message;
        assert!(message.contains(said), "{message}");
    }
    let none = Input::folder(&[("data.yaml", b"nc: 1\n"), ("a.txt", row)])
        .read()
        .unwrap_err();
    assert!(
        none.message.contains("data.yaml has no names"),
        "{}",
        none.message
    );
    let two = Input::folder(&[
        ("x/data.yaml", b"names: [a]"),
        ("y/data.yaml", b"names: [b]"),
        ("a.txt", row),
    ]);
    assert!(
        two.read()
            .unwrap_err()
            .message
            .contains("name different classes")
    );
}
