//! Support for the tests: processes, servers, fixtures, and waiting with a deadline.

pub(crate) mod command;
pub(crate) mod daemon;
pub(crate) mod data;
pub(crate) mod disk;
pub(crate) mod faulty;
pub(crate) mod harbor;
pub(crate) mod hostile;
pub(crate) mod http;
pub(crate) mod images;
pub(crate) mod labels;
pub(crate) mod line;
pub(crate) mod postgres;
pub(crate) mod registry;
pub(crate) mod tree;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use base::testing::{bound_port, free_port};

/// Seconds, for time limits.
pub(crate) fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Calls `look` every 50 ms until it returns a value; panics with `what` after `limit`.
pub(crate) fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "waited {limit:?} in vain: {what}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

/// A test's hard time limit. If it is dropped in time it does nothing, otherwise it prints every
/// log and ends the process.
pub(crate) struct Limit {
    _done: SyncSender<()>,
}

/// Ends the process if the returned value still exists after `limit`. The first line of every test.
pub(crate) fn limit(limit: Duration) -> Limit {
    let (done, watch) = sync_channel::<()>(0);
    let test = thread::current().name().unwrap_or("a test").to_owned();
    thread::spawn(move || {
        if watch.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{test} did not end within its limit of {limit:?}");
            print_logs(|_| true);
            std::process::abort();
        }
    });
    Limit { _done: done }
}

/// The log files of all servers and daemons of this process, which are printed when a test fails.
static LOGS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Prints this log if its test fails.
pub(crate) fn register_log(path: &Path) {
    let mut logs = LOGS.lock().unwrap_or_else(PoisonError::into_inner);
    if !logs.iter().any(|p| p == path) {
        logs.push(path.into());
    }
}

fn print_logs(wanted: impl Fn(&Path) -> bool) {
    let logs = LOGS.lock().unwrap_or_else(PoisonError::into_inner);
    for path in logs.iter().filter(|p| wanted(p)) {
        let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(80);
        eprintln!(
            "---- {} (the last {} lines of {})",
            path.display(),
            lines.len() - from,
            lines.len()
        );
        for line in &lines[from..] {
            eprintln!("{line}");
        }
    }
}

/// A folder for one test, which is removed with its content. Declare it before the processes that
/// work in it: if the test fails, it first prints their logs.
pub(crate) struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    /// An empty folder that any user may enter (PostgreSQL does not run as root).
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("packhorse-it-")
            .tempdir()
            .expect("create a folder for the test");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))
            .expect("open the folder to all");
        Self { dir }
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path inside it.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new folder inside it.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(&path).expect("create a folder");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if thread::panicking() {
            print_logs(|p| p.starts_with(self.path()));
        }
    }
}

/// Whether this runs as root, which is required for mounts and for other users.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Reports that a test cannot run here, and why. `scripts/test` collects these reports for its
/// totals.
pub(crate) fn skipped(why: &str) {
    let test = thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("skipped: {test}: {why}");
    if let Some(list) = std::env::var_os("PACKHORSE_TESTS_SKIPPED") {
        let mut file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(list)
            .expect("open the list of skipped tests");
        writeln!(file, "{test}: {why}").expect("record a skipped test");
    }
}

/// The total size of all regular files below a folder.
pub(crate) fn disk_usage(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => disk_usage(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Every path below a folder that `wanted` accepts.
pub(crate) fn find(dir: &Path, wanted: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.extend(find(&path, wanted));
        }
        if wanted(&path) {
            found.push(path);
        }
    }
    found
}

/// The number of a system user and of its group.
pub(crate) fn tool_user(name: &str) -> (u32, u32) {
    let passwd = std::fs::read_to_string("/etc/passwd").expect("read /etc/passwd");
    let line = passwd
        .lines()
        .find(|l| l.split(':').next() == Some(name))
        .unwrap_or_else(|| panic!("there is a user {name}"));
    let number = |i: usize| {
        line.split(':')
            .nth(i)
            .and_then(|n| n.parse().ok())
            .expect("/etc/passwd has numbers")
    };
    (number(2), number(3))
}
