//! Invalid configurations: exit code 3, with the line or the key.

use std::os::unix::fs::PermissionsExt;

use crate::support::command::{Output, bound, bound_as, run};
use crate::support::daemon::{Hub, PACKHORSE, packhorse};
use crate::support::{Scratch, is_root, limit, secs, tool_user};

/// The error of `config check` and `serve` for a configuration. Both must report the same.
#[track_caller]
fn refused(scratch: &Scratch, text: &str) -> Output {
    let file = scratch.join("bad.toml");
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let checked = packhorse(&["config", "check", "--config", file]).expect(3);
    let served = packhorse(&["serve", "--config", file]).expect(3);
    assert_eq!(served.out, "");
    assert!(
        checked.err.contains("bad.toml"),
        "it names the file: {}",
        checked.err
    );
    served
}

#[test]
fn unknown_keys_missing_secrets_and_wrong_values() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let head = format!(
        "role = \"site\"\nname = \"chengdu\"\ndata_dir = \"{}\"\n[hub]\naddress = \"127.0.0.1:1\"\n",
        scratch.join("d").display()
    );

    refused(&scratch, &format!("{head}[sink.files]\nrot = \"/mnt\"\n")).says(&["rot", ":7"]);
    refused(&scratch, &format!("surprise = 1\n{head}")).says(&["surprise", ":1"]);
    let secret = scratch.join("no-such-secret");
    let labels = format!(
        "[sink.labels]\nurl = \"postgres://p@127.0.0.1:1/labels\"\npassword_file = \"{}\"\n",
        secret.display()
    );
    refused(&scratch, &format!("{head}{labels}")).says(&["no-such-secret", "password_file"]);
    std::fs::write(&secret, "\n").unwrap();
    refused(&scratch, &format!("{head}{labels}")).says(&["no-such-secret", "empty"]);
    refused(&scratch, &format!("{head}[limits]\nmemory = \"256\"\n")).says(&["256", "unit"]);
    refused(&scratch, &head.replace("chengdu", "Chengdu!")).says(&["Chengdu!"]);
    refused(&scratch, &head.replace("\"site\"", "\"boss\"")).says(&["boss"]);
    refused(
        &scratch,
        "role = \"site\"\nname = \"chengdu\"\ndata_dir = \"/x\"\n",
    )
    .says(&["hub"]);
    refused(&scratch, "role = \"hub\"\nname = ").says(&[":2"]);
    let public = format!("{head}[listen]\napi = \"0.0.0.0:1\"\n");
    refused(&scratch, &public).says(&["0.0.0.0:1", "TLS", "api_without_tls", ":7"]);
    let file = scratch.join("public.toml");
    std::fs::write(&file, format!("{public}api_without_tls = true\n")).unwrap();
    let checked = packhorse(&["config", "check", "--config", file.to_str().unwrap()]).expect(0);
    assert!(
        checked.out.contains("warning") && checked.out.contains("without TLS"),
        "{}",
        checked.out
    );
    packhorse(&["serve", "--config", "/no/such/config.toml"])
        .expect(3)
        .says(&["/no/such/config.toml"]);
    assert!(
        !scratch.join("d").exists(),
        "a refused configuration creates no folder"
    );
}

#[test]
fn a_valid_configuration_passes() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::new(scratch.path());
    hub.cli(&["config", "check"]).expect(0);
    assert!(!hub.data_dir.exists(), "a check creates nothing");
}

#[test]
fn the_check_reports_a_nas_that_is_not_mounted() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let file = scratch.join("site.toml");
    let text = format!(
        "role = \"site\"\nname = \"chengdu\"\ndata_dir = \"{}\"\n[hub]\naddress = \"hub:7443\"\n[sink.files]\nroot = \"/no/such/nas\"\n",
        scratch.join("d").display()
    );
    std::fs::write(&file, text).unwrap();
    packhorse(&["config", "check", "--config", file.to_str().unwrap()])
        .expect(3)
        .says(&["/no/such/nas", "mount"]);
}

#[test]
fn the_check_reports_missing_requirements_of_a_site() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let (file, nas, trainer) = (
        scratch.join("site.toml"),
        scratch.folder("nas"),
        scratch.join("train.sh"),
    );
    let text = format!(
        "role = \"site\"\nname = \"chengdu\"\ndata_dir = \"{}\"\n[hub]\naddress = \"hub:7443\"\n[sink.files]\nroot = \"{}\"\n\
         [train]\ncommand = [\"{}\", \"--run\"]\n",
        scratch.join("d").display(),
        nas.display(),
        trainer.display()
    );
    std::fs::write(&file, text).unwrap();
    let check = || packhorse(&["config", "check", "--config", file.to_str().unwrap()]);
    check().expect(3).says(&["train.sh", "[train] command"]);
    std::fs::write(&trainer, "#!/bin/sh\n").unwrap();
    check().expect(3).says(&["train.sh", "permission denied"]);
    std::fs::set_permissions(&trainer, std::fs::Permissions::from_mode(0o755)).unwrap();
    check().expect(0);

    assert!(
        check().out.contains("[train] allow is empty"),
        "no site may train there, and the check reports it"
    );

    // A NAS to which the user who runs the check may not write. Root may always write, so another
    // user runs the check.
    std::fs::set_permissions(&nas, std::fs::Permissions::from_mode(0o555)).unwrap();
    let mut command = if is_root() {
        let (user, group) = tool_user("nobody");
        // The program is a copy that this user can execute.
        let copy = scratch.join("packhorse-copy");
        std::fs::copy(PACKHORSE, &copy).unwrap();
        bound_as(user, group, &copy)
    } else {
        bound(PACKHORSE)
    };
    command.args(["config", "check", "--config"]).arg(&file);
    run(&mut command, secs(30))
        .expect(3)
        .says(&[nas.to_str().unwrap(), "is not writable"]);
}

#[test]
fn usage_errors_are_exit_code_two() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    packhorse(&["no-such-command"]).expect(2);
    packhorse(&["serve", "--no-such-flag"]).expect(2);
    hub.cli(&["publish", "/tmp", "--as", "dataset/Upper:v1"])
        .expect(2)
        .says(&["Upper"]);
    hub.cli(&["publish", "/tmp", "--as", "surprise/x:v1"])
        .expect(2)
        .says(&["surprise"]);
    hub.cli(&["show", "dataset/x"]).expect(2);
    hub.cli(&["token", "create", "--site", "all"]).expect(2);
    hub.cli(&["token", "create", "--site", "a", "--label", "no value"])
        .expect(2);
    hub.cli(&["token", "create", "--site", "a", "--ttl", "24"])
        .expect(2);
}

#[test]
fn a_second_daemon_on_the_same_folder_is_refused() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    // Other ports, the same data directory.
    let text = std::fs::read_to_string(&hub.config).unwrap();
    let port = |n: u16| format!("127.0.0.1:{n}");
    let second = text
        .replace(&hub.api.to_string(), &port(crate::support::free_port()))
        .replace(&hub.quic.to_string(), &port(crate::support::free_port()));
    let file = scratch.join("second.toml");
    std::fs::write(&file, second).unwrap();
    packhorse(&["serve", "--config", file.to_str().unwrap()])
        .expect(6)
        .says(&[hub.data_dir.to_str().unwrap()]);
    assert!(hub.is_running(), "the first daemon continues");
    hub.cli(&["artifacts"]).expect(0);
    // The lock must end with a killed daemon, so that no operator has to remove it.
    hub.kill();
    hub.start();
}

#[test]
fn a_port_in_use_is_named() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::new(scratch.path());
    let _taken = std::net::TcpListener::bind(hub.api).unwrap();
    let output = packhorse(&["serve", "--config", hub.config.to_str().unwrap()]);
    assert!(
        output.code != 0 && output.err.contains(&hub.api.port().to_string()),
        "{output:?}"
    );
}
