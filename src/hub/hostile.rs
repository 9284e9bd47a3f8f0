//! A hub in this process, and peers that request more than they may, or start a request and then
//! send nothing.

use std::time::{Duration, Instant};

use super::upload::tests::{Bench, hello};
use crate::api::Backend as _;
use crate::api::types::{Job, PublishRequest, SourceOptions, VerifyRequest};
use crate::reach::Reach;
use base::fault::Code;
use base::limits::{QUESTION_BYTES_MAX, SILENCE_MAX};
use content::frame::{Frame, HEADER_BYTES, Header};
use content::manifest::Digest;
use exchange::wire;
use model::actor::Actor;
use model::protocol::{AskHub, CONTROL, FETCH, FetchRequest, FromHub, QUESTION, Wanted};
use transport::identity::Claim;
use transport::{Link, RecvHalf};

async fn site(bench: &Bench, name: &str) -> Link {
    let identity = bench
        .join(
            &bench.token(Some(name), None).await,
            &Claim::Site(name.parse().unwrap()),
        )
        .await;
    bench.dial(&identity).await
}

/// Sends an unchanged request, and returns the whole answer.
async fn fetch(link: &Link, digest: Digest, wants: Vec<Wanted>) -> Vec<u8> {
    let request = postcard::to_stdvec(&FetchRequest {
        digest,
        priority: 0,
        wants,
    })
    .unwrap();
    let (mut send, mut recv) = link.open(0).await.unwrap();
    send.write_all(&[FETCH]).await.unwrap();
    wire::send_bytes(&mut send, &request).await.unwrap();
    send.finish().unwrap();
    recv.read_to_end(16 << 20).await.unwrap()
}

/// The raw length of each frame of an answer, or the code of its fault.
fn frames(answer: &[u8]) -> Vec<Result<u32, Code>> {
    let (mut rest, mut out) = (answer, Vec::new());
    while !rest.is_empty() {
        let header = Header::parse(rest.first_chunk::<HEADER_BYTES>().unwrap()).unwrap();
        let (frame, later) = rest.split_at(header.frame_len());
        out.push(match Frame::from_line(header, frame.to_vec().into()) {
            Ok(frame) => Ok(frame.raw_len()),
            Err(content::frame::FrameError::Fault(fault)) => Err(fault.code),
            Err(other) => unreachable!("{other}"),
        });
        rest = later;
    }
    out
}

async fn control(link: &Link) -> (transport::SendHalf, RecvHalf) {
    let (mut send, recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
    send.write_all(&[CONTROL]).await.unwrap();
    wire::send(&mut send, &hello(false)).await.unwrap();
    (send, recv)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_for_many_roots_is_refused_before_any_is_built() {
    let bench = Bench::start().await;
    let link = site(&bench, "east").await;
    let source = bench.source("a", 1 << 20, 1);
    let token = bench.token(None, Some("office")).await;
    let digest: Digest = bench
        .publish(&source, "model/a:v1", Some(&token))
        .await
        .unwrap()
        .published
        .digest
        .parse()
        .unwrap();
    bench
        .hub
        .inner
        .deliveries
        .deliver(
            &Actor::Admin,
            &["model/a:v1".parse().unwrap()],
            &"east".parse().unwrap(),
            false,
        )
        .await
        .unwrap();
    assert!(
        matches!(
            frames(&fetch(&link, digest, vec![Wanted::Root]).await)[..],
            [Ok(_)]
        ),
        "one root is sent"
    );
    let answer = frames(&fetch(&link, digest, vec![Wanted::Root; 60_000]).await);
    assert_eq!(answer, [Err(Code::Integrity)], "and none of many");
    let answer = frames(&fetch(&link, digest, vec![Wanted::Root, Wanted::Root]).await);
    assert_eq!(answer, [Err(Code::Integrity)]);
    assert!(!link.is_closed(), "the connection is open");
    assert!(matches!(
        frames(&fetch(&link, digest, vec![Wanted::RootAndPages(u64::MAX)]).await)[..],
        [Ok(_), Ok(_)]
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_control_stream_ends_the_first() {
    let bench = Bench::start().await;
    let link = site(&bench, "east").await;
    let (_send, mut first) = control(&link).await;
    wire::receive::<FromHub>(&mut first).await.unwrap();
    let (_send, mut second) = control(&link).await;
    wire::receive::<FromHub>(&mut second).await.unwrap();
    wire::receive::<FromHub>(&mut first).await.unwrap_err();
    assert!(!link.is_closed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_has_a_maximum_size_and_a_deadline() {
    let bench = Bench::start().await;
    let link = site(&bench, "east").await;
    // Refused at once, although none of its text was sent.
    let (mut send, mut recv) = link.open(0).await.unwrap();
    let mut head = vec![QUESTION];
    head.extend_from_slice(&(QUESTION_BYTES_MAX as u32 + 1).to_le_bytes());
    send.write_all(&head).await.unwrap();
    recv.read_to_end(1).await.unwrap_err();
    // An honest peer detects this before it sends anything.
    let long = AskHub::Deliver {
        artifacts: vec!["model/a:v1".parse().unwrap(); 6_000],
        to: "all".parse().unwrap(),
    };
    assert_eq!(
        wire::ask::<_, serde_json::Value>(&link, &long)
            .await
            .unwrap_err()
            .code,
        Code::Usage
    );
    // Many unfinished questions take no more than the peer's share, and another peer is answered at
    // once.
    let other = site(&bench, "west").await;
    let mut held = Vec::new();
    for _ in 0..100 {
        let (mut send, recv) = link.open(0).await.unwrap();
        let mut text = vec![QUESTION];
        text.extend_from_slice(&(QUESTION_BYTES_MAX as u32).to_le_bytes());
        text.resize(1_000, b' ');
        send.write_all(&text).await.unwrap();
        held.push((send, recv));
    }
    let begun = Instant::now();
    let ask = AskHub::Delivery("d-0".parse().unwrap());
    assert_eq!(
        wire::ask::<_, serde_json::Value>(&other, &ask)
            .await
            .unwrap_err()
            .code,
        Code::NotFound
    );
    assert!(begun.elapsed() < SILENCE_MAX / 2);
    drop(held);
    let answer = tokio::time::timeout(
        Duration::from_secs(60),
        wire::ask::<_, serde_json::Value>(&link, &ask),
    )
    .await
    .unwrap();
    assert_eq!(
        answer.unwrap_err().code,
        Code::NotFound,
        "an abandoned question holds no memory"
    );
}

/// Waits for the end of a job.
async fn ended(bench: &Bench, job: Job) -> Job {
    let end = async {
        loop {
            let changed = bench.hub.changed();
            match bench.hub.job(&job.id).await.unwrap() {
                job if job.state == "running" => changed.await,
                job => return job,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), end)
        .await
        .expect("the job ends")
}

fn publish(source: &std::path::Path, reference: &str) -> PublishRequest {
    PublishRequest {
        source: source.display().to_string(),
        as_ref: reference.into(),
        to: None,
        run: None,
        options: Default::default(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_that_offers_an_artifact_and_then_sends_nothing_delays_no_other() {
    let bench = Bench::start().await;
    let link = site(&bench, "mal").await;
    let offer = AskHub::Publish {
        artifact: "model/silent:v1".parse().unwrap(),
        digest: Digest::of(b"nothing"),
        to: None,
        run: None,
        omitted: Default::default(),
    };
    let asked = link.clone();
    let offering =
        tokio::spawn(
            async move { wire::ask_to_move::<_, serde_json::Value>(&asked, &offer).await },
        );
    // The hub requests the root manifest, and receives no answer.
    let _held = link.accept().await.unwrap();
    let source = bench.source("a", 1 << 20, 1);
    for reference in ["model/a:v1", "model/a:v2"] {
        let gc = bench.hub.gc().await.unwrap();
        let published = bench
            .hub
            .publish(publish(&source, reference), Reach::Machine)
            .await
            .unwrap();
        assert_eq!(ended(&bench, gc).await.state, "done");
        assert_eq!(ended(&bench, published).await.state, "done");
    }
    assert!(!offering.is_finished());
    offering.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_of_a_pipe_fails_at_once() {
    let bench = Bench::start().await;
    let pipe = bench.source("a", 1, 1).join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let job = bench
        .hub
        .import(pipe.display().to_string(), Reach::Machine)
        .await
        .unwrap();
    let job = ended(&bench, job).await;
    let fault = job.error.unwrap();
    assert_eq!((job.state.as_str(), fault.code), ("failed", Code::Usage));
    assert!(fault.message.contains("not a regular file"), "{fault}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_publish_leaves_only_chunks_for_the_garbage_collection() {
    let bench = Bench::start().await;
    let source = bench.source("a", 64 << 20, 1);
    let job = bench
        .hub
        .publish(publish(&source, "model/a:v1"), Reach::Machine)
        .await
        .unwrap();
    bench.hub.cancel_job(&job.id).await.unwrap();
    let job = ended(&bench, job).await;
    assert_eq!(
        (job.state.as_str(), job.error.unwrap().code),
        ("cancelled", Code::Partial)
    );
    assert!(
        bench
            .hub
            .inner
            .catalogue
            .artifacts()
            .await
            .unwrap()
            .is_empty()
    );
    let gc = bench.hub.gc().await.unwrap();
    assert_eq!(ended(&bench, gc).await.state, "done");
    // A repeated publish is a new job, and complete.
    let job = bench
        .hub
        .publish(publish(&source, "model/a:v1"), Reach::Machine)
        .await
        .unwrap();
    assert_eq!(ended(&bench, job).await.state, "done");
    let verified = bench
        .hub
        .verify(VerifyRequest {
            artifact: "model/a:v1".into(),
            repair: false,
            quick: false,
        })
        .await
        .unwrap();
    assert_eq!(
        ended(&bench, verified).await.result.unwrap(),
        serde_json::json!([])
    );
}

/// What a holder of a token who may write below a root tries: paths elsewhere, and links that lead
/// there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_reaches_only_what_is_below_the_roots() {
    use std::os::unix::fs::symlink;
    let scratch = tempfile::tempdir().unwrap();
    let (root, secret) = (scratch.path().join("root"), scratch.path().join("secret"));
    let put = |path: &std::path::Path| {
        base::durable::create_dir_all(path.parent().unwrap()).unwrap();
        base::durable::replace(path, b"{}").unwrap();
    };
    put(&root.join("in/a.bin"));
    put(&secret.join("key"));
    symlink(&secret, root.join("link")).unwrap();
    symlink(secret.join("key"), root.join("key")).unwrap();
    let with_link = root.join("with-link");
    put(&with_link.join("b"));
    symlink(secret.join("key"), with_link.join("a")).unwrap();
    let bench = Bench::start_with(&format!("[publish]\nroots = [{root:?}]\n")).await;
    let run = async |request: PublishRequest| match bench.hub.publish(request, Reach::Roots).await {
        Ok(job) => ended(&bench, job).await.error.map_or(Ok(()), Err),
        Err(fault) => Err(fault),
    };
    run(publish(&root.join("in"), "dataset/in:v1"))
        .await
        .unwrap();
    run(publish(&root.join("in/a.bin"), "model/in:v1"))
        .await
        .unwrap();
    let outside = [
        secret.clone(),
        secret.join("key"),
        secret.join("missing"),
        root.join("link"),
        root.join("link/key"),
        root.join("key"),
        root.join("../secret"),
        scratch.path().to_owned(),
        "/".into(),
        "/etc/passwd".into(),
        "/proc/self/environ".into(),
        format!("/proc/self/cwd/{}", root.display()).into(),
    ];
    for path in &outside {
        for artifact in ["dataset/out:v1", "labels/out:v1", "image/out:v1"] {
            let fault = run(publish(path, artifact)).await.unwrap_err();
            assert_eq!(
                fault.code,
                Code::NotAllowed,
                "{artifact} {}: {fault}",
                path.display()
            );
            assert!(fault.message.contains("[publish] roots"), "{fault}");
        }
        let import = bench.hub.import(path.display().to_string(), Reach::Roots);
        let fault = ended(&bench, import.await.unwrap()).await.error.unwrap();
        assert_eq!(
            fault.code,
            Code::NotAllowed,
            "import {}: {fault}",
            path.display()
        );
        let out = path.join("new.bundle").display().to_string();
        let export = bench
            .hub
            .export(vec!["dataset/in:v1".into()], out, Reach::Roots);
        let fault = ended(&bench, export.await.unwrap()).await.error.unwrap();
        assert_eq!(
            fault.code,
            Code::NotAllowed,
            "export {}: {fault}",
            path.display()
        );
    }
    assert_eq!(std::fs::read_dir(&secret).unwrap().count(), 1);
    // A link in a directory is published as a link, or refused; its target is not read.
    let copied = PublishRequest {
        options: SourceOptions {
            copy_links: true,
            ..SourceOptions::default()
        },
        ..publish(&with_link, "dataset/links:v1")
    };
    run(copied).await.unwrap_err();
    let bad = PublishRequest {
        options: SourceOptions {
            bad_out: Some(root.join("bad").display().to_string()),
            ..SourceOptions::default()
        },
        ..publish(&root.join("in"), "labels/in:v1")
    };
    assert_eq!(run(bad).await.unwrap_err().code, Code::NotAllowed);
    // Inside, both work; the administrator reaches everything.
    let bundle = root.join("new.bundle").display().to_string();
    let export = bench
        .hub
        .export(vec!["dataset/in:v1".into()], bundle.clone(), Reach::Roots);
    assert_eq!(ended(&bench, export.await.unwrap()).await.error, None);
    let import = bench.hub.import(bundle, Reach::Roots).await.unwrap();
    assert_eq!(ended(&bench, import).await.error, None);
    let all = bench
        .hub
        .publish(publish(&secret, "dataset/all:v1"), Reach::Machine);
    assert_eq!(ended(&bench, all.await.unwrap()).await.error, None);
    // Without roots, nothing is reached.
    let bench = Bench::start().await;
    let none = bench
        .hub
        .publish(publish(&root.join("in"), "dataset/in:v1"), Reach::Roots);
    let fault = ended(&bench, none.await.unwrap()).await.error.unwrap();
    assert_eq!(fault.code, Code::NotAllowed);
}
