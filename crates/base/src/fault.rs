//! The error type that users and scripts see.
//!
//! Every module converts its own errors into a [`Fault`] before it returns them. `message` states
//! what failed, where and why; `next` states what to do; `code` is the exit code of the command;
//! `reason` is shown for the transfer; `retry` states whether a retry can help. Faults are sent
//! over the API and to peers, so they never contain a secret.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::limits::{MESSAGE_BYTES_MAX, NEXT_BYTES_MAX};
use crate::text;

/// The class of a fault. Its number is the exit code of the command that ends with the fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// A defect in Packhorse, or an I/O error without a more specific class.
    Internal = 1,
    /// The command or request is malformed.
    Usage = 2,
    /// The configuration is invalid.
    Config = 3,
    /// A token, certificate or permission is missing, invalid or already used.
    NotAllowed = 4,
    /// The object does not exist.
    NotFound = 5,
    /// The object exists with different content, or is in use.
    Conflict = 6,
    /// Some sites failed, others succeeded.
    Partial = 7,
    /// The content does not match its hash, or the input is malformed.
    Integrity = 8,
    /// A disk or a quota is full.
    NoSpace = 9,
    /// A daemon, database, registry or source does not respond.
    Unreachable = 10,
    /// The time limit was exceeded.
    Deadline = 11,
}

impl Code {
    pub fn exit(self) -> u8 {
        self as u8
    }
}

/// Why a transfer is in its state: the fixed list that `status` shows next to the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The site is not connected to the hub.
    SiteOffline,
    /// The site has no connection to the hub (reported by the site).
    HubUnreachable,
    /// The time window of the connection is closed.
    WindowClosed,
    /// A disk at the site is full.
    NoSpace,
    /// The database, registry or NAS does not respond.
    SinkUnavailable,
    /// The database, registry or NAS rejects the credentials or denies the permission.
    SinkDenied,
    /// The sink cannot store this artifact (names, an immutable tag, a quota).
    SinkRefused,
    /// The site or server that holds the content is not available.
    WaitingForSource,
    /// An artifact that this one depends on has not arrived.
    WaitingForDependency,
    /// Other transfers are processed first.
    WaitingForTurn,
    /// The content did not match its hash.
    Integrity,
    /// A user paused the transfer.
    PausedByUser,
    /// A user cancelled the transfer.
    CancelledByUser,
    /// The source no longer has the artifact.
    SourceGone,
    /// A defect or an I/O error; see the message.
    Internal,
}

impl Reason {
    /// The identifier used in JSON and tables.
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

/// Whether an automatic retry can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// No: a person must first change something and then run `retry`.
    Never,
    /// Yes, with the usual growing pause.
    Backoff,
    /// Yes, but not before this many milliseconds (Retry-After of a server).
    AfterMs(u64),
}

/// `next` of a full disk, for work that resumes when there is space.
const FREE_SPACE: &str = "free space on that disk; the transfer resumes automatically";

/// An error. Create it with the constructor of its class, then change details with the `with_`
/// methods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    pub code: Code,
    /// What a transfer shows.
    pub reason: Reason,
    pub retry: Retry,
    /// What failed, where and why: lower case, no full stop. The message of a peer is shortened and
    /// cleaned when it is parsed.
    #[serde(deserialize_with = "text::bounded::<_, MESSAGE_BYTES_MAX>")]
    pub message: String,
    /// What the user should do next.
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

    /// A defect, or an I/O error without a more specific class.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(
            Code::Internal,
            Reason::Internal,
            Retry::Backoff,
            message,
            "read the daemon's log; if the error occurs again, report it with that log",
        )
    }

    /// The command or request is malformed.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(
            Code::Usage,
            Reason::Internal,
            Retry::Never,
            message,
            "see 'packhorse --help'",
        )
    }

    /// The configuration is invalid.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(
            Code::Config,
            Reason::Internal,
            Retry::Never,
            message,
            "fix the configuration, then run 'packhorse config check'",
        )
    }

    /// A token, certificate or permission is missing or invalid.
    pub fn not_allowed(message: impl Into<String>) -> Self {
        Self::new(
            Code::NotAllowed,
            Reason::SinkDenied,
            Retry::Never,
            message,
            "check the token or the credentials",
        )
    }

    /// The object does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(
            Code::NotFound,
            Reason::SourceGone,
            Retry::Never,
            message,
            "check the name; 'packhorse artifacts' and 'packhorse sites' list the existing names",
        )
    }

    /// The object exists with different content, or is in use.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(
            Code::Conflict,
            Reason::SinkRefused,
            Retry::Never,
            message,
            "publish it under another version",
        )
    }

    /// The content does not match its hash, or the input is malformed.
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
            FREE_SPACE,
        )
    }

    /// A server or peer does not respond.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self::new(
            Code::Unreachable,
            Reason::SinkUnavailable,
            Retry::Backoff,
            message,
            "check that it is running and that the network allows the connection; this is retried automatically",
        )
    }

    /// The time limit was exceeded.
    pub fn deadline(message: impl Into<String>) -> Self {
        Self::new(
            Code::Deadline,
            Reason::Internal,
            Retry::Never,
            message,
            "run 'packhorse status' to see the progress; the work continues",
        )
    }

    /// A part of the work was done; the rest will not be done.
    pub fn partial(message: impl Into<String>) -> Self {
        Self::new(
            Code::Partial,
            Reason::Internal,
            Retry::Never,
            message,
            "see 'packhorse status'",
        )
    }

    /// A secret file that was readable at start and no longer is. The program that replaces the
    /// file may still be writing it, so this is retried.
    pub fn secret_unreadable(file: &Path, error: &std::io::Error) -> Self {
        Self::not_allowed(format!(
            "read the password file {}: {error}",
            file.display()
        ))
        .with_retry(Retry::Backoff)
        .with_next(format!(
            "write the password to {} and make the file readable for the daemon's user; the work resumes automatically",
            file.display()
        ))
    }

    /// Replaces the usual reason of the class.
    pub fn with_reason(mut self, reason: Reason) -> Self {
        self.reason = reason;
        self
    }

    /// Replaces the usual retry policy of the class.
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Retries after the pause that a server asked for.
    pub fn with_retry_after(self, pause: Duration) -> Self {
        self.with_retry(Retry::AfterMs(pause.as_millis() as u64))
    }

    /// Replaces the usual advice of the class.
    pub fn with_next(mut self, next: impl Into<String>) -> Self {
        self.next = next.into();
        self
    }

    /// Changes the advice for a publish, which does not resume automatically when a full disk has
    /// space again.
    pub fn of_publish(self) -> Self {
        if self.next != FREE_SPACE {
            return self;
        }
        self.with_next(
            "free space on that disk, then publish again: content that is already stored is not stored again",
        )
    }

    /// Changes the class for an error in a sink's own directory. A missing path or a denied
    /// permission can be temporary there: the NAS is not mounted, or its server restores
    /// permissions late. Therefore only errors about the artifact itself are final, for example a
    /// name that is too long.
    pub fn of_sink(self) -> Self {
        match (self.retry, self.code, self.reason) {
            (Retry::Never, Code::NotFound, Reason::SourceGone) => {
                let next = "check that the disk or NAS is mounted; the transfer resumes automatically";
                Self::new(Code::Unreachable, Reason::SinkUnavailable, Retry::Backoff, self.message, next)
            }
            (Retry::Never, Code::NotAllowed, Reason::SinkDenied) => self
                .with_retry(Retry::Backoff)
                .with_next("give the daemon's user read and write permission there; the transfer resumes automatically"),
            (Retry::Never, Code::Usage, Reason::Internal) => self.with_reason(Reason::SinkRefused),
            _ => self,
        }
    }

    /// Prefixes the message with the place of the error: `context: message`.
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// Classifies an I/O error by its kind: a full disk is `no_space`, a missing path is
    /// `not_found`, and so on.
    pub fn io(what: impl fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let message = format!("{what}: {error}");
        use rustix::io::Errno;
        if matches!(
            Errno::from_io_error(error),
            Some(Errno::MFILE | Errno::NFILE)
        ) {
            // Other work closes files, so an automatic retry can succeed.
            return Self::internal(message).with_next(
                "raise the limit of open files: LimitNOFILE= in the daemon's systemd unit, or 'ulimit -n'; see also fs.file-max",
            );
        }
        match error.kind() {
            K::StorageFull | K::QuotaExceeded => Self::no_space(message),
            // Free space does not help here.
            K::FileTooLarge => Self::conflict(message).with_next(
                "use a filesystem that supports files of that size (FAT32 supports less than 4 GiB), or raise the file size limit",
            ),
            K::NotFound => Self::not_found(message).with_next("check that the path exists on the daemon's machine"),
            K::AlreadyExists | K::NotADirectory => {
                Self::conflict(message).with_next("move the existing file or directory to another location, or use another path")
            }
            // Only errors that `durable` creates itself: the system uses EINVAL for many causes.
            K::InvalidInput if error.raw_os_error().is_none() => Self::usage(message).with_next("use the path of a regular file"),
            K::InvalidFilename => Self::usage(message).with_next("shorten the names"),
            _ if Errno::from_io_error(error) == Some(Errno::ILSEQ) => {
                Self::usage(message).with_next("use names that this filesystem supports")
            }
            // Linux remounts a failed disk read-only; a NAS under maintenance can be read-only too.
            K::ReadOnlyFilesystem => Self::not_allowed(message)
                .with_reason(Reason::SinkUnavailable)
                .with_retry(Retry::Backoff)
                .with_next("make that filesystem writable again; this is retried automatically"),
            K::PermissionDenied => Self::not_allowed(message).with_next("give the daemon's user read or write permission there"),
            K::ConnectionRefused | K::ConnectionReset | K::TimedOut | K::HostUnreachable | K::NetworkUnreachable => {
                Self::unreachable(message)
            }
            _ if is_device_failure(error) => Self::internal(message)
                .with_reason(Reason::SinkUnavailable)
                .with_next("check that disk or NAS ('dmesg' may show the cause); this is retried automatically"),
            _ => Self::internal(message),
        }
    }
}

/// Whether a disk, a server or the connection to it failed, rather than the request being invalid.
fn is_device_failure(error: &std::io::Error) -> bool {
    use rustix::io::Errno as E;
    let disk_errors = [E::IO, E::NXIO, E::NODEV, E::STALE, E::REMOTEIO, E::NOMEDIUM];
    // An SMB client can return EINVAL for valid calls for some time.
    let server_errors = [
        E::HOSTDOWN,
        E::NETDOWN,
        E::NETRESET,
        E::CONNABORTED,
        E::NOTCONN,
        E::SHUTDOWN,
        E::COMM,
        E::NOLINK,
        E::INVAL,
        // Of an SMB or NFS client while its server is away or has started again.
        E::AGAIN,
        E::NOTUNIQ,
        E::REMCHG,
    ];
    error
        .raw_os_error()
        .map(E::from_raw_os_error)
        .is_some_and(|errno| disk_errors.contains(&errno) || server_errors.contains(&errno))
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl From<crate::names::NameError> for Fault {
    fn from(error: crate::names::NameError) -> Self {
        Fault::usage(error.to_string()).with_next("choose a valid name")
    }
}

/// Adds the place of an I/O error and classifies it.
pub trait IoContext<T> {
    /// `what` names the operation and the path: `read /data/a.png`.
    fn at(self, what: impl fmt::Display) -> Result<T, Fault>;

    /// Like [`IoContext::at`], for a path in a sink's directory: see [`Fault::of_sink`].
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
    fn a_file_that_is_too_large_is_not_retried() {
        let of = |errno: rustix::io::Errno| Fault::io("write /nas/a", &errno.into());
        let large = of(rustix::io::Errno::FBIG);
        assert_eq!(
            (large.reason, large.retry),
            (Reason::SinkRefused, Retry::Never),
            "{large:?}"
        );
        assert!(!large.next.contains("free space"), "{}", large.next);
        let full = of(rustix::io::Errno::NOSPC);
        assert_eq!((full.reason, full.retry), (Reason::NoSpace, Retry::Backoff));
    }

    #[test]
    fn a_lack_of_file_descriptors_is_reported() {
        for errno in [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE] {
            let fault = Fault::io("open /nas/a", &errno.into());
            assert!(
                fault.retry == Retry::Backoff && fault.next.contains("limit of open files"),
                "{fault:?}"
            );
        }
    }

    #[test]
    fn a_failing_disk_or_server_is_retried() {
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
            Errno::AGAIN,
            Errno::NOTUNIQ,
            Errno::REMCHG,
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
    fn only_an_error_of_durable_means_not_a_regular_file() {
        let odd = std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file");
        assert_eq!(
            Fault::io("read /a", &odd).next,
            "use the path of a regular file"
        );
        let invalid = Fault::io("sync /nas/a", &rustix::io::Errno::INVAL.into());
        assert!(!invalid.next.contains("regular file"), "{}", invalid.next);
    }

    #[test]
    fn in_a_sink_directory_only_errors_about_the_artifact_are_final() {
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
    fn the_advice_for_a_publish_does_not_promise_a_resume() {
        let full = Fault::no_space("write /hub/store: no space left on device");
        assert!(full.next.contains("resumes automatically"), "{}", full.next);
        let published = full.clone().of_publish();
        assert!(
            published.next.contains("publish again") && !published.next.contains("automatically"),
            "{}",
            published.next
        );
        assert_eq!(
            (published.code, &published.message),
            (full.code, &full.message)
        );
        let specific = full.with_next("publish the archive decompressed");
        assert_eq!(
            specific.clone().of_publish(),
            specific,
            "specific advice is kept"
        );
    }
}
