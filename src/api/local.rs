//! The local socket of the API: `<data_dir>/api.sock`, for the command line on the same machine.
//!
//! Only the daemon's user can connect to it or create another socket there, so a client may send
//! the token over it without a proof. The daemon removes the socket when it stops; a socket that a
//! crash left is replaced at the next start, under the lock of `data_dir`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};

use base::fault::{Fault, IoContext};

/// Its name in `data_dir`.
const NAME: &str = "api.sock";
/// The longest path of a socket in the kernel, including the NUL at its end.
const PATH_BYTES_MAX: usize = 108;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// The path of a socket, in a form that the kernel accepts for any length of `data_dir`.
#[derive(Debug)]
pub(crate) struct SocketPath {
    path: PathBuf,
    /// The folder that `path` leads through.
    _dir: Option<OwnedFd>,
}

impl SocketPath {
    fn of(data_dir: &Path) -> io::Result<Self> {
        let path = data_dir.join(NAME);
        if path.as_os_str().len() < PATH_BYTES_MAX {
            return Ok(Self { path, _dir: None });
        }
        let dir = rustix::fs::open(
            data_dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self {
            path: PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(NAME),
            _dir: Some(dir),
        })
    }

    /// The socket of the daemon with this state folder, if a daemon listens on it and this user may
    /// connect.
    pub(crate) fn of_running(data_dir: &Path) -> Option<Self> {
        let path = Self::of(data_dir).ok()?;
        let socket = socket().ok()?;
        match rustix::net::connect(&socket, &SocketAddrUnix::new(&path.path).ok()?) {
            // The daemon runs and has many requests.
            Ok(()) | Err(Errno::AGAIN) => Some(path),
            Err(_) => None,
        }
    }

    /// The path, valid as long as this value exists.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

/// The daemon's side.
pub struct LocalSocket {
    listener: UnixListener,
    path: SocketPath,
}

impl LocalSocket {
    /// Listens in this state folder, whose lock the caller holds.
    pub fn listen(data_dir: &Path) -> Result<Self, Fault> {
        let place = data_dir.join(NAME);
        let path = SocketPath::of(data_dir).at(place.display())?;
        Self::listen_at(path).at(format_args!("listen on {}", place.display()))
    }

    fn listen_at(path: SocketPath) -> io::Result<Self> {
        match std::fs::remove_file(&path.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = socket()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path.path)?)?;
        // No client can connect before it listens.
        rustix::fs::chmod(&path.path, Mode::RUSR | Mode::WUSR)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self {
            listener: UnixListener::from_std(socket.into())?,
            path,
        })
    }

    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn the_socket_is_private_and_is_removed_with_the_daemon_for_any_path_length() {
        let dir = tempfile::tempdir().unwrap();
        for data_dir in [dir.path().join("d"), dir.path().join("d".repeat(200))] {
            std::fs::create_dir(&data_dir).unwrap();
            assert!(SocketPath::of_running(&data_dir).is_none());
            let socket = LocalSocket::listen(&data_dir).unwrap();
            let file = data_dir.join(NAME);
            assert_eq!(
                std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
                0o600
            );
            let running = SocketPath::of_running(&data_dir).unwrap();
            assert!(running.path().as_os_str().len() < PATH_BYTES_MAX);
            UnixStream::connect(running.path()).await.unwrap();
            drop(socket);
            assert!(!file.exists());
            // A socket that a crash left is harmless: no process listens on it, and the next start
            // replaces it.
            let left = SocketPath::of(&data_dir).unwrap();
            drop(std::os::unix::net::UnixListener::bind(left.path()).unwrap());
            assert!(file.exists() && SocketPath::of_running(&data_dir).is_none());
            let again = LocalSocket::listen(&data_dir).unwrap();
            assert!(SocketPath::of_running(&data_dir).is_some());
            drop(again);
        }
    }
}
