//! The command line with an in-memory daemon: exit codes, requests, and printed text.

use std::sync::Arc;

use clap::Parser;
use clap::error::ErrorKind;
use serde_json::json;

use super::args::Args;
use super::tracker::{Tracker, notice};
use super::{dispatch, render_error, status};
use crate::api::ApiToken;
use crate::api::fake::{Fake, TOKEN, job, offline, transfer};
use crate::api::types::*;
use crate::cli::args::Output;
use crate::log_filter::{CRATES, expanded};
use base::fault::{Code, Fault, Reason};

struct Daemon {
    fake: Arc<Fake>,
    base: String,
    dir: tempfile::TempDir,
    _stop: tokio::sync::oneshot::Sender<()>,
}

async fn daemon() -> Daemon {
    let fake = Arc::new(Fake::default());
    let (base, stop, _) = fake.serve().await;
    let dir = tempfile::tempdir().unwrap();
    base::durable::replace(&dir.path().join("token"), TOKEN.as_bytes()).unwrap();
    Daemon {
        fake,
        base,
        dir,
        _stop: stop,
    }
}

impl Daemon {
    /// Runs a command and returns how it ended.
    async fn run(&self, line: &str) -> Result<(), Fault> {
        let token = self.dir.path().join("token");
        let words = line.split_whitespace().map(str::to_owned);
        let to = [
            "--api".to_owned(),
            self.base.clone(),
            "--token-file".to_owned(),
            token.to_str().unwrap().to_owned(),
        ];
        let args =
            Args::try_parse_from(["packhorse".to_owned()].into_iter().chain(words).chain(to))
                .unwrap();
        dispatch(args).await
    }
    async fn code(&self, line: &str) -> Code {
        self.run(line).await.unwrap_err().code
    }
}

fn failed(id: &str, site: &str, reason: Reason, message: &str) -> Transfer {
    Transfer {
        reason: Some(reason),
        message: Some(message.into()),
        next: Some("make room".into()),
        ..transfer(id, site, State::Failed)
    }
}

#[test]
fn every_command_of_the_manual_parses() {
    let lines = [
        "quickstart --dir /tmp/x --once",
        "serve --config f",
        "token create --site a --label region=west --label line=3 --ttl 24h",
        "join --config f --hub h:7443 --token t",
        "publish /data --as dataset/x:1 --to all --wait --timeout 30s",
        "publish l.csv --as labels/x:1 --for dataset/x:1 --allow-missing --strict --format csv --column sample_path=image class=defect",
        "publish /data --as dataset/x:1 --strict --accept-omitted times,hard_links --accept-omitted xattrs",
        "publish registry://h/r:t --as image/x:1 --username u --password-file p",
        "publish registry://h/r:t --as image/x:1 --hub h:1 --ca-file c --realm-host t:1 --insecure",
        "publish /i.tar --as image/x:1 --repository ops/team/x --tag V1 --platform linux/amd64,linux/arm64 --compress",
        "publish --list images.txt --to all --wait --platform linux/amd64",
        "publish /data/images.tar --all --to all --compress",
        "deliver dataset/x:1 model/y:2 --to region=west,line!=3 --wait",
        "status",
        "status t1 --watch --since 5 -o ndjson",
        "artifacts",
        "show dataset/x:1",
        "sites -o json",
        "pause t",
        "resume t",
        "cancel t",
        "cancel j-1",
        "jobs",
        "retry t",
        "publish out --as model/m:1 --run r",
        "train start --name r --from a --on b --input dataset/x:1 labels/x:1 --input image/y:1 --expect model/m --ttl 7d --wait",
        "train list -o json",
        "train show r",
        "train finish r --failed why",
        "train cancel r",
        "trainer --exec -- /opt/train --run x",
        "plan dataset/x:1 --to all",
        "verify dataset/x:1 --repair",
        "export dataset/x:1 --out f",
        "import f",
        "gc",
        "doctor",
        "config check --config f",
        "completions zsh",
        "man /tmp/man1",
    ];
    for line in lines {
        let parsed = Args::try_parse_from(std::iter::once("packhorse").chain(line.split(' ')));
        assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
    }
    for (line, kind) in [
        ("deliver --to all", ErrorKind::MissingRequiredArgument),
        ("token create --site a --ttl 24", ErrorKind::ValueValidation),
        ("sites -o xml", ErrorKind::InvalidValue),
        ("sties", ErrorKind::InvalidSubcommand),
        (
            "join --config f --hub h --token t",
            ErrorKind::ValueValidation,
        ),
        (
            "publish /data --as dataset/x:1 --hub h",
            ErrorKind::ValueValidation,
        ),
        (
            "publish /data --as dataset/x:1 --strict --accept-omitted times,dreams",
            ErrorKind::ValueValidation,
        ),
    ] {
        let error =
            Args::try_parse_from(std::iter::once("packhorse").chain(line.split(' '))).unwrap_err();
        assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{line}");
    }
}

#[tokio::test]
async fn the_daemon_is_found_or_the_fault_has_a_next_step() {
    let d = daemon().await;
    d.run("sites").await.unwrap();
    let run = |line: String| async move {
        dispatch(Args::try_parse_from(line.split(' ')).unwrap())
            .await
            .unwrap_err()
    };
    let nowhere = run("packhorse sites".into()).await;
    assert_eq!(
        (nowhere.code, nowhere.message.as_str()),
        (Code::Usage, "no daemon is specified")
    );
    let dir = d.dir.path().display();
    let away = run(format!(
        "packhorse sites --api http://127.0.0.1:1 --token-file {dir}/token"
    ))
    .await;
    assert_eq!(away.code, Code::Unreachable);
    assert!(away.next.contains("packhorse serve"), "{away:?}");
    base::durable::replace(&d.dir.path().join("wrong"), "f".repeat(64).as_bytes()).unwrap();
    let wrong = run(format!(
        "packhorse sites --api {} --token-file {dir}/wrong",
        d.base
    ))
    .await;
    assert!(
        wrong.code == Code::NotAllowed && wrong.message.starts_with("the API token is wrong"),
        "{wrong}"
    );
    // By configuration: the address and the token beside the state.
    let config = format!(
        "role = \"hub\"\nname = \"h\"\ndata_dir = \"{dir}/data\"\n[listen]\napi = \"{}\"\n",
        &d.base[7..]
    );
    base::durable::replace(&d.dir.path().join("hub.toml"), config.as_bytes()).unwrap();
    let by_config = format!("packhorse sites --config {dir}/hub.toml");
    assert_eq!(run(by_config.clone()).await.code, Code::Unreachable);
    std::fs::create_dir(d.dir.path().join("data")).unwrap();
    base::durable::replace(
        &ApiToken::path(&d.dir.path().join("data")),
        TOKEN.as_bytes(),
    )
    .unwrap();
    dispatch(Args::try_parse_from(by_config.split(' ')).unwrap())
        .await
        .unwrap();
}

#[tokio::test]
async fn publish_sends_its_options_and_waits_for_the_end() {
    let d = daemon().await;
    let published = json!({"artifact": "labels/x:1", "digest": "ab", "transfers": ["t1"], "bytes": 10, "stored": 5, "unchanged": false});
    d.fake.put_job(job("publish", Ok(published)));
    d.fake.put(transfer("t1", "chengdu", State::Transferring));
    let asked = d.fake.asked(2);
    let finish = async {
        asked.await;
        d.fake.put(transfer("t1", "chengdu", State::Done));
    };
    let line = "publish l.csv --as labels/x:1 --to all --wait --for dataset/x:1 --column sample_path=image class=defect -o json";
    let (end, ()) = tokio::join!(d.run(line), finish);
    end.unwrap();
    let world = d.fake.world.lock();
    let sent = &world.published[0];
    assert!(
        sent.source.starts_with('/') && sent.source.ends_with("/l.csv"),
        "{}",
        sent.source
    );
    assert_eq!(
        (sent.to.as_deref(), sent.options.for_dataset.as_deref()),
        (Some("all"), Some("dataset/x:1"))
    );
    assert_eq!(sent.options.columns["class"], "defect");
}

#[tokio::test]
async fn a_wait_ends_with_the_documented_exit_codes() {
    let d = daemon().await;
    assert_eq!(d.code("status t9").await, Code::NotFound);
    assert_eq!(d.code("pause t9").await, Code::NotFound);
    d.fake
        .put(failed("t1", "chengdu", Reason::NoSpace, "the disk is full"));
    let only = d
        .run("deliver dataset/line3:v1 --to all --wait")
        .await
        .unwrap_err();
    assert_eq!(
        (only.code, only.next.as_str()),
        (Code::NoSpace, "make room")
    );
    assert_eq!(
        only.message,
        "dataset/line3:v1 did not arrive at chengdu: the disk is full"
    );
    d.run("deliver dataset/line3:v1 --to all").await.unwrap();
    d.fake.put(transfer("t2", "xian", State::Done));
    let some = d
        .run("deliver dataset/line3:v1 --to all --wait")
        .await
        .unwrap_err();
    assert_eq!(some.code, Code::Partial);
    assert_eq!(
        some.message,
        "1 of 2 transfers did not arrive: dataset/line3:v1 at chengdu (no_space)"
    );
    d.fake.put(offline("t1", "chengdu"));
    let late = d
        .run("deliver dataset/line3:v1 --to all --wait --timeout 1s")
        .await
        .unwrap_err();
    assert_eq!(late.code, Code::Deadline);
    assert!(
        late.message.contains("waiting: chengdu (site_offline)"),
        "{late}"
    );
    let asked = d.fake.asked(2);
    tokio::select! {
        code = d.code("status t1 --watch --since 0") => unreachable!("it did not wait: {code:?}"),
        () = asked => {}
    }
    d.fake.put(transfer("t1", "chengdu", State::Done));
    d.run("deliver dataset/line3:v1 --to all --wait")
        .await
        .unwrap();
    d.run("status t1 --watch").await.unwrap();
    d.run("status --since 0 -o ndjson").await.unwrap();
}

#[tokio::test]
async fn a_transfer_whose_dependency_failed_is_not_waited_for() {
    let d = daemon().await;
    let over = || {
        let transfers = d.fake.world.lock().transfers.clone();
        let mut tracker = Tracker::new(&transfers.iter().map(|t| t.id.clone()).collect::<Vec<_>>());
        for transfer in transfers {
            let _ = tracker.absorb(transfer);
        }
        tracker.open().is_empty()
    };
    d.fake.put(Transfer {
        artifact: "labels/line3:v1".parse().unwrap(),
        reason: Some(Reason::WaitingForDependency),
        message: Some("dataset/line3:v1 must be here first".into()),
        waits_for: Some("t2".into()),
        ..transfer("t1", "chengdu", State::Queued)
    });
    d.fake
        .put(failed("t3", "chengdu", Reason::NoSpace, "the disk is full"));
    // The other transfer progresses, is done, or is cancelled: in all three cases this one
    // continues without user action.
    for state in [State::Transferring, State::Done, State::Cancelled] {
        d.fake.put(transfer("t2", "chengdu", state));
        assert!(!over(), "{state:?}");
    }
    d.fake
        .put(failed("t2", "xian", Reason::Integrity, "a.png changed"));
    assert!(!over(), "it waits for nothing at another site");
    d.fake
        .put(failed("t2", "chengdu", Reason::Integrity, "a.png changed"));
    let waited = d
        .run("deliver dataset/line3:v1 labels/line3:v1 --to all --wait")
        .await
        .unwrap_err();
    let watched = d.run("status d1 --watch").await.unwrap_err();
    assert_eq!((waited.code, &waited), (Code::Partial, &watched));
    insta::assert_snapshot!(format!("{waited}\n{}", waited.next), @r"
    3 of 3 transfers did not arrive: dataset/line3:v1 at chengdu (integrity), dataset/line3:v1 at chengdu (no_space), labels/line3:v1 at chengdu (waits for dataset/line3:v1)
    see 'packhorse status TRANSFER', fix the cause, then run 'packhorse retry TRANSFER'; transfers that wait for it then continue
    ");
}

#[tokio::test]
async fn an_earlier_failure_of_a_dependency_ends_the_wait_too() {
    let d = daemon().await;
    let published = json!({"artifact": "labels/x:1", "digest": "ab", "transfers": ["t1"], "bytes": 10, "stored": 5, "unchanged": false});
    d.fake.put_job(job("publish", Ok(published)));
    let waiting = Transfer {
        artifact: "labels/line3:v1".parse().unwrap(),
        reason: Some(Reason::WaitingForDependency),
        waits_for: Some("t2".into()),
        ..transfer("t1", "chengdu", State::Queued)
    };
    d.fake.put(waiting.clone());
    let line = "publish l.csv --as labels/x:1 --to all --wait --timeout 1s";
    // The daemon does not know the other transfer; then it does, and the transfer progresses. The
    // command waits in both cases.
    let late = d.run(line).await.unwrap_err();
    assert!(
        late.message
            .ends_with("waiting: chengdu (waiting_for_dependency)"),
        "{late}"
    );
    d.fake.put(transfer("t2", "chengdu", State::Transferring));
    let late = d.run(line).await.unwrap_err();
    assert_eq!(late.code, Code::Deadline);
    assert!(
        late.message
            .ends_with("waiting: chengdu (waiting_for_dependency: dataset/line3:v1)"),
        "{late}"
    );
    d.fake
        .put(failed("t2", "chengdu", Reason::NoSpace, "the disk is full"));
    let ended = d.run(line).await.unwrap_err();
    assert_eq!(ended.code, Code::Partial);
    insta::assert_snapshot!(format!("{ended}\n{}", ended.next), @r"
    labels/line3:v1 did not arrive at chengdu: it waits for dataset/line3:v1, which failed (no_space): the disk is full
    fix the cause, then run 'packhorse retry t2'; labels/line3:v1 then continues
    ");

    let mut tracker = Tracker::new(&["t1".into(), "t3".into()]);
    for seen in [waiting, transfer("t3", "xian", State::Done)] {
        let _ = tracker.absorb(seen);
    }
    assert_eq!(
        (tracker.unknown_firsts(), tracker.open()),
        (vec!["t2".to_owned()], vec!["t1".to_owned()])
    );
    tracker.set_firsts(vec![failed(
        "t2",
        "chengdu",
        Reason::NoSpace,
        "the disk is full",
    )]);
    assert_eq!(tracker.open(), Vec::<String>::new());
    let some = tracker.verdict().unwrap_err();
    let said = "1 of 2 transfers did not arrive: labels/line3:v1 at chengdu (waits for dataset/line3:v1, which failed: t2)";
    assert_eq!((some.code, some.message.as_str()), (Code::Partial, said));
}

#[tokio::test]
async fn a_wait_continues_after_a_restart_of_the_daemon() {
    let d = daemon().await;
    let fake = Arc::clone(&d.fake);
    let (base, stop, task) = fake.serve().await;
    let d = Daemon { base, ..d };
    fake.put(transfer("t1", "chengdu", State::Transferring));
    let asked = fake.asked(1);
    let restart = async {
        asked.await;
        stop.send(()).unwrap();
        task.await.unwrap().unwrap();
        let listener = tokio::net::TcpSocket::new_v4().unwrap();
        listener.set_reuseaddr(true).unwrap();
        listener.bind(d.base[7..].parse().unwrap()).unwrap();
        let listener = listener.listen(16).unwrap();
        // The next request gets no answer; only the one after that reaches the new daemon.
        drop(listener.accept().await.unwrap());
        fake.put(transfer("t1", "chengdu", State::Done));
        fake.serve_on(listener)
    };
    let (end, _again) = tokio::join!(d.run("deliver dataset/line3:v1 --to all --wait"), restart);
    end.unwrap();
}

#[tokio::test]
async fn jobs_end_with_their_fault() {
    let d = daemon().await;
    d.fake.put_job(job("verify", Ok(json!([]))));
    d.run("verify dataset/line3:v1").await.unwrap();
    d.fake
        .put_job(job("verify", Ok(json!(["a.png: the hash differs"]))));
    assert_eq!(d.code("verify dataset/line3:v1").await, Code::Integrity);
    let notes = vec!["/nas holds additional entries (1): Thumbs.db".to_owned()];
    d.fake.put_job(Job {
        notes,
        ..job("verify", Ok(json!([])))
    });
    d.run("verify dataset/line3:v1").await.unwrap();
    d.fake.put_job(job("gc", Ok(json!({"freed_bytes": 4096}))));
    d.run("gc").await.unwrap();
    d.fake.put_job(job(
        "export",
        Err(Fault::no_space("the disk of /x is full")),
    ));
    assert_eq!(
        d.code("export dataset/line3:v1 --out x").await,
        Code::NoSpace
    );
    assert_eq!(d.code("import x").await, Code::NotFound);
    d.fake.world.lock().doctor = vec!["ok data_dir".into(), "fault sink.images: refused".into()];
    assert_eq!(d.code("doctor").await, Code::Internal);
    d.run("token create --site chengdu --ttl 2h").await.unwrap();
    d.run("plan dataset/line3:v1 --to all").await.unwrap();
    d.run("show dataset/line3:v1").await.unwrap();
    assert_eq!(d.code("show dataset/none:v1").await, Code::NotFound);
}

#[test]
fn the_log_filter_means_all_crates_of_the_program() {
    let crates = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/crates")).unwrap();
    let names: std::collections::BTreeSet<String> = crates
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(
        names,
        CRATES[1..].iter().map(|name| (*name).to_owned()).collect()
    );
    let all = expanded("warn,packhorse=info");
    assert!(
        all.starts_with("warn,packhorse=info,base=info,")
            && all.ends_with(",transport=info,span=info"),
        "{all}"
    );
    assert_eq!(
        expanded("packhorse::hub=debug,packhorses=info,info"),
        "packhorse::hub=debug,packhorses=info,info,span=info"
    );
}

#[test]
fn the_status_table() {
    let mut moving = transfer("t1", "chengdu", State::Transferring);
    moving.bytes = Bytes {
        total: 3 << 30,
        reused: 1 << 30,
        received: 345 << 20,
        committed: 1369 << 20,
        ..Bytes::default()
    };
    (moving.rate, moving.eta_seconds) = (12 << 20, Some(142));
    let mut done = transfer("t2", "xian", State::Done);
    done.bytes.committed = 1000;
    let stuck = failed(
        "t3",
        "wuhan",
        Reason::NoSpace,
        "the disk of /mnt/nas is full",
    );
    insta::assert_snapshot!(status::table(&[moving, done, stuck, offline("t4", "hefei")], false), @r"
    ID  ARTIFACT          SITE     STATE         REASON         DONE     SIZE      RATE     ETA
    t1  dataset/line3:v1  chengdu  transferring  -              44 %  3.0 GiB  12 MiB/s  2m 22s
    t2  dataset/line3:v1  xian     done          -             100 %   1000 B         -       -
    t3  dataset/line3:v1  wuhan    failed        no_space        0 %   1000 B         -       -
    t4  dataset/line3:v1  hefei    queued        site_offline    0 %   1000 B         -       -

    t3: the disk of /mnt/nas is full
      next: make room

    t4: site hefei is not connected
      next: nothing: it goes on when the site comes
    ");
    assert_eq!(status::table(&[], false), "no transfers\n");
}

#[test]
fn colours_change_no_width() {
    let rows = [
        transfer("t1", "chengdu", State::Done),
        transfer("t2", "xian", State::Failed),
    ];
    let painted = status::rows(&rows, true);
    assert!(painted.contains("\u{1b}[32mdone\u{1b}[0m"), "{painted:?}");
    let plain = painted
        .replace("\u{1b}[32m", "")
        .replace("\u{1b}[31m", "")
        .replace("\u{1b}[0m", "");
    assert_eq!(plain, status::rows(&rows, false));
}

#[test]
fn the_detail_of_a_transfer() {
    let mut t = failed(
        "t1",
        "chengdu",
        Reason::Integrity,
        "a.png\u{1b}[2J: bad hash",
    );
    t.bytes = Bytes {
        total: 10 << 20,
        reused: 1 << 20,
        resumed: 0,
        received: 2 << 20,
        committed: 3 << 20,
        wire: 2_200_000,
    };
    let text = status::detail(&t);
    let shown: Vec<&str> = text
        .lines()
        .filter(|l| {
            !l.starts_with("digest") && !l.starts_with("created") && !l.starts_with("updated")
        })
        .collect();
    insta::assert_snapshot!(shown.join("\n"), @r"
    transfer   t1
    delivery   d1
    artifact   dataset/line3:v1
    site       chengdu
    state      failed
    reason     integrity
    message    a.png�[2J: bad hash
    next       make room
    done       30 % of 10 MiB
    reused     1.0 MiB, from files at the site
    resumed    0 B, from before an interruption
    received   2.0 MiB, over the network
    committed  3.0 MiB, written and synced at the site
    wire       2.0 MiB, sent and received in total
    attempts   1
    ");
}

#[tokio::test]
async fn changed_content_is_shown_with_its_artifact() {
    let mut all = vec![crate::api::fake::artifact("dataset/line3:v1")];
    all[0].published_here = true;
    assert!(
        status::artifacts(&all, false).contains("  here  "),
        "{}",
        status::artifacts(&all, false)
    );
    all[0].published_here = false;
    let plain = status::artifacts(&all, false);
    assert!(plain.contains("  hub  "), "{plain}");
    all[0].changed = Some("/nas/a.png changed after it was published: it is gone".into());
    let marked = status::artifacts(&all, false);
    assert_eq!(
        marked,
        format!(
            "{plain}\ndataset/line3:v1: /nas/a.png changed after it was published: it is gone\n"
        )
    );
    all[0].origin = Some("chengdu".parse().unwrap());
    assert!(status::artifacts(&all, false).ends_with(
        "\ndataset/line3:v1 at chengdu: /nas/a.png changed after it was published: it is gone\n"
    ));
    all[0].origin = None;
    let mut detail = ArtifactDetail {
        artifact: all.remove(0),
        transfers: Vec::new(),
        lineage: None,
    };
    assert!(
        status::artifact(&detail, false).contains("\nchanged    /nas/a.png changed"),
        "{}",
        status::artifact(&detail, false)
    );
    detail.artifact.origin = Some("chengdu".parse().unwrap());
    assert!(
        status::artifact(&detail, false).contains("\nchanged at chengdu  /nas/a.png"),
        "{}",
        status::artifact(&detail, false)
    );
}

#[test]
fn sites_and_plans() {
    let row = |site: &str, asked, free| PlanRow {
        artifact: "model/m:1".into(),
        site: site.into(),
        asked,
        total: 2 << 30,
        missing: 20 << 20,
        needs: 20 << 20,
        free,
        inodes: None,
        free_inodes: None,
        seconds: None,
        left_out: Vec::new(),
    };
    let few_inodes = PlanRow {
        inodes: Some(300),
        free_inodes: Some(200),
        ..row("hefei", true, Some(30 << 20))
    };
    insta::assert_snapshot!(status::plan(&[row("chengdu", true, Some(1 << 20)), few_inodes, row("xian", false, None)], false), @r"
    ARTIFACT   SITE        SIZE  TO MOVE     FREE  TIME  NOTE
    model/m:1  chengdu  2.0 GiB   20 MiB  1.0 MiB     -  no space
    model/m:1  hefei    2.0 GiB   20 MiB   30 MiB     -  no space: too few inodes
    model/m:1  xian     2.0 GiB   20 MiB        -     -  no answer: assumes that the site has no content
    ");
    let left = |site: &str| LeftOut {
        artifact: "model/m:1".into(),
        site: site.into(),
        by: "hub".into(),
        why: "not in the hub's [share] allow".into(),
    };
    let first = PlanRow {
        left_out: vec![left("hefei"), left("wuhan")],
        ..row("chengdu", true, None)
    };
    insta::assert_snapshot!(status::plan(&[first], false), @r"
    ARTIFACT   SITE        SIZE  TO MOVE  FREE  TIME  NOTE
    model/m:1  chengdu  2.0 GiB   20 MiB     -     -
      left out: model/m:1 is not shared with hefei, wuhan: not in the hub's [share] allow
    ");
    assert_eq!(status::sites(&[], false), "no sites have joined\n");
}

#[test]
fn errors_have_a_message_and_a_next_step() {
    let fault = Fault::conflict("dataset/x:1 holds other content");
    insta::assert_snapshot!(render_error(&fault, Output::Json), @r#"
    error: dataset/x:1 holds other content
      next: publish it under another version
    {"code":"conflict","message":"dataset/x:1 holds other content","next":"publish it under another version"}
    "#);
    assert_eq!(render_error(&fault, Output::Table).lines().count(), 2);
}

#[test]
fn a_reason_is_reported_once_for_repeated_attempts() {
    let mut tracker = Tracker::new(&["t1".into()]);
    let at = |cursor, t: Transfer| Transfer { cursor, ..t };
    let waits = |free: u64| Transfer {
        message: Some(format!("{free} bytes are free")),
        reason: Some(Reason::NoSpace),
        ..offline("t1", "xian")
    };
    let told = tracker.absorb(at(1, waits(1))).unwrap();
    assert!(told.contains("waits (no_space): 1 bytes"), "{told}");
    for cursor in [2, 4, 6] {
        assert_eq!(
            tracker.absorb(at(cursor, transfer("t1", "xian", State::Transferring))),
            None
        );
        assert_eq!(
            tracker.absorb(at(cursor + 1, waits(cursor))),
            None,
            "the same reason again"
        );
    }
    assert!(
        tracker.summary().contains("waiting: xian (no_space)"),
        "{}",
        tracker.summary()
    );
    assert!(
        tracker.absorb(at(8, offline("t1", "xian"))).is_some(),
        "another reason"
    );
    assert!(tracker.absorb(at(9, waits(9))).is_some(), "and back");
    assert!(
        tracker
            .absorb(at(10, transfer("t1", "xian", State::Done)))
            .is_some()
    );
}

#[test]
fn a_tracker_reports_each_change_once_and_ignores_older_answers() {
    let mut tracker = Tracker::new(&["t1".into(), "t2".into()]);
    assert_eq!(tracker.unseen(), Some("t1"));
    let at = |cursor, t: Transfer| Transfer { cursor, ..t };
    let told = tracker.absorb(at(1, offline("t1", "chengdu"))).unwrap();
    assert_eq!(
        told,
        "dataset/line3:v1 to chengdu waits (site_offline): site chengdu is not connected"
    );
    assert_eq!(tracker.absorb(at(2, offline("t1", "chengdu"))), None);
    let mut moving = transfer("t1", "chengdu", State::Transferring);
    moving.bytes.committed = 500;
    assert_eq!(tracker.absorb(at(4, moving)), None);
    assert_eq!(
        tracker.absorb(at(3, offline("t1", "chengdu"))),
        None,
        "an older answer came late"
    );
    assert_eq!(tracker.absorb(transfer("other", "x", State::Done)), None);
    let mut of_hub = Tracker::new(&["t1".into()]);
    let moving = transfer("t1", "chengdu", State::Transferring);
    assert_eq!(of_hub.absorb(at(CURSOR_OF_HUB | 900, moving)), None);
    assert!(
        of_hub
            .absorb(at(7, transfer("t1", "chengdu", State::Done)))
            .is_some(),
        "the site counts fewer events than the hub"
    );
    assert_eq!(
        tracker
            .absorb(at(5, transfer("t2", "xian", State::Done)))
            .as_deref(),
        Some("dataset/line3:v1 arrived at xian")
    );
    assert_eq!(
        (tracker.open(), tracker.bytes()),
        (vec!["t1".to_owned()], (1500, 2000))
    );
    assert_eq!(tracker.summary(), "75 % of 1.9 KiB, 1 of 2 ended");
    assert!(
        notice(&transfer("t", "s", State::Cancelled))
            .unwrap()
            .contains("cancelled (cancelled)")
    );
}
