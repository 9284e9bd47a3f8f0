//! The limit of open files (file descriptors) of this process, and the parts of it that connections
//! may use.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::limits::OPEN_FILES_EASY;

/// Raises the soft limit to the hard limit. Says so in the log if that is little.
pub fn raise() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    if max() < OPEN_FILES_EASY {
        let next = "raise it with LimitNOFILE= in the systemd unit, or with 'ulimit -n'";
        tracing::warn!(
            open_files = max(),
            next,
            "this process may open few files: it accepts fewer connections than usual"
        );
    }
}

/// How many files this process may have open.
fn max() -> usize {
    getrlimit(Resource::Nofile)
        .current
        .and_then(|n| usize::try_from(n).ok())
        .unwrap_or(usize::MAX)
}

/// `wanted` connections, but at most one part in `parts` of the open files: the rest is for files,
/// databases and other connections.
pub fn share(wanted: usize, parts: usize) -> usize {
    wanted.min(max() / parts).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_get_a_part_of_what_the_process_may_open() {
        assert_eq!(share(7, 2), 7);
        assert_eq!(share(usize::MAX, 4), max() / 4);
        assert_eq!(share(0, usize::MAX), 1, "one connection at least");
    }
}
