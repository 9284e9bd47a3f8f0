//! A trainer's process: a run's folder, and the small program that watches the command.
//!
//! ```text
//! <data_dir>/runs/<RUN>/run.json the descriptor that the trainer reads
//!                       job.json       what the watcher starts
//!                       output/        what the trainer creates
//!                       trainer.log    its output; trainer.log.old when the first was full
//!                       lock           held by the watcher while it runs
//!                       token          what the command presents to the daemon's API: valid for this run only, mode 0600
//!                       stop           written by the daemon: end the trainer
//!                       exit.json      how the trainer ended; the watcher's last write
//! ```
//! The watcher ([`watch`], this program under a hidden command) is not the daemon: a daemon that is
//! killed or upgraded does not affect training. It finds the trainer again by the lock and by
//! `exit.json`. If both watcher and trainer were ended, by a reboot or a kill of the whole unit,
//! the lock is free and there is no `exit.json`: the run then starts again, unless something is
//! published in place from its folder. The trainer ends with its watcher; processes that a trainer
//! leaves in its process group are killed when it ends.
//!
//! A training platform receives the descriptor by POST until it accepts, and once more, with
//! `"cancel": true`, when the run is over without a model.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde::{Deserialize, Serialize};

use crate::api::RunToken;
use base::clock;
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{TRAINER_GRACE, TRAINER_LOG_BYTES_MAX, TRAINER_TAIL_BYTES};
use model::run::Ended;
use model::run::site::Process;

/// How often the watcher checks for a stop request.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a new watcher may take to take its lock.
const BEGIN_MAX: Duration = Duration::from_secs(10);
/// How long a new watcher tries to take its lock: a status check holds it for a moment.
const LOCK_MAX: Duration = Duration::from_secs(2);
/// How long the rest of the output is awaited after the trainer has ended.
const LAST_WORDS_MAX: Duration = Duration::from_secs(2);

/// What the watcher starts.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    command: Vec<String>,
    environment: BTreeMap<String, String>,
    deadline_ms: i64,
}

/// A run's folder.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// The folder of a run. Nothing is created yet.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The descriptor.
    pub fn descriptor(&self) -> PathBuf {
        self.0.join("run.json")
    }

    /// The trainer's output folder.
    pub fn output(&self) -> PathBuf {
        self.0.join("output")
    }

    /// The token that the command presents to the API.
    pub fn token(&self) -> PathBuf {
        self.0.join("token")
    }

    /// Writes the token of the run.
    pub fn keep_token(&self, token: &RunToken) -> Result<(), Fault> {
        durable::replace_secret(&self.token(), format!("{}\n", token.text()).as_bytes())
    }

    /// The token of the run, if it has one.
    pub fn read_token(&self) -> Option<RunToken> {
        RunToken::parse(crate::config::read_secret(&self.token()).ok()?.as_bytes())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Whether the output folder has content.
    pub fn has_output(&self) -> bool {
        std::fs::read_dir(self.output()).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// Creates the folder with its descriptor; content of an earlier start is removed.
    pub fn prepare(&self, descriptor: &serde_json::Value) -> Result<(), Fault> {
        durable::remove_all(&self.0)?;
        durable::create_dir_all(&self.output())?;
        let text = serde_json::to_vec_pretty(descriptor)
            .map_err(|e| Fault::internal(format!("a descriptor as JSON: {e}")))?;
        durable::replace(&self.descriptor(), &text)
    }

    /// The descriptor, if the folder belongs to the run of this id.
    pub fn descriptor_of(&self, id: &str) -> Result<Option<serde_json::Value>, Fault> {
        let path = self.descriptor();
        match std::fs::read(&path) {
            Ok(text) => Ok(serde_json::from_slice::<serde_json::Value>(&text)
                .ok()
                .filter(|descriptor| descriptor["id"] == id)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Fault::io(path.display(), &e)),
        }
    }

    /// The state of its process.
    pub fn process(&self) -> Result<Process, Fault> {
        let ended = || -> Result<Option<Ended>, Fault> {
            let path = self.file("exit.json");
            match std::fs::read(&path) {
                Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| {
                    Fault::internal(format!(
                        "{} is damaged, so how the trainer ended is not known: {e}",
                        path.display()
                    ))
                    .with_next("remove that file: the run then starts again")
                }),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(Fault::io(path.display(), &e)),
            }
        };
        if let Some(ended) = ended()? {
            return Ok(Process::Ended(ended));
        }
        match self.lock()? {
            None => Ok(Process::Running),
            // It may have written `exit.json` and ended between the two checks.
            Some(_free) => Ok(ended()?.map_or(Process::Absent, Process::Ended)),
        }
    }

    fn lock(&self) -> Result<Option<File>, Fault> {
        if !self.0.is_dir() {
            return File::open("/dev/null").at("open /dev/null").map(Some);
        }
        let path = self.file("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .at(path.display())?;
        Ok(
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
                .is_ok()
                .then_some(file),
        )
    }

    /// The lock for the watcher itself. `None`: another watcher runs.
    fn lock_to_stay(&self) -> Result<Option<File>, Fault> {
        let until = Instant::now() + LOCK_MAX;
        loop {
            let lock = self.lock()?;
            if lock.is_some() || Instant::now() >= until {
                return Ok(lock);
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Starts the command under a watcher, and returns when the watcher has taken over. The folder
    /// is prepared.
    pub fn start(
        &self,
        command: &[String],
        environment: BTreeMap<String, String>,
        deadline_ms: i64,
    ) -> Result<(), Fault> {
        let job = Job {
            command: command.to_vec(),
            environment,
            deadline_ms,
        };
        let text = serde_json::to_vec_pretty(&job)
            .map_err(|e| Fault::internal(format!("a job as JSON: {e}")))?;
        durable::replace(&self.file("job.json"), &text)?;
        // The running program's own file, even if it was replaced since this daemon started.
        let mut watcher = Command::new("/proc/self/exe");
        watcher
            .arg0("packhorse")
            .arg("trainer")
            .arg(&self.0)
            .current_dir(&self.0)
            .process_group(0);
        watcher
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_secret(&name.to_string_lossy()))
        {
            watcher.env_remove(name);
        }
        let mut child = watcher.spawn().at("start the trainer's watcher")?;
        let until = Instant::now() + BEGIN_MAX;
        loop {
            if self.process()? != Process::Absent {
                break;
            }
            if let Some(status) = child.try_wait().at("look at the trainer's watcher")? {
                // A short trainer may have ended between the two checks.
                if self.process()? != Process::Absent {
                    break;
                }
                return Err(Fault::internal(format!(
                    "the trainer's watcher ended at once: {status}"
                )));
            }
            if Instant::now() >= until {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Fault::internal("the trainer's watcher did not begin"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // The child must be reaped; it runs as long as the trainer.
        std::thread::Builder::new()
            .name("trainer".into())
            .stack_size(64 << 10)
            .spawn(move || {
                let _ = child.wait();
            })
            .at("start a thread")?;
        Ok(())
    }

    /// Asks the watcher to end the trainer.
    pub fn stop(&self) -> Result<(), Fault> {
        let path = self.file("stop");
        if path.exists() {
            Ok(())
        } else {
            durable::replace(&path, b"stop\n")
        }
    }
}

/// Whether an environment variable of the daemon may hold, or lead to, a secret: a trainer does not
/// get it.
fn is_secret(name: &str) -> bool {
    const PARTS: [&str; 9] = [
        "TOKEN",
        "SECRET",
        "PASSWORD",
        "PASSWD",
        "PASSPHRASE",
        "PASSFILE",
        "CREDENTIAL",
        "API_KEY",
        "APIKEY",
    ];
    const STARTS: [&str; 3] = ["PACKHORSE_", "AWS_", "SSH_AUTH"];
    const ENDS: [&str; 3] = ["_KEY", "_PASS", "_PAT"];
    let name = name.to_ascii_uppercase();
    // The service manager's variables are of no use to a trainer either.
    PARTS.iter().any(|part| name.contains(part))
        || STARTS.iter().any(|start| name.starts_with(start))
        || ENDS.iter().any(|end| name.ends_with(end))
        || matches!(
            name.as_str(),
            "NOTIFY_SOCKET" | "LISTEN_FDS" | "LISTEN_PID" | "KUBECONFIG"
        )
}

/// Whether the program of `[train] command` exists and this user may run it.
pub fn check_program(program: &str) -> Result<(), Fault> {
    let wrong = |why: &dyn std::fmt::Display| {
        Fault::config(format!("[train] command: {program} cannot be run: {why}"))
            .with_next("put the trainer there, let the daemon's user run it, or name another in [train] command")
    };
    let meta = std::fs::metadata(program).map_err(|e| wrong(&e))?;
    if !meta.is_file() {
        return Err(wrong(&"it is not a file"));
    }
    rustix::fs::access(program, rustix::fs::Access::EXEC_OK)
        .map_err(|e| wrong(&std::io::Error::from(e)))
}

/// The watcher: starts the command of a run's folder, limits its log, and records how it ended.
pub fn watch(folder: &Path) -> Result<(), Fault> {
    let folder = Folder::new(folder.to_owned());
    let Some(_lock) = folder.lock_to_stay()? else {
        return Ok(());
    };
    if folder.file("exit.json").exists() {
        return Ok(());
    }
    let path = folder.file("job.json");
    let text = std::fs::read(&path).at(path.display())?;
    let job: Job = serde_json::from_slice(&text)
        .map_err(|e| Fault::internal(format!("{}: {e}", path.display())))?;
    let ended = work(&folder, &job)?;
    let text = serde_json::to_vec_pretty(&ended)
        .map_err(|e| Fault::internal(format!("an end as JSON: {e}")))?;
    durable::replace(&folder.file("exit.json"), &text)
}

/// The last step before the trainer: makes it end with its watcher. Returns only when the command
/// cannot be started.
pub fn become_trainer(command: &[String]) -> Fault {
    let Some((program, arguments)) = command.split_first() else {
        return Fault::usage("no command");
    };
    if let Err(e) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
        return Fault::io("bind the trainer to its watcher", &e.into());
    }
    let error = Command::new(program).args(arguments).exec();
    Fault::io(format_args!("start {program}"), &error)
}

fn work(folder: &Folder, job: &Job) -> Result<Ended, Fault> {
    let (mut reader, writer) = std::io::pipe().at("make a pipe")?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("packhorse")
        .args(["trainer", "--exec", "--"])
        .args(&job.command);
    command
        .envs(&job.environment)
        .current_dir(folder.path())
        .process_group(0)
        .stdin(Stdio::null());
    command
        .stdout(writer.try_clone().at("make a pipe")?)
        .stderr(writer);
    let mut child = command.spawn().at("start the trainer")?;
    drop(command); // its ends of the pipe
    let log = Arc::new(Mutex::new(Log::open(folder.file("trainer.log"))?));
    let (done, said_all) = mpsc::sync_channel::<()>(1);
    let keeper = log.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 16 << 10];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            keeper.lock().take(&buffer[..count]);
        }
        let _ = done.send(());
    });
    let (status, why) = wait(folder, job, &mut child)?;
    let _ = said_all.recv_timeout(LAST_WORDS_MAX);
    let tail = log.lock().tail();
    let how = match (status.code(), status.signal()) {
        (Some(0), _) => "the trainer ended well".to_owned(),
        (Some(code), _) => format!("the trainer ended with exit code {code}"),
        (None, Some(signal)) => format!("the trainer was ended by signal {signal}"),
        (None, None) => "the trainer ended".to_owned(),
    };
    Ok(Ended {
        exit_code: status.code(),
        signal: status.signal(),
        message: why
            .map_or(how.clone(), |why| format!("{how}: {why}"))
            .into(),
        tail: tail.into(),
        ended_ms: clock::now_ms(),
    })
}

fn signal(child: &Child, signal: Signal) {
    let _ = kill_process_group(Pid::from_child(child), signal);
}

/// Whether a child has ended. It is not reaped, so its process id stays its own.
fn has_ended(child: &Child) -> Result<bool, Fault> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let ended = waitid(WaitId::Pid(Pid::from_child(child)), options).map_err(std::io::Error::from);
    Ok(ended.at("wait for the trainer")?.is_some())
}

/// Waits for the trainer's end, and ends the trainer on request.
fn wait(
    folder: &Folder,
    job: &Job,
    child: &mut Child,
) -> Result<(ExitStatus, Option<&'static str>), Fault> {
    let mut stopping: Option<(Instant, &'static str)> = None;
    loop {
        if has_ended(child)? {
            // Processes left in its group hold GPUs and the pipe. They are killed before the
            // trainer is reaped: afterwards its process id, which is the group's id, may belong to
            // another process.
            signal(child, Signal::KILL);
            let status = child.wait().at("wait for the trainer")?;
            return Ok((status, stopping.map(|(_, why)| why)));
        }
        match stopping {
            Some((since, _)) if since.elapsed() >= TRAINER_GRACE => signal(child, Signal::KILL),
            Some(_) => {}
            None => {
                let why = if folder.file("stop").exists() {
                    Some("the run was ended")
                } else if clock::now_ms() >= job.deadline_ms {
                    Some("the run's time was up")
                } else {
                    None
                };
                if let Some(why) = why {
                    signal(child, Signal::TERM);
                    stopping = Some((Instant::now(), why));
                }
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A trainer's output: a file of bounded size, and its last bytes.
struct Log {
    path: PathBuf,
    file: File,
    size: u64,
    tail: Vec<u8>,
}

impl Log {
    fn open(path: PathBuf) -> Result<Self, Fault> {
        let file = File::create(&path).at(path.display())?;
        Ok(Self {
            path,
            file,
            size: 0,
            tail: Vec::new(),
        })
    }

    fn take(&mut self, bytes: &[u8]) {
        if self.size + bytes.len() as u64 > TRAINER_LOG_BYTES_MAX {
            // A log that cannot be written must not stop a training.
            let _ = std::fs::copy(&self.path, self.path.with_extension("log.old"));
            if let Ok(file) = File::create(&self.path) {
                self.file = file;
            }
            self.size = 0;
        }
        if self.file.write_all(bytes).is_ok() {
            self.size += bytes.len() as u64;
        }
        self.tail.extend_from_slice(bytes);
        let surplus = self.tail.len().saturating_sub(TRAINER_TAIL_BYTES);
        self.tail.drain(..surplus);
    }

    fn tail(&self) -> String {
        String::from_utf8_lossy(&self.tail).trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_keeps_its_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer.log");
        let mut log = Log::open(path.clone()).unwrap();
        let line = [b'x'; 64 << 10];
        for _ in 0..(2 * TRAINER_LOG_BYTES_MAX / line.len() as u64) + 3 {
            log.take(&line);
        }
        log.take(b"the end\n");
        assert!(std::fs::metadata(&path).unwrap().len() <= TRAINER_LOG_BYTES_MAX);
        assert!(
            std::fs::metadata(dir.path().join("trainer.log.old"))
                .unwrap()
                .len()
                <= TRAINER_LOG_BYTES_MAX
        );
        assert!(log.tail().ends_with("xthe end") && log.tail().len() < TRAINER_TAIL_BYTES);
    }

    #[test]
    fn a_check_does_not_prevent_a_new_watcher() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("r"));
        folder.prepare(&serde_json::json!({"run": "r"})).unwrap();
        let look = folder.lock().unwrap().unwrap();
        let looking = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(look);
        });
        assert!(folder.lock_to_stay().unwrap().is_some());
        looking.join().unwrap();
    }

    #[test]
    fn variables_with_secrets_are_not_for_trainers() {
        for name in [
            "PACKHORSE_TOKEN_FILE",
            "PACKHORSE_CONFIG",
            "PACKHORSE_JOIN_TOKEN",
            "PGPASSWORD",
            "PGPASSFILE",
            "CREDENTIALS_DIRECTORY",
            "AWS_SESSION",
            "github_token",
            "WANDB_API_KEY",
            "DB_PASS",
        ] {
            assert!(is_secret(name), "{name}");
        }
        for name in [
            "PATH",
            "HOME",
            "LANG",
            "CUDA_VISIBLE_DEVICES",
            "LD_LIBRARY_PATH",
            "PYTHONPATH",
            "KEYBOARD",
            "COMPASS",
        ] {
            assert!(!is_secret(name), "{name}");
        }
    }

    #[test]
    fn a_folder_knows_whose_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("r"));
        assert_eq!(folder.descriptor_of("r-1").unwrap(), None, "there is none");
        let descriptor = serde_json::json!({"run": "r", "id": "r-1"});
        folder.prepare(&descriptor).unwrap();
        assert_eq!(
            (
                folder.descriptor_of("r-1").unwrap(),
                folder.descriptor_of("r-2").unwrap()
            ),
            (Some(descriptor), None)
        );
        durable::replace(&folder.descriptor(), b"no JSON").unwrap();
        assert_eq!(folder.descriptor_of("r-1").unwrap(), None);
    }

    #[test]
    fn a_folder_knows_how_its_process_is() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("r"));
        assert_eq!(folder.process().unwrap(), Process::Absent);
        folder.prepare(&serde_json::json!({"run": "r"})).unwrap();
        assert_eq!(
            (folder.process().unwrap(), folder.has_output()),
            (Process::Absent, false)
        );
        let held = folder.lock().unwrap().unwrap();
        assert_eq!(folder.process().unwrap(), Process::Running);
        let ended = Ended {
            exit_code: Some(0),
            signal: None,
            message: "m".into(),
            tail: "t".into(),
            ended_ms: 1,
        };
        durable::replace(
            &folder.file("exit.json"),
            &serde_json::to_vec(&ended).unwrap(),
        )
        .unwrap();
        drop(held);
        assert_eq!(folder.process().unwrap(), Process::Ended(ended));
        durable::replace(&folder.output().join("model"), b"m").unwrap();
        assert!(folder.has_output());
        folder.prepare(&serde_json::json!({})).unwrap();
        assert_eq!(
            (folder.process().unwrap(), folder.has_output()),
            (Process::Absent, false)
        );
    }
}

#[cfg(test)]
mod end_tests {
    use super::*;

    #[test]
    fn the_process_id_of_an_ended_trainer_is_kept_until_its_group_was_killed() {
        let mut command = Command::new("sh");
        // One that is left behind in the group, and says its number.
        command
            .args(["-c", "sleep 600 & echo $!"])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut said = String::new();
        let mut byte = [0];
        let mut stdout = child.stdout.take().unwrap();
        while !said.ends_with('\n') && stdout.read(&mut byte).unwrap() == 1 {
            said.push(char::from(byte[0]));
        }
        let left: i32 = said.trim().parse().unwrap();
        while !has_ended(&child).unwrap() {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(has_ended(&child).unwrap(), "looking takes nothing away");
        let left = Pid::from_raw(left).unwrap();
        assert!(rustix::process::test_kill_process(left).is_ok());
        signal(&child, Signal::KILL);
        child.wait().unwrap();
        // It closes its end of the pipe as it goes.
        assert_eq!(stdout.read(&mut byte).unwrap(), 0);
    }
}
