//! The error texts are what a person sees at three in the morning: they are written out here.

use super::*;

const SITE: &str = "role = \"site\"\nname = \"chengdu\"\ndata_dir = \"/var/lib/packhorse\"\n[hub]\naddress = \"hub:7443\"\n";
const HUB: &str = "role = \"hub\"\nname = \"central\"\ndata_dir = \"/var/lib/packhorse\"\n";

#[track_caller]
fn check(text: &str, expected: &str) {
    let fault = parse(text, "x.toml").unwrap_err();
    assert_eq!(fault.code, base::fault::Code::Config);
    assert_eq!(fault.message, expected);
}

#[test]
fn samples_parse_and_say_the_true_defaults() {
    for name in ["hub", "site"] {
        let text =
            std::fs::read_to_string(format!("{}/config/{name}.toml", env!("CARGO_MANIFEST_DIR")))
                .unwrap();
        parse(&text, name).unwrap();
        // Prose begins with "# "; a line "#key = value" or "#[table]" is a default that may be
        // uncommented.
        let uncommented: String = text
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => {
                    format!("{rest}\n")
                }
                _ => format!("{line}\n"),
            })
            .collect();
        let all = parse(&uncommented, name).unwrap();
        let minimal = parse(if name == "hub" { HUB } else { SITE }, name).unwrap();
        assert_eq!(format!("{:?}", all.listen), format!("{:?}", minimal.listen));
        assert_eq!(format!("{:?}", all.line), format!("{:?}", minimal.line));
        assert_eq!(format!("{:?}", all.limits), format!("{:?}", minimal.limits));
        assert_eq!(format!("{:?}", all.quota), format!("{:?}", minimal.quota));
        assert_eq!(all.share.check_every, minimal.share.check_every);
        assert_eq!(format!("{:?}", all.scrub), format!("{:?}", minimal.scrub));
        assert_eq!(all.files_root(), minimal.files_root());
        assert_eq!(
            format!("{:?}", all.labels_sink()),
            format!("{:?}", minimal.labels_sink())
        );
        assert_eq!(
            format!("{:?}", all.images_sink()),
            format!("{:?}", minimal.images_sink())
        );
    }
}

#[test]
fn unknown_keys_and_wrong_values_name_their_line() {
    check(
        "role = \"site\"\nname = \"a\"\ndata_dir = \"/d\"\ncolour = 1\n",
        "x.toml:4:1: unknown key `colour`, expected one of `role`, `name`, `data_dir`, `listen`, `hub`, `sink`, `share`, `scrub`, `relay`, `publish`, `registry`, `line`, `limits`, `quota`, `identity`, `log`, `train`",
    );
    check(
        "role = \"site\"\nname = \"a\"\n",
        "x.toml:1:1: missing key `data_dir`",
    );
    check(
        "role = \"boss\"\n",
        "x.toml:1:8: unknown variant `boss`, expected `hub` or `site`",
    );
    check(
        &format!("{HUB}[listen]\napi = \"here\"\n"),
        "x.toml:5:7: invalid socket address syntax",
    );
    check(
        &format!("{HUB}[listen]\nport = 1\n"),
        "x.toml:5:1: unknown key `port`, expected one of `api`, `api_without_tls`, `quic`",
    );
    check(
        &format!("{HUB}[limits]\nmemory = \"256\"\n"),
        "x.toml:5:10: \"256\" is not a size: write a whole number with a unit, for example 20MiB",
    );
    check(
        &format!("{HUB}[limits]\nmemory = \"1MiB\"\n"),
        "x.toml:5:1: limits.memory: it must be 32 MiB at least",
    );
    check(
        "role = \"hub\"\nname = \"Chengdu\"\ndata_dir = \"/d\"\n",
        "x.toml:2:8: site name \"Chengdu\" is not allowed: it must start with a lower-case letter or a digit",
    );
    check(
        "role = \"hub\"\nname = 'x'\ndata_dir = \"d\"\n",
        "x.toml:3:1: data_dir: \"d\" is not an absolute path",
    );
    let fault = parse("role = = 1\n", "x.toml").unwrap_err();
    assert!(fault.message.starts_with("x.toml:1:8: "), "{fault}");
}

#[test]
fn roles_have_their_own_tables() {
    parse(HUB, "x").unwrap();
    parse(SITE, "x").unwrap();
    check(
        "role = \"site\"\nname = \"a\"\ndata_dir = \"/d\"\n",
        "x.toml:1:1: role: a site needs [hub] with address = \"HOST:PORT\"",
    );
    check(
        &format!("{HUB}[hub]\naddress = \"h:1\"\n"),
        "x.toml:4:2: hub: only a site has it; a hub dials nobody",
    );
    check(
        &format!("{HUB}[sink.files]\nroot = \"/x\"\n"),
        "x.toml:4:2: sink: only a site has it; artifacts land at sites",
    );
    let public = "x.toml:7:1: listen.api: 0.0.0.0:7480: other machines could reach it, and the API has no TLS: use 127.0.0.1, or set \
                  api_without_tls = true";
    check(&format!("{SITE}[listen]\napi = \"0.0.0.0:7480\"\n"), public);
    for address in [
        "[::1]:1",
        "[::ffff:127.0.0.1]:1",
        "127.9.9.9:1",
        "10.0.0.1:1\"\napi_without_tls = true # \"",
    ] {
        let text = format!("{SITE}[listen]\napi = \"{address}\"\n");
        parse(&text, "x.toml").unwrap();
    }
    check(
        &format!("{SITE}[listen]\nquic = \"0.0.0.0:1\"\n"),
        "x.toml:7:1: listen.quic: only a hub has it; sites dial",
    );
    check(
        &format!("{HUB}[train]\nurl = \"http://t/\"\n"),
        "x.toml:4:2: train: only a site has it; sites train",
    );
    let train = |rest: &str| format!("{SITE}[train]\n{rest}\n");
    parse(
        &train("command = [\"/opt/trainer\", \"--run\"]\nat_once = 2"),
        "x",
    )
    .unwrap();
    parse(&train("url = \"https://platform/runs\""), "x").unwrap();
    check(
        &train("command = [\"trainer\"]"),
        "x.toml:7:1: train.command: \"trainer\" is not an absolute path",
    );
    check(
        &train("command = [\"/t\"]\nurl = \"http://t/\""),
        "x.toml:8:1: train.url: a command trains, or a platform: choose one",
    );
    check(
        &train("url = \"ftp://t/\""),
        "x.toml:7:1: train.url: write http://HOST/PATH or https://HOST/PATH",
    );
    check(
        &train("url = \"http://u:p@t/\""),
        "x.toml:7:1: train.url: it must not hold a user or a password",
    );
    check(
        &train("command = [\"/t\"]\nat_once = 0"),
        "x.toml:8:1: train.at_once: it must be 1 at least",
    );
    let allow = |list: &str| train(&format!("command = [\"/t\"]\nallow = {list}"));
    let allowed = |text: &str| parse(text, "x").unwrap().train.unwrap().allow;
    assert!(
        allowed(&train("command = [\"/t\"]")).is_empty(),
        "without a list no site may train here"
    );
    assert_eq!(allowed(&allow("[\"a\", \"all\"]")), ["a", "all"]);
    let notes = |text: &str| parse(text, "x").unwrap().notes();
    assert!(
        notes(&allow("[]"))[0].contains("[train] allow is empty")
            && notes(&allow("[\"b\"]")).is_empty()
            && notes(SITE).is_empty()
    );
    let line = |role: &str| notes(&format!("{role}[line]\ntransport = \"tcp\"\n"));
    assert!(
        line(HUB)[0].contains("[line] transport has no effect at a hub") && line(SITE).is_empty()
    );
    check(
        &allow("[\"region=west\"]"),
        "x.toml:8:1: train.allow: write the names of sites, or \"all\": labels are assigned at the hub",
    );
    check(
        &SITE.replace("hub:7443", "hub"),
        "x.toml:5:1: hub.address: the hub's address \"hub\" is not HOST:PORT",
    );
}

#[test]
fn the_default_memory_fits_the_control_group() {
    let mib = |limit: Option<u64>| default_memory(limit.map(|limit| limit << 20)) >> 20;
    assert_eq!(mib(None), 256);
    assert_eq!(mib(Some(64 << 10)), 256);
    assert_eq!(mib(Some(512)), 128);
    assert_eq!(mib(Some(128)), 32);
    assert_eq!(mib(Some(16)), 32, "the least that a daemon works with");
}

#[test]
fn a_site_has_several_hub_addresses_and_a_proxy() {
    let hub = |rest: &str| SITE.replace("address = \"hub:7443\"", rest);
    let address = |text: &str| parse(&hub(text), "x").unwrap().hub.unwrap().address;
    assert_eq!(address("address = [\"a:1\", \"[::1]:2\"]"), "a:1,[::1]:2");
    check(
        &hub("address = [\"a:1\", \"b\"]"),
        "x.toml:5:1: hub.address: the hub's address \"b\" is not HOST:PORT",
    );
    check(
        &hub("address = 7"),
        "x.toml:5:11: expected \"HOST:PORT\" or a list of them",
    );
    let proxy = |rest: &str| format!("{SITE}{rest}\n");
    let line = |rest: &str| parse(&proxy(rest), "x").unwrap().line.proxy;
    let used = line("proxy = \"socks5://u@p:1\"\nproxy_password_file = \"/s\"");
    assert_eq!(used.of_hub("hub:7443").unwrap().to_string(), "socks5://p:1");
    assert_eq!(line("proxy = \"none\"").of_hub("hub:7443"), None);
    for (rest, why) in [
        (
            "proxy = \"http://u:secret@p:1\"",
            "x.toml:6:1: hub.proxy: a password does not belong in the URL; use hub.proxy_password_file",
        ),
        (
            "proxy = \"p:1\"",
            "x.toml:6:1: hub.proxy: the proxy is not http://HOST:PORT or socks5://HOST:PORT",
        ),
        (
            "proxy = \"http://p:1\"\nproxy_password_file = \"/s\"",
            "x.toml:7:1: hub.proxy_password_file: it needs a user name in hub.proxy: http://USER@HOST:PORT",
        ),
        (
            "proxy_password_file = \"/s\"",
            "x.toml:6:1: hub.proxy_password_file: it needs hub.proxy",
        ),
    ] {
        check(&proxy(rest), why);
    }
}

#[test]
fn hub_and_site_say_alike_who_may_have_what_is_published() {
    for role in [HUB, SITE] {
        let share = |list: &str| format!("{role}[share]\nallow = {list}\n");
        let allow = |text: &str| parse(text, "x").unwrap().share.allow;
        assert_eq!(allow(role), None);
        assert_eq!(allow(&share("[]")), Some(vec![]), "nobody is not everybody");
        assert_eq!(
            allow(&share("[\"suzhou\", \"line=3\"]")),
            Some(vec!["suzhou".into(), "line=3".into()])
        );
        let line = role.lines().count() + 2;
        check(
            &share("[\"suzhou\", \"Wuhan\"]"),
            &format!(
                "x.toml:{line}:1: share.allow: site name \"Wuhan\" is not allowed: it must start with a lower-case letter or a digit"
            ),
        );
    }
}

#[test]
fn a_site_says_how_often_it_reads_delivered_files_again() {
    let scrub = |text: &str| parse(&format!("{SITE}{text}"), "x").unwrap().scrub;
    let (default, none) = (
        scrub(""),
        scrub("[scrub]\nevery = \"0s\"\nrate = \"0MiB\"\n"),
    );
    assert_eq!(default.every, Duration::from_secs(7 * 24 * 3600));
    assert_eq!(default.rate, 16 << 20);
    assert_eq!((none.every, none.rate), (Duration::ZERO, 0));
    assert_eq!(scrub("[scrub]\nrate = \"1MiB\"\n").rate, 1 << 20);
    check(
        &format!("{HUB}[scrub]\nevery = \"1d\"\n"),
        "x.toml:4:2: scrub: only a site has it; a hub verifies its store by 'packhorse verify'",
    );
}

#[test]
fn a_site_says_how_often_it_looks_at_what_it_published() {
    let share = |role: &str, every: &str| format!("{role}[share]\ncheck_every = \"{every}\"\n");
    let every = |text: &str| parse(text, "x").unwrap().share.check_every;
    assert_eq!(every(SITE), Duration::from_secs(300));
    assert_eq!(every(&share(SITE, "1s")), Duration::from_secs(1));
    check(
        &share(SITE, "999ms"),
        "x.toml:7:1: share.check_every: it must be 1s at least",
    );
    check(
        &share(SITE, "5"),
        "x.toml:7:15: \"5\" is not a duration: write a whole number with a unit (ms, s, m, h, d), for example 30s",
    );
    check(
        &share(HUB, "5m"),
        "x.toml:5:1: share.check_every: only a site has it; sites publish in place",
    );
}

#[test]
fn secrets_come_by_file_only() {
    let labels = |url: &str| format!("{SITE}[sink.labels]\nurl = \"{url}\"\n");
    let images = |rest: &str| format!("{SITE}[sink.images]\n{rest}\n");
    parse(&labels("postgres://packhorse@db/labels"), "x").unwrap();
    check(
        &labels("postgres://packhorse:secret@db/labels"),
        "x.toml:7:1: sink.labels.url: a password does not belong in the URL; use sink.labels.password_file",
    );
    check(
        &labels("mysql://db"),
        "x.toml:7:1: sink.labels.url: write postgres://USER@HOST/DATABASE or sqlite:///PATH",
    );
    check(
        &images("url = \"https://robot:x@harbor/operators\""),
        "x.toml:7:1: sink.images.url: credentials do not belong in the URL; use sink.images.username and password_file",
    );
    check(
        &images("url = \"https://harbor/operators\"\nusername = \"r\""),
        "x.toml:8:1: sink.images.username: it needs sink.images.password_file",
    );
    check(
        &images("url = \"oci-layout:/i\"\nusername = \"r\""),
        "x.toml:8:1: sink.images.username: only a registry has it; this is an OCI layout folder",
    );
}

#[test]
fn registries_to_publish_from_are_named_by_host() {
    for role in [HUB, SITE] {
        let registry = |host: &str, rest: &str| format!("{role}[registry.\"{host}\"]\n{rest}\n");
        let line = role.lines().count() + 1;
        let good = parse(
            &registry(
                "h:5000",
                "username = \"u\"\npassword_file = \"/s\"\nrealm_hosts = [\"t:1\"]\ninsecure = true",
            ),
            "x",
        )
        .unwrap();
        assert_eq!(good.registry["h:5000"].realm_hosts, ["t:1"]);
        assert_eq!(good.secret_files().collect::<Vec<_>>(), [Path::new("/s")]);
        let wrong = |text: String, why: &str| {
            let fault = parse(&text, "x.toml").unwrap_err();
            assert!(
                fault
                    .message
                    .starts_with(&format!("x.toml:{line}:2: registry"))
                    && fault.message.contains(why),
                "{fault}"
            );
        };
        wrong(registry("https://h", ""), "is not HOST or HOST:PORT");
        wrong(registry("h", "username = \"u\""), "it needs password_file");
        wrong(
            registry("h", "username = \"u\"\npassword_file = \"s\""),
            "is not an absolute path",
        );
        wrong(
            registry("h", "realm_hosts = [\"https://t\"]"),
            "is not HOST or HOST:PORT",
        );
    }
}

#[test]
fn surroundings_are_checked_by_load_only() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("site.toml");
    let secret = dir.path().join("secret");
    let text = format!(
        "role = \"site\"\nname = \"a\"\ndata_dir = \"{0}/data\"\n[hub]\naddress = \"h:1\"\n[sink.labels]\nurl = \"postgres://u@db/x\"\npassword_file = \"{1}\"\n",
        dir.path().display(),
        secret.display()
    );
    durable::replace(&file, text.as_bytes()).unwrap();
    read(&file).unwrap();
    let fault = load(&file).unwrap_err();
    assert_eq!(fault.code, base::fault::Code::Config);
    assert!(
        fault.message.contains("sink.labels.password_file")
            && fault.message.contains(secret.to_str().unwrap()),
        "{fault}"
    );
    durable::replace(&secret, b"\n").unwrap();
    assert!(load(&file).unwrap_err().message.contains("is empty"));
    durable::replace(&secret, b"pass word\r\n").unwrap();
    load(&file).unwrap();
    assert_eq!(read_secret(&secret).unwrap(), "pass word");
    assert!(
        load(&dir.path().join("none"))
            .unwrap_err()
            .message
            .contains("cannot read the configuration")
    );
}

#[test]
fn network_filesystems_are_known() {
    assert_eq!(network_filesystem(0x6969), Some("nfs"));
    // Some targets have a signed 32-bit f_type.
    assert_eq!(network_filesystem(0xffff_ffff_ff53_4d42), Some("cifs"));
    assert_eq!(network_filesystem(0xef53), None);
    refuse_network_filesystem(Path::new("/tmp/does/not/exist")).unwrap();
}

#[test]
fn sizes_and_durations_need_units() {
    assert_eq!(parse_size("20MiB"), Ok(20 << 20));
    assert_eq!(parse_size("4 GB"), Ok(4_000_000_000));
    for bad in ["20", "", "MiB", "-1MiB", "1.5GiB", "99999999999TiB"] {
        assert!(parse_size(bad).is_err(), "{bad:?}");
    }
    assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
    assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
    assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
    for bad in ["5", "h", "1w", "-1s", "99999999999999999d"] {
        assert!(parse_duration(bad).is_err(), "{bad:?}");
    }
}
