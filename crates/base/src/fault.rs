//! What went wrong, as a person and a script are told it.
//!
//! Every module turns its own errors into a [`Fault`] at its edge. A fault says what, where and why
//! in `message`, what to do about it in `next`, how a command exits in `code`, what a transfer
//! shows in `reason`, and whether trying again can help in `retry`. It is what crosses the API and
//! the line, so it never carries a secret.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::limits::{MESSAGE_BYTES_MAX, NEXT_BYTES_MAX};
use crate::text;

/// The class of a fault, which is also the exit code of a command that ends with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// A defect in Packhorse itself, or an I/O error with no better name.
    Internal = 1,
    /// The command or request is not of a form that is understood.
    Usage = 2,
    /// The configuration is wrong.
    Config = 3,
    /// A token, certificate or right is missing, wrong or used up.
    NotAllowed = 4,
    /// It does not exist.
    NotFound = 5,
    /// It exists with other content, or is in use.
    Conflict = 6,
    /// Some sites failed, others did not.
    Partial = 7,
    /// Bytes are not what they were said to be, or the input is malformed.
    Integrity = 8,
    /// A disk or a quota is full.
    NoSpace = 9,
    /// A daemon, database, registry or source does not answer.
    Unreachable = 10,
    /// The time that was given ran out.
    Deadline = 11,
}

impl Code {
    /// The process exit code.
    pub fn exit(self) -> u8 {
        self as u8
    }
}

/// Why a transfer is where it is: the fixed list that `status` shows beside the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The site is not connected to the hub.
    SiteOffline,
    /// The site has no connection to the hub now (as seen at the site).
    HubUnreachable,
    /// The time window of the link is closed.
    WindowClosed,
    /// A disk at the site is full.
    NoSpace,
    /// The database, registry or NAS does not answer.
    SinkUnavailable,
    /// The database, registry or NAS refuses these credentials or this right.
    SinkDenied,
    /// The sink cannot hold this artifact as it is (names, an immutable tag, a quota).
    SinkRefused,
    /// The bytes live somewhere that is away now.
    WaitingForSource,
    /// An artifact it needs is not there yet.
    WaitingForDependency,
    /// Other transfers go first.
    WaitingForTurn,
    /// Bytes were not what their hash says.
    Integrity,
    /// Somebody paused it.
    PausedByUser,
    /// Somebody cancelled it.
    CancelledByUser,
    /// The artifact is no longer at its source.
    SourceGone,
    /// A defect or an I/O error; the message says which.
    Internal,
}

impl Reason {
    /// The word in JSON and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::SiteOffline => "site_offline",
            Reason::HubUnreachable => "hub_unreachable",
            Reason::WindowClosed => "window_closed",
            Reason::NoSpace => "no_space",
            Reason::SinkUnavailable => "sink_unavailable",
            Reason::SinkDenied => "sink_denied",
            Reason::SinkRefused => "sink_refused",
            Reason::WaitingForSource => "waiting_for_source",
            Reason::WaitingForDependency => "waiting_for_dependency",
            Reason::WaitingForTurn => "waiting_for_turn",
            Reason::Integrity => "integrity",
            Reason::PausedByUser => "paused_by_user",
            Reason::CancelledByUser => "cancelled_by_user",
            Reason::SourceGone => "source_gone",
            Reason::Internal => "internal",
        }
    }
}

/// Whether trying again by itself can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// No: a person has to change something first, then `retry`.
    Never,
    /// Yes, with the usual growing pause.
    Backoff,
    /// Yes, but not before this many milliseconds (a server's Retry-After).
    AfterMs(u64),
}

/// What to do about a full disk, for whatever waits until there is room.
const MAKE_ROOM: &str = "make room; the transfer goes on by itself";

/// One fault. Build it with the constructor named after its class, then say more with the `with_`
/// calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The class, and the exit code.
    pub code: Code,
    /// What a transfer shows.
    pub reason: Reason,
    /// Whether to try again.
    pub retry: Retry,
    /// What, where and why: lower-case, no full stop. That of a peer is cut and cleaned where it is
    /// parsed.
    #[serde(deserialize_with = "text::bounded::<_, MESSAGE_BYTES_MAX>")]
    pub message: String,
    /// What to do next.
    #[serde(deserialize_with = "text::bounded::<_, NEXT_BYTES_MAX>")]
    pub next: String,
}

impl Fault {
    fn new(
        code: Code,
        reason: Reason,
        retry: Retry,
        message: impl Into<String>,
        next: &str,
    ) -> Self {
        Self {
            code,
            reason,
            retry,
            message: message.into(),
            next: next.into(),
        }
    }

    /// A defect, or an I/O error with no better name.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(
            Code::Internal,
            Reason::Internal,
            Retry::Backoff,
            message,
            "read the daemon's log; if it comes again, report it with that log",
        )
    }

    /// The command or request is not understood.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(
            Code::Usage,
            Reason::Internal,
            Retry::Never,
            message,
            "see 'packhorse --help'",
        )
    }

    /// The configuration is wrong.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(
            Code::Config,
            Reason::Internal,
            Retry::Never,
            message,
            "fix the configuration, then run 'packhorse config check'",
        )
    }

    /// A token, certificate or right is missing or wrong.
    pub fn not_allowed(message: impl Into<String>) -> Self {
        Self::new(
            Code::NotAllowed,
            Reason::SinkDenied,
            Retry::Never,
            message,
            "check the token or the credentials",
        )
    }

    /// It does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(
            Code::NotFound,
            Reason::SourceGone,
            Retry::Never,
            message,
            "check the name; 'packhorse artifacts' and 'packhorse sites' list what there is",
        )
    }

    /// It exists with other content, or is in use.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(
            Code::Conflict,
            Reason::SinkRefused,
            Retry::Never,
            message,
            "publish it under another version",
        )
    }

    /// Bytes are not what they were said to be, or the input is malformed.
    pub fn integrity(message: impl Into<String>) -> Self {
        Self::new(
            Code::Integrity,
            Reason::Integrity,
            Retry::Never,
            message,
            "correct the input, then run the command again",
        )
    }

    /// A disk or a quota is full.
    pub fn no_space(message: impl Into<String>) -> Self {
        Self::new(
            Code::NoSpace,
            Reason::NoSpace,
            Retry::Backoff,
            message,
            MAKE_ROOM,
        )
    }

    /// A server or peer does not answer.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self::new(
            Code::Unreachable,
            Reason::SinkUnavailable,
            Retry::Backoff,
            message,
            "check that it runs and that the network lets it through; this is tried again by itself",
        )
    }

    /// The time that was given ran out.
    pub fn deadline(message: impl Into<String>) -> Self {
        Self::new(
            Code::Deadline,
            Reason::Internal,
            Retry::Never,
            message,
            "ask again with 'packhorse status'; the work goes on",
        )
    }

    /// Some of it was done, and the rest will not be.
    pub fn partial(message: impl Into<String>) -> Self {
        Self::new(
            Code::Partial,
            Reason::Internal,
            Retry::Never,
            message,
            "see 'packhorse status'",
        )
    }

    /// A file with a secret that cannot be read any more, though it could at the start: who
    /// replaces it may not be done yet.
    pub fn secret_unreadable(file: &Path, error: &std::io::Error) -> Self {
        Self::not_allowed(format!(
            "read the password file {}: {error}",
            file.display()
        ))
        .with_retry(Retry::Backoff)
        .with_next(format!(
            "put the password into {}, readable for the daemon's user; it goes on by itself",
            file.display()
        ))
    }

    /// Says what a transfer shows instead of the class's usual reason.
    pub fn with_reason(mut self, reason: Reason) -> Self {
        self.reason = reason;
        self
    }

    /// Says whether trying again helps instead of the class's usual answer.
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// The same, with the pause a server asked for.
    pub fn with_retry_after(self, pause: Duration) -> Self {
        self.with_retry(Retry::AfterMs(pause.as_millis() as u64))
    }

    /// Says what to do next instead of the class's usual advice.
    pub fn with_next(mut self, next: impl Into<String>) -> Self {
        self.next = next.into();
        self
    }

    /// The same, said of a publish: unlike a transfer it does not go on by itself once a disk has
    /// room.
    pub fn of_publish(self) -> Self {
        if self.next != MAKE_ROOM {
            return self;
        }
        self.with_next(
            "make room on that disk, then publish again: what was kept is not stored again",
        )
    }

    /// The same, said of a sink's own folder. What is missing or refused there now may be there at
    /// the next try: the NAS is not mounted, or its server gives rights back late. So nothing is
    /// final but what is about the artifact itself, as a name that is too long.
    pub fn of_sink(self) -> Self {
        match (self.retry, self.code, self.reason) {
            (Retry::Never, Code::NotFound, Reason::SourceGone) => {
                let next = "check that the disk or NAS is mounted; the transfer goes on by itself";
                Self::new(Code::Unreachable, Reason::SinkUnavailable, Retry::Backoff, self.message, next)
            }
            (Retry::Never, Code::NotAllowed, Reason::SinkDenied) => self
                .with_retry(Retry::Backoff)
                .with_next("give the daemon's user the right to read and write there; the transfer goes on by itself"),
            (Retry::Never, Code::Usage, Reason::Internal) => self.with_reason(Reason::SinkRefused),
            _ => self,
        }
    }

    /// Puts where it happened before the message: `context: message`.
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// An I/O error on a path, classed by its kind: a full disk is `no_space`, a missing path
    /// `not_found`, and so on.
    pub fn io(what: impl fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let message = format!("{what}: {error}");
        use rustix::io::Errno;
        if matches!(
            Errno::from_io_error(error),
            Some(Errno::MFILE | Errno::NFILE)
        ) {
            // Other work closes files: what retries by itself goes on then.
            return Self::internal(message).with_next(
                "raise the limit of open files: LimitNOFILE= in the daemon's systemd unit, or 'ulimit -n'; see also fs.file-max",
            );
        }
        match error.kind() {
            K::StorageFull | K::QuotaExceeded => Self::no_space(message),
            // No room made there would help.
            K::FileTooLarge => Self::conflict(message).with_next(
                "no file of that size can be there: use another filesystem (FAT holds none of 4 GiB), or raise the limit on the size of files",
            ),
            K::NotFound => Self::not_found(message).with_next("check the path as the daemon sees it"),
            K::AlreadyExists | K::NotADirectory => {
                Self::conflict(message).with_next("something else stands there: move it away, or name another path")
            }
            // Only what `durable` refuses itself: the system says EINVAL of many things.
            K::InvalidInput if error.raw_os_error().is_none() => Self::usage(message).with_next("name a regular file"),
            K::InvalidFilename => Self::usage(message).with_next("shorten the names"),
            _ if Errno::from_io_error(error) == Some(Errno::ILSEQ) => {
                Self::usage(message).with_next("use names that this filesystem can hold")
            }
            // As a disk that failed is mounted again by Linux, or a NAS that is being worked on.
            K::ReadOnlyFilesystem => Self::not_allowed(message)
                .with_reason(Reason::SinkUnavailable)
                .with_retry(Retry::Backoff)
                .with_next("make that filesystem writable again; this is tried again by itself"),
            K::PermissionDenied => Self::not_allowed(message).with_next("give the daemon's user the right to read or write there"),
            K::ConnectionRefused | K::ConnectionReset | K::TimedOut | K::HostUnreachable | K::NetworkUnreachable => {
                Self::unreachable(message)
            }
            _ if is_of_device(error) => Self::internal(message)
                .with_reason(Reason::SinkUnavailable)
                .with_next("check that disk or NAS: 'dmesg' may say more; this is tried again by itself"),
            _ => Self::internal(message),
        }
    }
}

/// Whether a disk, a server or the connection to it failed, and no request was wrong.
fn is_of_device(error: &std::io::Error) -> bool {
    use rustix::io::Errno as E;
    let of_disk = [E::IO, E::NXIO, E::NODEV, E::STALE, E::REMOTEIO, E::NOMEDIUM];
    // An SMB client answers EINVAL to correct calls for a while.
    let of_server = [
        E::HOSTDOWN,
        E::NETDOWN,
        E::NETRESET,
        E::CONNABORTED,
        E::NOTCONN,
        E::SHUTDOWN,
        E::COMM,
        E::NOLINK,
        E::INVAL,
    ];
    error
        .raw_os_error()
        .map(E::from_raw_os_error)
        .is_some_and(|errno| of_disk.contains(&errno) || of_server.contains(&errno))
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl From<crate::names::NameError> for Fault {
    fn from(error: crate::names::NameError) -> Self {
        Fault::usage(error.to_string()).with_next("choose a name that fits")
    }
}

/// Adds where an I/O error happened and classes it.
pub trait IoContext<T> {
    /// `what` names the operation and the path: `read /data/a.png`.
    fn at(self, what: impl fmt::Display) -> Result<T, Fault>;

    /// The same in a folder of a sink: see [`Fault::of_sink`].
    fn at_sink(self, what: impl fmt::Display) -> Result<T, Fault>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn at(self, what: impl fmt::Display) -> Result<T, Fault> {
        self.map_err(|e| Fault::io(what, &e))
    }

    fn at_sink(self, what: impl fmt::Display) -> Result<T, Fault> {
        self.at(what).map_err(Fault::of_sink)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_too_large_waits_for_no_room() {
        let of = |errno: rustix::io::Errno| Fault::io("write /nas/a", &errno.into());
        let large = of(rustix::io::Errno::FBIG);
        assert_eq!(
            (large.reason, large.retry),
            (Reason::SinkRefused, Retry::Never),
            "{large:?}"
        );
        assert!(!large.next.contains("make room"), "{}", large.next);
        let full = of(rustix::io::Errno::NOSPC);
        assert_eq!((full.reason, full.retry), (Reason::NoSpace, Retry::Backoff));
    }

    #[test]
    fn a_lack_of_file_descriptors_is_named() {
        for errno in [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE] {
            let fault = Fault::io("open /nas/a", &errno.into());
            assert!(
                fault.retry == Retry::Backoff && fault.next.contains("limit of open files"),
                "{fault:?}"
            );
        }
    }

    #[test]
    fn a_disk_or_a_server_that_fails_is_waited_for() {
        use rustix::io::Errno;
        let of_device = [
            Errno::IO,
            Errno::STALE,
            Errno::NOTCONN,
            Errno::NODEV,
            Errno::ROFS,
            Errno::INVAL,
        ];
        for errno in of_device.into_iter().chain([
            Errno::HOSTDOWN,
            Errno::NETDOWN,
            Errno::NETRESET,
            Errno::CONNABORTED,
        ]) {
            let fault = Fault::io("write /nas/a", &errno.into());
            assert_eq!(
                (fault.reason, fault.retry),
                (Reason::SinkUnavailable, Retry::Backoff),
                "{fault:?}"
            );
        }
    }

    #[test]
    fn only_what_is_no_regular_file_is_said_to_be_none() {
        let odd = std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file");
        assert_eq!(Fault::io("read /a", &odd).next, "name a regular file");
        let invalid = Fault::io("sync /nas/a", &rustix::io::Errno::INVAL.into());
        assert!(!invalid.next.contains("regular file"), "{}", invalid.next);
    }

    #[test]
    fn in_a_folder_of_a_sink_only_what_is_about_the_artifact_is_final() {
        use rustix::io::Errno as E;
        let of = |errno: E| {
            Err::<(), _>(std::io::Error::from(errno))
                .at_sink("open /nas/a")
                .unwrap_err()
        };
        for (errno, code, reason, retry) in [
            (
                E::NOENT,
                Code::Unreachable,
                Reason::SinkUnavailable,
                Retry::Backoff,
            ),
            (
                E::ACCESS,
                Code::NotAllowed,
                Reason::SinkDenied,
                Retry::Backoff,
            ),
            (
                E::PERM,
                Code::NotAllowed,
                Reason::SinkDenied,
                Retry::Backoff,
            ),
            (
                E::INVAL,
                Code::Internal,
                Reason::SinkUnavailable,
                Retry::Backoff,
            ),
            (
                E::ROFS,
                Code::NotAllowed,
                Reason::SinkUnavailable,
                Retry::Backoff,
            ),
            (E::NOSPC, Code::NoSpace, Reason::NoSpace, Retry::Backoff),
            (
                E::NAMETOOLONG,
                Code::Usage,
                Reason::SinkRefused,
                Retry::Never,
            ),
            (E::ILSEQ, Code::Usage, Reason::SinkRefused, Retry::Never),
            (E::FBIG, Code::Conflict, Reason::SinkRefused, Retry::Never),
        ] {
            let fault = of(errno);
            assert_eq!(
                (fault.code, fault.reason, fault.retry),
                (code, reason, retry),
                "{fault:?}"
            );
        }
        let conflict = Fault::conflict("another content").of_sink();
        assert_eq!(conflict.retry, Retry::Never);
    }

    #[test]
    fn a_publish_is_not_said_to_go_on_by_itself() {
        let full = Fault::no_space("write /hub/store: no space left on device");
        assert!(full.next.contains("goes on by itself"), "{}", full.next);
        let published = full.clone().of_publish();
        assert!(
            published.next.contains("publish again") && !published.next.contains("by itself"),
            "{}",
            published.next
        );
        assert_eq!(
            (published.code, &published.message),
            (full.code, &full.message)
        );
        let better = full.with_next("publish the archive decompressed");
        assert_eq!(
            better.clone().of_publish(),
            better,
            "what is said already of this very case stands"
        );
    }
}
