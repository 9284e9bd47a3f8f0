//! The memory limit of the control group in which this process runs (version 2 or 1).
//!
//! The configuration asks for it once, for the default of `[limits] memory`. A limit of any group
//! above counts too; a file that cannot be read counts as no limit.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// A limit from this value on means "none" in version 1.
const UNLIMITED_BYTES_MIN: u64 = 1 << 60;

/// The bytes of memory that this process may use with the other processes of its group; `None`: no
/// limit is known.
pub fn memory_limit_bytes() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    memory_limit_in(&groups, Path::new("/sys/fs/cgroup"))
}

/// The limit of the groups in `groups` (the text of `/proc/self/cgroup`), below `mount`.
fn memory_limit_in(groups: &str, mount: &Path) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (id, controllers, group) = (parts.next()?, parts.next()?, parts.next()?);
        match controllers.split(',').any(|name| name == "memory") {
            true => lowest(&mount.join("memory"), group, "memory.limit_in_bytes"),
            false if id == "0" && controllers.is_empty() => lowest(mount, group, "memory.max"),
            false => None,
        }
    });
    limits.min()
}

/// The lowest limit of a group and of those above it. In a container the mount may be the group
/// itself, so the mount counts in any case.
fn lowest(mount: &Path, group: &str, file: &str) -> Option<u64> {
    let relative: PathBuf = Path::new(group)
        .components()
        .filter(|part| matches!(part, Component::Normal(_)))
        .collect();
    let groups = relative.ancestors().map(|group| mount.join(group));
    groups
        .filter_map(|group| {
            let text = fs::read_to_string(group.join(file)).ok()?;
            let limit = text.trim().parse::<u64>().ok()?;
            (limit < UNLIMITED_BYTES_MIN).then_some(limit)
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable;

    fn put(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        durable::create_dir_all(path.parent().unwrap()).unwrap();
        durable::replace(&path, text.as_bytes()).unwrap();
    }

    #[test]
    fn version_2_takes_the_lowest_limit_of_the_group_and_those_above() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(root, "a/memory.max", "300\n");
        put(root, "a/b/memory.max", "max\n");
        assert_eq!(memory_limit_in("0::/a/b\n", root), Some(300));
        put(root, "a/b/memory.max", "200\n");
        assert_eq!(memory_limit_in("0::/a/b\n", root), Some(200));
        assert_eq!(memory_limit_in("0::/other\n", root), None);
        // In a container, the group is the mount, whatever its path is outside.
        put(root, "memory.max", "100\n");
        assert_eq!(memory_limit_in("0::/../x/y\n", root), Some(100));
    }

    #[test]
    fn version_1_has_a_hierarchy_of_its_own_and_a_large_number_for_no_limit() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let file = "memory/s/memory.limit_in_bytes";
        put(
            root,
            "memory/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        put(root, file, "134217728\n");
        let groups = "3:cpu,cpuacct:/c\n2:memory:/s\n1:name=systemd:/s\n";
        assert_eq!(memory_limit_in(groups, root), Some(128 << 20));
        put(root, file, "9223372036854771712\n");
        assert_eq!(memory_limit_in(groups, root), None);
        assert_eq!(memory_limit_in("nonsense\n", root), None);
    }
}
