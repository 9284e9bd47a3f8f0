//! A publisher with a hub in this process.

use super::*;
use transport::identity::HubIdentity;

/// Makes this machine a publisher of a hub at this address.
fn enrol(hub: &HubIdentity, state: &Path, address: &str) {
    let request = CertificateRequest::new().unwrap();
    let cert = hub
        .issue_as(
            &Peer::Publisher("office".parse().unwrap()),
            request.csr_der(),
            &transport::identity::Serial::next(None, 1),
        )
        .unwrap();
    request
        .complete(&cert, hub.ca_der())
        .unwrap()
        .save(&state.join(folder_of(address)))
        .unwrap();
}

#[test]
fn work_folders_are_used_once_and_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let first = Work::take(dir.path()).unwrap();
    let second = Work::take(dir.path()).unwrap();
    assert_ne!(first.folder, second.folder);
    let folder = first.folder.clone();
    durable::create_dir_all(&folder.join("left")).unwrap();
    // As after a kill: the lock ends with the process, the folder stays.
    let Work { _lock: lock, .. } = &first;
    rustix::fs::flock(lock, rustix::fs::FlockOperation::Unlock).unwrap();
    let third = Work::take(dir.path()).unwrap();
    assert_eq!(third.folder, folder);
    assert!(!folder.join("left").exists());
    drop(third);
    assert!(!folder.exists());
    let rest: Vec<Work> = (2..=PUBLISHES_AT_ONCE_MAX)
        .map(|_| Work::take(dir.path()).unwrap())
        .collect();
    assert_eq!(Work::take(dir.path()).err().unwrap().code, Code::Conflict);
    drop(rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_hub_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (source, state) = (dir.path().join("source"), dir.path().join("state"));
    durable::create_dir_all(&source).unwrap();
    durable::replace(&source.join("weights.bin"), b"weights").unwrap();
    let hub = Arc::new(
        HubIdentity::open_or_create(&dir.path().join("hub"), &"hub".parse().unwrap()).unwrap(),
    );
    let listener = transport::Listener::bind(
        ([127, 0, 0, 1], 0).into(),
        hub.clone(),
        Arc::new(transport::testing::AdmitAll),
        &ConnectionSettings::default(),
        64 << 20,
        &base::workers::Workers::default(),
    )
    .unwrap();
    let address = listener.local_addr().to_string();
    // This machine is a publisher of that hub already.
    enrol(&hub, &state, &address);

    let answers = tokio::spawn(async move {
        for room in [false, false, true] {
            let Some(transport::Arrival::Publisher { link, .. }) = listener.accept().await else {
                unreachable!("somebody else came")
            };
            let (mut send, mut recv) = link.accept().await.unwrap();
            let mut kind = [0];
            recv.read_exact(&mut kind).await.unwrap();
            let AskHub::Upload {
                artifact, digest, ..
            } = wire::receive(&mut recv).await.unwrap()
            else {
                unreachable!("no upload")
            };
            let (artifact, digest) = (artifact.to_string(), digest.hex());
            let published = Published {
                artifact,
                digest,
                transfers: Vec::new(),
                bytes: 7,
                stored: 7,
                unchanged: false,
                note: None,
                omitted: Vec::new(),
            };
            let answer = if room {
                Ok(published)
            } else {
                Err(Fault::no_space("no room"))
            };
            wire::send(&mut send, &answer).await.unwrap();
            // By now the publisher may have hung up.
            let _ = send.finish();
            link.closed().await;
        }
    });
    let asked = Asked {
        source: source.display().to_string(),
        artifact: "model/a:v1".parse().unwrap(),
        to: None,
        options: SourceOptions::default(),
        hub: address,
        token: None,
        state,
    };
    let uploaded = timeout(
        std::time::Duration::from_secs(30),
        publish(asked, Arc::default()),
    )
    .await
    .unwrap();
    assert_eq!(uploaded.unwrap().published.stored, 7);
    answers.await.unwrap();
}

#[test]
fn a_hub_has_a_folder_of_its_own() {
    assert_eq!(folder_of("hub.example.com:7443"), "hub.example.com_7443");
    assert_eq!(folder_of("[::1]:7443"), "___1__7443");
    assert_eq!(folder_of("../..:1"), ".._.._1");
    for address in [
        "hub.example.com:7443",
        "the_hub:1",
        "[::1]:7443",
        "[2001:db8::7]:7443",
    ] {
        assert_eq!(address_of(&folder_of(address)).as_deref(), Some(address));
    }
    assert_eq!(address_of("notes"), None);
}

#[tokio::test]
async fn a_hub_that_is_not_known_is_not_called() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let ask = |hub: &str| Asked {
        source: dir.path().display().to_string(),
        artifact: "model/a:v1".parse().unwrap(),
        to: None,
        options: SourceOptions::default(),
        hub: hub.into(),
        token: None,
        state: state.clone(),
    };
    let fault = publish(ask("hub:7443"), Arc::default()).await.unwrap_err();
    assert_eq!(fault.code, Code::NotAllowed);
    assert!(
        fault.message.contains("hub:7443")
            && fault.next.starts_with("at the hub: packhorse token create"),
        "{fault:?}"
    );
    assert!(!state.exists(), "a mistyped address creates no files");

    // This machine is a publisher of another hub: that may be the one that was meant.
    let hub =
        HubIdentity::open_or_create(&dir.path().join("hub"), &"hub".parse().unwrap()).unwrap();
    enrol(&hub, &state, "hub.example.com:7443");
    let fault = publish(ask("hub.example.com:7433"), Arc::default())
        .await
        .unwrap_err();
    assert_eq!(
        fault.message,
        "this machine is no publisher of the hub at hub.example.com:7433 yet, and did not call it; \
         it is a publisher of the hub at hub.example.com:7443"
    );
    assert!(
        fault.next.starts_with(
            "check the address in --hub; if it is right, at the hub: packhorse token create"
        ),
        "{}",
        fault.next
    );
}
