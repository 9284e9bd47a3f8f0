//! Faults of CSV and JSON Lines.

use super::*;

#[test]
fn tables() {
    let latin = b"path,class\na.png,caf\xe9\n".to_vec();
    for (text, said) in [
        (
            latin,
            "invalid UTF-8): line 2: byte 8 of the record is not UTF-8",
        ),
        (
            b"path,caf\xe9\na,1\n".to_vec(),
            "the header: byte 7 of the record is not UTF-8",
        ),
        (
            b"path,class\na.png,dent,x\n".to_vec(),
            "column count differs from the header's): line 2: it has 3 columns, the header has 2",
        ),
        (
            b"path,class\n\n\na.png\n".to_vec(),
            "line 4: it has 1 columns",
        ),
        (
            b"path,class\r\na,x\r\nb\r\nc,x\r\n".to_vec(),
            "line 3: it has 1 columns",
        ),
        (
            b"path,class\r\n\r\n\"a\r\na\",x\r\nb".to_vec(),
            "line 5: it has 1 columns",
        ),
        (
            b"a.png,dent,1\n".to_vec(),
            "no column holds the sample's path; none of the 3 columns of its first line has a known name",
        ),
        (
            b"class,frame\n".to_vec(),
            "no column holds the sample's path; the header has class, frame",
        ),
        (b"".to_vec(), "it is empty; a header is needed"),
        (
            b"path,path\n".to_vec(),
            "the header names the column \"path\" twice",
        ),
        (
            b"path,x,y,width,height\n".to_vec(),
            "whether width and height are the box's or the image's is not clear",
        ),
        (
            b"path,x,y,w,h\na,NaN,1,1,1\n".to_vec(),
            "of x, y and w, h (or x2, y2) only some are there",
        ),
        (b"path,x,y,w,h\na,1,1,1e999,1\n".to_vec(), "w is \"1e999\""),
        (
            b"path;x;y;w;h\na;1,5;1;1;1\n".to_vec(),
            "x is \"1,5\", not a number",
        ),
        (
            b"path,x,y,w,h\na,1,1,0,1\n".to_vec(),
            "zero or negative box): line 2",
        ),
        (
            b"path,x,y,x2,y2\na,5,5,4,9\n".to_vec(),
            "the box is -1 wide and 4 high",
        ),
        (b"path,x,y,w,h\na,1,1,,1\n".to_vec(), "only some are there"),
        (
            b"path,x,y,w,h,width,height\na,1,1,20,1,10,10\n".to_vec(),
            "box outside its image): line 2",
        ),
        (
            b"path,x,y,w,h,width,height\na,1,1,2,1,10,10\na,,,,,11,10\n".to_vec(),
            "records contradict each other): line 3: the width of \"a\" is 11 here and 10 before",
        ),
        (
            b"path,split\na,train\na,val\n".to_vec(),
            "line 3: \"a\" is in the split \"val\" here and in \"train\" before",
        ),
        (
            b"path,width,class\na,1.5,x\n".to_vec(),
            "width is 1.5, not a number of pixels",
        ),
        (b"path,class\n,dent\n".to_vec(), "it names no sample"),
        (
            b"path,class\n../a,dent\n".to_vec(),
            "path not allowed): line 2",
        ),
        (b"path,class\na,de\0nt\n".to_vec(), "holds NULs"),
        (
            b"path,class,id\na,x,1\nb,x,1\n".to_vec(),
            "duplicate annotation id): line 3: its id is that of line 2 already",
        ),
        (
            b"path,class,class_id\na,x,1\nb,y,1\n".to_vec(),
            "duplicate class): line 3: class 1 is \"x\" already",
        ),
        (
            b"path,class,class_id\na,x,1\nb,x,2\n".to_vec(),
            "the name \"x\" belongs to class 1 already",
        ),
        (
            b"path,class_id\na,x\n".to_vec(),
            "class_id is \"x\", not a whole number",
        ),
        (
            b"path,kind\na,boxy\n".to_vec(),
            "the kind \"boxy\" is none of bbox",
        ),
        (b"path,attrs,class\na,{1,x\n".to_vec(), "malformed): line 2"),
        (
            b"path;attrs;class\na;[1];x\n".to_vec(),
            "attrs is not a JSON object",
        ),
        (
            [b"path,class\na,\"".to_vec(), vec![b'x'; 6 << 20]].concat(),
            "line 2: the row is too large: a quote may be open",
        ),
    ] {
        check(
            &Input::file("a.csv", text),
            &["a.csv (csv, guessed): ", said],
        );
    }
    check(
        &Input::file("a.csv", "path,c\n").column("class", "label"),
        &["there is no column \"label\" for class; the header has path, c"],
    );
    let large = format!(
        "{{\"path\":\"a\",\"z\":\"{}\"}}",
        "x".repeat(LABEL_RECORD_BYTES_MAX)
    );
    for (text, said) in [
        (
            b"{\"path\":\"a\",\"x\":1,\"y\":1,\"w\":\"wide\",\"h\":1}\n".to_vec(),
            "record 1: w is \"wide\", not a number",
        ),
        (b"{\"path\":\"a\"}\n[]\n".to_vec(), "wrong shape): record 2"),
        (
            b"{\"path\":\"a\",\"x\":NaN}\n".to_vec(),
            "record 1: it holds NaN",
        ),
        (b"{\"path\":7}\n".to_vec(), "sample_path is 7, not text"),
        (b"{\"path\":\"a\"\n".to_vec(), "cut off"),
        (b"{\"path\":\"caf\xe9\"}\n".to_vec(), "invalid UTF-8): "),
        (large.into_bytes(), "record too large): record 1"),
    ] {
        check(
            &Input::file("a.jsonl", text),
            &["a.jsonl (jsonl, guessed): ", said],
        );
    }
}
