//! Daemons that may open only 256 files: they work although other clients open as many connections
//! as they can.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use crate::support::daemon::{Hub, PACKHORSE, Site, SiteSpec};
use crate::support::{Scratch, data, limit, secs, wait_for};

/// The connections of one client to each port: more than the daemon may have open.
const STRANGERS: usize = 300;

fn strangers(address: SocketAddr) -> Vec<TcpStream> {
    (0..STRANGERS)
        .map(|_| TcpStream::connect(address).expect("the kernel accepts it"))
        .collect()
}

/// A script that starts the program with this limit of open files.
fn limited(scratch: &Scratch) -> std::path::PathBuf {
    let program = scratch.join("packhorse-limited");
    std::fs::write(
        &program,
        format!("#!/bin/sh\nulimit -n 256\nexec {PACKHORSE} \"$@\"\n"),
    )
    .unwrap();
    data::chmod(&program, 0o755);
    program
}

#[test]
fn a_limit_of_256_open_files_is_sufficient() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let program = limited(&scratch);
    let mut hub = Hub::new(scratch.path());
    hub.run_program(&program);
    hub.start();
    let mut site = Site::new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    site.run_program(&program);
    site.join(&hub, &[]);
    site.start();
    hub.wait_online("chengdu", true, secs(30));
    for (daemon, log) in [("hub", hub.log()), ("site", site.log())] {
        assert!(
            log.contains("the limit of open files is low"),
            "the {daemon} logs it: {log}"
        );
    }

    let source = scratch.folder("many");
    for n in 0..1500 {
        data::write(
            &source.join(format!("{n:04}.bin")),
            format!("file number {n}").as_bytes(),
        );
    }
    let idle = [strangers(hub.quic), strangers(hub.api), strangers(site.api)];
    hub.publish(&source, "dataset/many:v1", &[]);
    let id = hub.deliver(&["dataset/many:v1"], "chengdu").remove(0);
    hub.wait_done(&id, secs(60));
    assert_eq!(count(&site.folder("dataset/many:v1")), 1500);
    // A site can reconnect while these connections are open, also over TCP.
    site.stop();
    site.edit_config("[hub]\n", "[line]\ntransport = \"tcp\"\n[hub]\n");
    site.start();
    hub.wait_online("chengdu", true, secs(30));
    wait_for("the site's own view", secs(10), || {
        site.cli(&["sites"]).out.contains("tcp").then_some(())
    });
    drop(idle);
    for log in [hub.log(), site.log()] {
        assert!(!log.contains("Too many open files"), "{log}");
        assert!(log.lines().count() < 100, "{log}");
    }
}

fn count(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}
