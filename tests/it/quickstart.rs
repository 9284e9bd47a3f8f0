//! The newcomer's first command.

use crate::support::command::{bound, run};
use crate::support::daemon::PACKHORSE;
use crate::support::{Scratch, limit, secs};

#[test]
fn quickstart_shows_every_kind_arrive_and_ends() {
    let _limit = limit(secs(240));
    let scratch = Scratch::new();
    let dir = scratch.join("quickstart");
    let quickstart = || {
        // Nothing but the program: an empty environment, no home.
        let mut command = bound("/usr/bin/env");
        command.args(["-i", PACKHORSE, "quickstart", "--once", "--dir", dir.to_str().unwrap()]).current_dir("/");
        run(&mut command, secs(200)).expect(0)
    };
    let output = quickstart();
    let said = format!("{}\n{}", output.out, output.err);
    for word in ["dataset/", "labels/", "operator/", "image/", "model/", ":v1", ":v2"] {
        assert!(said.contains(word), "{word:?} is not in what quickstart said:\n{said}");
    }
    assert!(!output.out.contains('\u{1b}'), "no colours where there is no terminal");

    // Re-running is safe.
    quickstart();
}
