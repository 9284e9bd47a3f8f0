//! A real PostgreSQL server for the tests: on a free loopback port and a Unix socket. The tests of
//! a process share it; it ends with the process, and its directory is removed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub struct Server {
    dir: PathBuf,
    bin: PathBuf,
    pub port: u16,
}

/// A connection pool; it ends when it is dropped.
pub struct Pool {
    child: std::process::Child,
    folder: tempfile::TempDir,
}

impl Pool {
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres:///{database}?host={}&port=6432&user=packhorse",
            self.folder.path().display()
        )
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // A pool that is gone is none the worse.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The password of every role that the tests create.
pub const PASSWORD: &str = "correct horse";

/// The server of this process, started at first use.
pub fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(start)
}

/// The programs of the newest PostgreSQL on this machine.
pub fn programs() -> PathBuf {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            Some((
                entry.file_name().to_str()?.parse().ok()?,
                entry.path().join("bin"),
            ))
        })
        .filter(|(version, bin)| *version >= 15 && bin.join("initdb").exists())
        .collect();
    found.sort();
    let missing = "PostgreSQL 15 or newer is not installed under /usr/lib/postgresql: install Debian's package 'postgresql' (scripts/test does)";
    found.pop().expect(missing).1
}

/// Creates the data directory of a new server, whose superuser is `postgres`: a copy of one that
/// `initdb` creates once and that is kept below the target directory.
pub fn new_cluster(data: &Path) {
    let bin = programs();
    let version = bin.parent().and_then(Path::file_name).unwrap();
    let kept = kept_directory();
    let template = kept.join(format!("postgres-{}", version.to_str().unwrap()));
    std::fs::create_dir_all(&kept).unwrap();
    // The tests are processes: one of them creates the template.
    let lock = std::fs::File::create(template.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if !template.exists() {
        // The user postgres may not enter the target directory.
        let dir = directory_of_postgres();
        let initdb = as_postgres(&bin.join("initdb"))
            .args([
                "-N",
                "-U",
                "postgres",
                "-E",
                "UTF8",
                "--locale=C",
                "--auth-local=trust",
                "--auth-host=scram-sha-256",
                "-D",
            ])
            .arg(dir.join("data"))
            .current_dir("/")
            .output()
            .unwrap();
        assert!(
            initdb.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&initdb.stderr)
        );
        let half = template.with_extension("half");
        let _ = std::fs::remove_dir_all(&half);
        must(
            Command::new("cp")
                .arg("-a")
                .arg(dir.join("data"))
                .arg(&half),
        );
        std::fs::remove_dir_all(&dir).unwrap();
        must(Command::new("mv").arg(&half).arg(&template));
    }
    drop(lock);
    must(Command::new("cp").arg("-a").arg(&template).arg(data));
}

/// The folder for what tests keep, beside the folder of the test program in the target directory.
fn kept_directory() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    program.ancestors().nth(3).unwrap().join("tmp")
}

/// A new directory that belongs to the user postgres.
fn directory_of_postgres() -> PathBuf {
    let dir = tempfile::Builder::new()
        .prefix("packhorse-pg-")
        .tempdir_in("/tmp")
        .unwrap()
        .keep();
    if rustix::process::geteuid().is_root() {
        must(Command::new("chown").arg("postgres:postgres").arg(&dir));
    }
    dir
}

fn must(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

/// Runs a command as a user that postgres accepts, because it rejects root.
fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    if rustix::process::geteuid().is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    }
    command.arg(program);
    command
}

fn start() -> Server {
    let (bin, dir) = (programs(), directory_of_postgres());
    let port = base::testing::free_port();
    new_cluster(&dir.join("data"));
    // The shell outlives this process briefly, to stop the server and remove its directory.
    let script = r#"trap 'kill -INT $pid' TERM
        "$1/postgres" -D "$2/data" -k "$2" -p "$3" -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=130 \
            -c log_min_messages=fatal >"$2/log" 2>&1 & pid=$!
        wait $pid; wait $pid; rm -rf "$2""#;
    let (bin_arg, dir_arg) = (bin.clone(), dir.clone());
    // Started on a separate thread: the death signal of the parent is sent when the starting thread
    // ends, not the process.
    std::thread::spawn(move || {
        let mut command = Command::new("setpriv");
        if rustix::process::geteuid().is_root() {
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        }
        command
            .args(["--pdeathsig", "TERM", "sh", "-c", script, "sh"])
            .arg(bin_arg)
            .arg(dir_arg)
            .arg(port.to_string());
        let _ = command.current_dir("/").stdin(Stdio::null()).status();
    });
    let server = Server { dir, bin, port };
    let ready = || {
        let mut command = Command::new(server.bin.join("pg_isready"));
        command
            .arg("-q")
            .arg("-h")
            .arg(&server.dir)
            .args(["-p", &port.to_string()])
            .status()
            .unwrap()
            .success()
    };
    let started = (0..600).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        ready()
    });
    assert!(
        started,
        "PostgreSQL did not start: {}",
        std::fs::read_to_string(server.dir.join("log")).unwrap_or_default()
    );
    server.psql(
        "postgres",
        &format!(
            "CREATE ROLE packhorse LOGIN PASSWORD '{PASSWORD}'; CREATE ROLE nobody_much LOGIN PASSWORD '{PASSWORD}'"
        ),
    );
    server
}

impl Server {
    /// Runs SQL as the superuser. Returns the output of psql, fields separated by `|`.
    pub fn psql(&self, database: &str, sql: &str) -> String {
        let output = Command::new(self.bin.join("psql"))
            .args([
                "-XqAt",
                "-v",
                "ON_ERROR_STOP=1",
                "-U",
                "postgres",
                "-p",
                &self.port.to_string(),
                "-d",
                database,
                "-h",
            ])
            .arg(&self.dir)
            .args(["-c", sql])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "psql: {sql}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    }

    /// Creates a database that belongs to the role `packhorse`.
    pub fn database(&self) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("labels_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.psql(
            "postgres",
            &format!("CREATE DATABASE {name} OWNER packhorse"),
        );
        name
    }

    /// The URL over TCP, which requires a password.
    pub fn url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}", self.port)
    }

    /// A PgBouncer before this server, on a Unix socket; it ends with the test.
    pub fn pool(&self, database: &str, mode: &str, size: u32) -> Pool {
        let folder = tempfile::Builder::new()
            .prefix("packhorse-pool-")
            .tempdir_in("/tmp")
            .unwrap();
        let config = folder.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n{database} = host={} port={} user=packhorse\n[pgbouncer]\nlisten_addr =\nlisten_port = 6432\n\
             unix_socket_dir = {}\nauth_type = any\npool_mode = {mode}\ndefault_pool_size = {size}\n",
            self.dir.display(),
            self.port,
            folder.path().display()
        );
        base::durable::replace_secret(&config, text.as_bytes()).unwrap();
        if rustix::process::geteuid().is_root() {
            let owned = Command::new("chown")
                .args(["-R", "postgres:postgres"])
                .arg(folder.path())
                .status();
            assert!(owned.unwrap().success());
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let child = as_postgres(Path::new("pgbouncer"))
            .env("PATH", format!("{path}:/usr/sbin"))
            .arg(&config)
            .current_dir("/")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pool = Pool { child, folder };
        let socket = pool.folder.path().join(".s.PGSQL.6432");
        let started = (0..600).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        assert!(
            started,
            "PgBouncer did not start: install Debian's package 'pgbouncer'"
        );
        pool
    }

    /// Switches TLS on, with a certificate for this name; its CA is `ca.pem` in `dir`.
    pub fn use_tls(&self, dir: &Path, name: &str) {
        let openssl = |args: &[&str]| {
            let output = Command::new("openssl").args(args).current_dir(dir).output();
            let output = output.unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        };
        let key = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ];
        openssl(
            &[
                &[
                    "req", "-x509", "-days", "2", "-subj", "/CN=CA", "-keyout", "ca.key", "-out",
                    "ca.pem",
                ][..],
                &key,
            ]
            .concat(),
        );
        openssl(
            &[
                &[
                    "req",
                    "-subj",
                    &format!("/CN={name}"),
                    "-addext",
                    &format!("subjectAltName=DNS:{name}"),
                    "-keyout",
                    "server.key",
                    "-out",
                    "server.csr",
                ][..],
                &key,
            ]
            .concat(),
        );
        openssl(&[
            "x509",
            "-req",
            "-days",
            "2",
            "-copy_extensions",
            "copy",
            "-in",
            "server.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-out",
            "server.pem",
        ]);
        let data = self.dir.join("data");
        for file in ["server.key", "server.pem"] {
            let mut install = Command::new("install");
            install.args(["-m", "600"]);
            if rustix::process::geteuid().is_root() {
                install.args(["-o", "postgres", "-g", "postgres"]);
            }
            let installed = install.arg(dir.join(file)).arg(data.join(file)).status();
            assert!(installed.unwrap().success());
        }
        for setting in [
            "ssl_cert_file = 'server.pem'",
            "ssl_key_file = 'server.key'",
            "ssl = on",
        ] {
            self.psql("postgres", &format!("ALTER SYSTEM SET {setting}"));
        }
        self.reload("SELECT current_setting('ssl')", "on");
    }

    /// Refuses connections over TCP without TLS.
    pub fn demand_tls(&self) {
        let lines = "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n";
        let file = self.dir.join("data/pg_hba.conf");
        // Written in place, so that it keeps its owner.
        let mut hba = std::fs::File::options()
            .write(true)
            .truncate(true)
            .open(file)
            .unwrap();
        std::io::Write::write_all(&mut hba, lines.as_bytes()).unwrap();
        self.reload(
            "SELECT string_agg(type, ',' ORDER BY line_number) FROM pg_hba_file_rules",
            "local,hostssl",
        );
    }

    /// Reloads the configuration, and waits until new sessions have it.
    fn reload(&self, sql: &str, expected: &str) {
        let before = self.psql("postgres", "SELECT pg_conf_load_time()");
        self.psql("postgres", "SELECT pg_reload_conf()");
        let loaded = (0..600).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            self.psql("postgres", "SELECT pg_conf_load_time()") != before
                && self.psql("postgres", sql) == expected
        });
        assert!(loaded, "{sql} is not {expected}");
    }

    /// The URL over the Unix socket, as the superuser.
    pub fn admin_url(&self, database: &str) -> String {
        format!(
            "postgres:///{database}?host={}&port={}&user=postgres",
            self.dir.display(),
            self.port
        )
    }
}
