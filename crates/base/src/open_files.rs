//! The limit of open files (file descriptors) of this process, and the share of it that connections
//! may use.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::limits::OPEN_FILES_EASY;

/// Raises the soft limit to the hard limit. Logs a warning if the hard limit is low.
pub fn raise() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    if max() < OPEN_FILES_EASY {
        let next = "raise it with LimitNOFILE= in the systemd unit, or with 'ulimit -n'";
        tracing::warn!(
            open_files = max(),
            next,
            "the limit of open files is low: this process accepts fewer connections than usual"
        );
    }
}

/// The number of files that this process may have open.
fn max() -> usize {
    getrlimit(Resource::Nofile)
        .current
        .and_then(|n| usize::try_from(n).ok())
        .unwrap_or(usize::MAX)
}

/// Limits `wanted` connections to one `parts`-th of the open files. The rest is for files,
/// databases and other connections.
pub fn share(wanted: usize, parts: usize) -> usize {
    wanted.min(max() / parts).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_get_a_share_of_the_open_files() {
        assert_eq!(share(7, 2), 7);
        assert_eq!(share(usize::MAX, 4), max() / 4);
        assert_eq!(share(0, usize::MAX), 1, "at least one connection");
    }
}
