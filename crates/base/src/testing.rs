//! What the tests of several crates share: ports of the loopback interface that no other test
//! takes, and a wait for the clock of files.
//!
//! A port that a test found free and released would otherwise be taken before its server binds it:
//! by another test, or by an outgoing connection. Only tests call this module.

#![expect(clippy::expect_used, reason = "tests only")]

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rand::Rng;
use rustix::fs::{FlockOperation, flock};

/// A port on 127.0.0.1 that is free for TCP and UDP now. No outgoing connection takes it, and as
/// long as this process lives no other test.
pub fn free_port() -> u16 {
    bound_port().0.local_addr().expect("know the port").port()
}

/// The same, with both sockets bound.
pub fn bound_port() -> (TcpListener, UdpSocket) {
    // Linux takes the ports of outgoing connections from 32768 upwards.
    for _ in 0..1000 {
        let port = rand::rng().random_range(12_000..32_000);
        if is_reserved(port)
            && let Ok(tcp) = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            && let Ok(udp) = UdpSocket::bind((Ipv4Addr::LOCALHOST, port))
        {
            return (tcp, udp);
        }
    }
    unreachable!("no free port on 127.0.0.1");
}

/// Waits until the clock of files, which moves in steps of the kernel's tick, has moved: a change of
/// a file from now on has a later time than all changes before.
pub fn wait_for_file_clock() {
    let name = format!("packhorse-test-clock-{:016x}", rand::random::<u64>());
    let probe = std::env::temp_dir().join(name);
    let now = || {
        File::create(&probe).expect("create a file");
        let meta = fs::symlink_metadata(&probe).expect("read the times of a file");
        fs::remove_file(&probe).expect("remove a file");
        (meta.ctime(), meta.ctime_nsec())
    };
    let before = now();
    while now() <= before {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Reserves a port among the tests, which are processes of their own: by the lock of a file, until
/// the process ends.
fn is_reserved(port: u16) -> bool {
    static RESERVED: Mutex<Vec<File>> = Mutex::new(Vec::new());
    let dir = std::env::temp_dir().join("packhorse-test-ports");
    let _ = fs::create_dir(&dir);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join(format!("{port}")));
    // The folder may be another user's.
    let Ok(file) = file else { return true };
    let is_mine = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    if is_mine {
        let mut reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
        reserved.push(file);
    }
    is_mine
}
