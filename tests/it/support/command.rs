//! Runs programs with a time limit, and captures their output. No program outlives its test.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::secs;

/// A command whose process is killed by the kernel when the thread that started it ends for any
/// reason.
pub(crate) fn bound(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// The same as another user, by number; requires root.
pub(crate) fn bound_as(user: u32, group: u32, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    // One `setpriv` changes the user and then requests the signal, because a change of the user
    // cancels that request.
    command
        .arg(format!("--reuid={user}"))
        .arg(format!("--regid={group}"))
        .args(["--clear-groups", "--pdeathsig", "KILL", "--"])
        .arg(program);
    command
}

/// The result of a command.
#[derive(Debug)]
pub(crate) struct Output {
    /// The exit code; -1 when a signal ended it.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
}

impl Output {
    /// Checks the exit code; panics with the complete output if it differs.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "the exit code is not the expected one\nstdout: {}\nstderr: {}",
            self.out, self.err
        );
        self
    }

    /// Checks that standard error contains each of these, in any case.
    #[track_caller]
    pub(crate) fn says(self, words: &[&str]) -> Self {
        let said = self.err.to_lowercase();
        for word in words {
            assert!(
                said.contains(&word.to_lowercase()),
                "{word:?} is not in stderr:\n{}\nstdout: {}",
                self.err,
                self.out
            );
        }
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| {
            panic!(
                "stdout is not JSON: {e}\nstdout: {}\nstderr: {}",
                self.out, self.err
            )
        })
    }
}

/// Waits for a process; `None` if it still runs after `limit`.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("wait for a process") {
            return Some(status);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command to its end; panics if that takes longer than `limit`.
#[track_caller]
pub(crate) fn run(command: &mut Command, limit: Duration) -> Output {
    // Files instead of pipes: a full pipe would block the command, and reading two pipes needs
    // threads.
    let mut out = tempfile::tempfile().expect("a file for stdout");
    let mut err = tempfile::tempfile().expect("a file for stderr");
    command.stdin(Stdio::null());
    command
        .stdout(out.try_clone().expect("a handle for stdout"))
        .stderr(err.try_clone().expect("a handle for stderr"));
    let mut child = command
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?} does not start: {e}"));
    let status = wait(&mut child, limit);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let text = |file: &mut File| {
        let mut bytes = Vec::new();
        file.rewind()
            .and_then(|()| file.read_to_end(&mut bytes))
            .expect("read the output of a command");
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (out, err) = (text(&mut out), text(&mut err));
    let Some(status) = status else {
        panic!("{command:?} did not end within {limit:?}\nstdout: {out}\nstderr: {err}")
    };
    Output {
        code: status.code().unwrap_or(-1),
        out,
        err,
    }
}

/// Runs a tool that must succeed within two minutes, and returns its standard output.
#[track_caller]
pub(crate) fn tool(program: &str, args: &[&str]) -> String {
    tool_in(Path::new("/"), program, args)
}

/// The same in a folder.
#[track_caller]
pub(crate) fn tool_in(dir: &Path, program: &str, args: &[&str]) -> String {
    let output = run(bound(program).args(args).current_dir(dir), secs(120));
    assert_eq!(
        output.code, 0,
        "{program} {args:?} failed\nstdout: {}\nstderr: {}",
        output.out, output.err
    );
    output.out
}
