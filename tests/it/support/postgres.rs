//! A PostgreSQL for one test: a new cluster on a free port, with a database for labels.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::command::{bound, bound_as, run, wait};
use super::{Scratch, free_port, is_root, register_log, secs, tool_user, wait_for};

/// The role that sites log in as.
pub(crate) const ROLE: &str = "packhorse";
const PASSWORD: &str = "läb els'\"9";

/// The application name of the sessions of [`Postgres::hold`].
pub(crate) const HOLDER: &str = "night job";

/// A running (or stopped) server.
pub(crate) struct Postgres {
    dir: PathBuf,
    port: u16,
    log: PathBuf,
    child: Option<Child>,
}

/// The newest PostgreSQL's program folder.
fn programs() -> PathBuf {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .expect("PostgreSQL is installed (scripts/test does it)")
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .filter(|bin| bin.join("initdb").exists())
        .collect();
    versions.sort();
    versions
        .pop()
        .expect("a PostgreSQL with initdb (scripts/test installs it)")
}

/// A server program, run as a user that may run it: PostgreSQL refuses root.
fn server(program: &str) -> Command {
    let path = programs().join(program);
    if is_root() {
        let (user, group) = tool_user("postgres");
        bound_as(user, group, path)
    } else {
        bound(path)
    }
}

impl Postgres {
    /// Starts a new cluster with the database `labels`, which [`ROLE`] owns.
    /// [`Postgres::create_database`] adds another.
    pub(crate) fn start_new(scratch: &Scratch) -> Self {
        let dir = scratch.folder("postgres");
        if is_root() {
            let (user, group) = tool_user("postgres");
            std::os::unix::fs::chown(&dir, Some(user), Some(group))
                .expect("give the cluster to postgres");
        }
        let data = dir.join("data");
        let mut initdb = server("initdb");
        initdb.args([
            "--no-sync",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "-U",
            "admin",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "-D",
        ]);
        run(initdb.arg(&data).current_dir("/"), secs(60)).expect(0);
        let log = scratch.join("postgres.log");
        register_log(&log);
        let mut postgres = Self {
            dir,
            port: free_port(),
            log,
            child: None,
        };
        postgres.start();
        postgres.query(
            "postgres",
            &format!(
                "CREATE ROLE {ROLE} LOGIN PASSWORD '{}'",
                PASSWORD.replace('\'', "''")
            ),
        );
        postgres.create_database("labels");
        postgres
    }

    /// One more database owned by [`ROLE`].
    pub(crate) fn create_database(&self, name: &str) {
        self.query("postgres", &format!("CREATE DATABASE {name} OWNER {ROLE}"));
    }

    /// Starts it, and waits until it answers.
    pub(crate) fn start(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .expect("open the log");
        let mut command = server("postgres");
        command
            .arg("-D")
            .arg(self.dir.join("data"))
            .arg("-k")
            .arg(&self.dir);
        command.args([
            "-h",
            "127.0.0.1",
            "-p",
            &self.port.to_string(),
            "-c",
            "fsync=off",
            "-c",
            "shared_buffers=32MB",
        ]);
        command
            .current_dir("/")
            .stdout(log.try_clone().expect("a handle for the log"))
            .stderr(log);
        self.child = Some(command.spawn().expect("start PostgreSQL"));
        wait_for("PostgreSQL answers", secs(30), || {
            (self.psql("postgres", "SELECT 1").code == 0).then_some(())
        });
    }

    /// Stops it at once; connections break.
    pub(crate) fn stop(&mut self) {
        let mut child = self.child.take().expect("PostgreSQL runs");
        kill_process(Pid::from_child(&child), Signal::INT).expect("signal PostgreSQL");
        wait(&mut child, secs(20)).expect("PostgreSQL stops");
    }

    fn psql(&self, database: &str, sql: &str) -> super::command::Output {
        let mut psql = bound("psql");
        psql.arg("-h").arg(&self.dir).args([
            "-p",
            &self.port.to_string(),
            "-U",
            "admin",
            "-d",
            database,
        ]);
        run(
            psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql])
                .current_dir("/"),
            secs(60),
        )
    }

    /// Runs a statement as the cluster's owner. Returns its rows, unaligned.
    #[track_caller]
    pub(crate) fn query(&self, database: &str, sql: &str) -> String {
        self.psql(database, sql).expect(0).out
    }

    /// Starts a session that runs a statement in a transaction and leaves it open, as `night job`,
    /// until [`Postgres::let_go`].
    pub(crate) fn hold(&self, database: &str, sql: &str) -> Child {
        let mut psql = bound("psql");
        psql.env("PGAPPNAME", HOLDER)
            .arg("-h")
            .arg(&self.dir)
            .args(["-p", &self.port.to_string(), "-U", "admin", "-d", database]);
        psql.args([
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            &format!("BEGIN; {sql}; SELECT pg_sleep(600)"),
        ])
        .current_dir("/");
        let child = psql
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("start psql");
        let holds = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{HOLDER}' AND wait_event = 'PgSleep'"
        );
        wait_for("the session holds its locks", secs(20), || {
            (self.query(database, &holds).trim() == "1").then_some(())
        });
        child
    }

    /// Ends such a session.
    pub(crate) fn let_go(&self, mut held: Child) {
        self.query("postgres", &format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{HOLDER}'"));
        wait(&mut held, secs(20)).expect("psql ends with its session");
    }

    /// The rows of a query in a database, each as a JSON object.
    #[track_caller]
    pub(crate) fn rows(&self, database: &str, sql: &str) -> Vec<Value> {
        let text = self.query(
            database,
            &format!("SELECT row_to_json(q)::text FROM ({sql}) q"),
        );
        text.lines()
            .map(|line| serde_json::from_str(line).expect("row_to_json gives JSON"))
            .collect()
    }

    /// The lines of `[sink.labels]` for a database; writes the password file.
    pub(crate) fn sink(&self, scratch: &Scratch, database: &str) -> String {
        let file = scratch.join("postgres-password");
        std::fs::write(&file, format!("{PASSWORD}\n")).expect("write the password");
        let url = format!("postgres://{ROLE}@127.0.0.1:{}/{database}", self.port);
        format!("url = \"{url}\"\npassword_file = \"{}\"", file.display())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // SIGQUIT also ends the children; SIGKILL would leave them running for a while.
            let _ = kill_process(Pid::from_child(&child), Signal::QUIT);
            if wait(&mut child, secs(10)).is_none() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// The rows of a query on a SQLite file, each as a JSON object. Python reads them, so that the test
/// does not depend on packhorse's own code.
#[track_caller]
pub(crate) fn sqlite_rows(file: &Path, sql: &str) -> Vec<Value> {
    const SCRIPT: &str = "
import json, sqlite3, sys
db = sqlite3.connect('file:' + sys.argv[1] + '?mode=ro', uri=True)
db.row_factory = sqlite3.Row
for row in db.execute(sys.argv[2]):
    print(json.dumps({k: (v.hex() if isinstance(v, bytes) else v) for k, v in dict(row).items()}))
";
    let file = file.to_str().expect("a UTF-8 path");
    let text = super::command::tool("python3", &["-c", SCRIPT, file, sql]);
    text.lines()
        .map(|line| serde_json::from_str(line).expect("json.dumps gives JSON"))
        .collect()
}
