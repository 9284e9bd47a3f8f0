//! Tests of the test support: its servers work, its fixtures have the stated content, and its proxy
//! counts, throttles and cuts.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use crate::support::command::{bound, run, tool};
use crate::support::data::{chmod, dataset, next_dataset};
use crate::support::harbor::{self, Harbor};
use crate::support::images;
use crate::support::line::Line;
use crate::support::postgres::{Postgres, sqlite_rows};
use crate::support::registry::Registry;
use crate::support::tree::{assert_same, read};
use crate::support::{Scratch, disk_usage, free_port, limit, secs, wait_for};

#[test]
fn postgres_starts_stops_and_answers() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let mut postgres = Postgres::start_new(&scratch);
    assert_eq!(
        postgres.rows("labels", "SELECT 1 AS one, 'ä' AS text")[0]["text"],
        "ä"
    );
    postgres.stop();
    postgres.start();
    assert_eq!(
        postgres.query("labels", "SELECT current_database()").trim(),
        "labels"
    );
}

#[test]
fn sqlite_is_read_by_python() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let file = scratch.join("x.db");
    tool(
        "python3",
        &[
            "-c",
            "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('CREATE TABLE t AS SELECT 5 AS n')",
            file.to_str().unwrap(),
        ],
    );
    assert_eq!(sqlite_rows(&file, "SELECT n FROM t")[0]["n"], 5);
}

#[test]
fn registries_accept_an_image_and_refuse_a_wrong_password() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let layout = images::small().join("layout");
    let digest = images::top(&layout)["digest"].as_str().unwrap().to_owned();
    for registry in [
        Registry::basic(&scratch, "basic"),
        Registry::bearer(&scratch, "bearer"),
    ] {
        registry.push(&format!("oci:{}:v1", layout.display()), "operators/app:v1");
        assert_eq!(registry.digest("operators/app:v1"), digest);
        let url = format!("docker://{}/operators/app:v1", registry.host());
        let stranger = run(
            bound("skopeo").args([
                "inspect",
                "--creds",
                "robot:wrong",
                "--tls-verify=false",
                &url,
            ]),
            secs(60),
        );
        assert_ne!(stranger.code, 0, "a wrong password must be refused");
    }
}

#[test]
fn skopeo_works_with_the_harbor_simulator() {
    let _limit = limit(secs(180));
    let harbor = Harbor::start();
    let scratch = Scratch::new();
    let sink = harbor.sink(&scratch, "operators");
    let host = sink
        .split("http://")
        .nth(1)
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .to_owned();
    let password = std::fs::read_to_string(scratch.join("harbor-password")).unwrap();
    let layout = images::small().join("layout");
    let push = |reference: &str| {
        let (source, target) = (
            format!("oci:{}:v1", layout.display()),
            format!("docker://{host}/{reference}"),
        );
        let credentials = format!("{}:{password}", harbor::USER);
        run(
            bound("skopeo").args([
                "copy",
                "--dest-creds",
                &credentials,
                "--dest-tls-verify=false",
                &source,
                &target,
            ]),
            secs(60),
        )
    };
    push("operators/app:v1").expect(0);
    assert_eq!(
        harbor.digest("operators/app:v1").as_deref(),
        images::top(&layout)["digest"].as_str()
    );
    assert_ne!(
        push("nowhere/app:v1").code,
        0,
        "a missing project must be refused"
    );
    harbor.make_immutable();
    assert_ne!(
        push("operators/app:v1").code,
        0,
        "an immutable tag must be refused"
    );
    harbor.always(harbor::is_push, 403, &harbor::error("DENIED", "quota"));
    assert_ne!(
        push("operators/other:v1").code,
        0,
        "the scripted answer takes precedence"
    );
    harbor.heal();
    push("operators/other:v1").expect(0);
}

#[test]
fn small_images_have_the_stated_content() {
    let _limit = limit(secs(180));
    let dir = images::small();
    let scratch = Scratch::new();
    let root = images::unpack(&dir.join("layout"), "v1", &scratch.join("bundle"));
    assert_same(&dir.join("root"), &root);
    let listing = tool("tar", &["-tf", dir.join("docker.tar").to_str().unwrap()]);
    assert!(listing.contains("manifest.json"), "{listing}");
    let zstd = images::blob(
        &dir.join("zstd"),
        images::top(&dir.join("zstd"))["digest"].as_str().unwrap(),
    );
    assert!(
        std::fs::read_to_string(zstd).unwrap().contains("tar+zstd"),
        "the layers must be zstd"
    );
    for index in ["two", "absent"] {
        let out = tool(
            "skopeo",
            &[
                "inspect",
                "--raw",
                &format!("oci:{}:v1", dir.join(index).display()),
            ],
        );
        assert!(out.contains("amd64") && out.contains("arm64"), "{out}");
    }
    assert!(
        disk_usage(&dir.join("absent")) < disk_usage(&dir.join("two")),
        "the absent platform's blobs are there"
    );
}

#[test]
fn the_large_image_has_a_large_base() {
    let _limit = limit(secs(280));
    let dir = images::large();
    let scratch = Scratch::new();
    let root = images::unpack(&dir.join("layout"), "v2", &scratch.join("bundle"));
    assert!(
        disk_usage(&root) >= 100 << 20,
        "the base image is smaller than 100 MB"
    );
    assert_same(&dir.join("app2"), &root.join("app"));
}

#[test]
fn every_difference_between_trees_is_found() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let v1 = dataset(&scratch.join("v1"), 40);
    let again = dataset(&scratch.join("again"), 40);
    assert_same(&v1.root, &again.root);
    let (v2, new_bytes) = next_dataset(&v1, &scratch.join("v2"));
    assert!(new_bytes > 0 && read(&v1.root) != read(&v2.root));
    chmod(&again.root.join("说明.txt"), 0o640);
    assert!(
        std::panic::catch_unwind(|| assert_same(&v1.root, &again.root)).is_err(),
        "a changed mode must be found"
    );
}

#[test]
fn the_proxy_forwards_counts_throttles_and_cuts() {
    let _limit = limit(secs(60));
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let end = UdpSocket::bind(address).unwrap();
    let listener = TcpListener::bind(address).unwrap();
    let line = Line::to(address);

    let site = UdpSocket::bind("127.0.0.1:0").unwrap();
    site.set_read_timeout(Some(secs(5))).unwrap();
    end.set_read_timeout(Some(secs(5))).unwrap();
    let mut buffer = [0; 2000];
    site.send_to(b"hello", line.address()).unwrap();
    let (len, peer) = end.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"hello");
    end.send_to(b"welcome", peer).unwrap();
    assert_eq!(site.recv(&mut buffer).unwrap(), 7);
    assert_eq!((line.up(), line.down()), (5, 7));
    line.cut();
    site.set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    end.send_to(b"lost", peer).unwrap();
    assert!(
        site.recv(&mut buffer).is_err(),
        "a cut connection must carry no bytes"
    );
    line.mend();

    let mut near = TcpStream::connect(line.address()).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    line.throttle(1_000_000);
    let began = std::time::Instant::now();
    far.write_all(&[7; 500_000]).unwrap();
    let mut received = vec![0; 500_000];
    near.read_exact(&mut received).unwrap();
    assert!(
        began.elapsed() > Duration::from_millis(400),
        "half a megabyte at one megabyte per second took {:?}",
        began.elapsed()
    );
}

#[test]
fn a_child_process_ends_with_the_thread_that_started_it() {
    let _limit = limit(secs(60));
    let starter = std::thread::spawn(|| {
        let pid = bound("sleep").arg("1000").spawn().unwrap().id();
        let runs = || {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() == "sleep")
        };
        wait_for("the process has requested the signal", secs(10), || {
            runs().then_some(pid)
        })
    });
    let pid = starter.join().unwrap();
    wait_for("the process has ended or is a zombie", secs(10), || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    });
}
