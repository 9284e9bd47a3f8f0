//! A site or a publisher that was enrolled properly and then sends what a test requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base::limits::{CONNECTION_SEND_BYTES_MAX, FETCH_IN_FLIGHT_MAX};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt as _;
use model::protocol::{FetchRequest, Wanted};
use packhorse::config::ConnectionSettings;
use serde_json::{Value, json};
use transport::identity::{CertificateRequest, Claim, JoinToken, SiteIdentity};
use transport::{self, Link, PRIORITY_BULK, RecvHalf, SendHalf};

use super::super::daemon::Hub;
use super::super::secs;
use super::artifact::Artifact;
use super::{RUNTIME, within};

/// The longest answer that a hostile peer reads.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A certificate from the hub, and its key.
pub(crate) struct Identity {
    identity: SiteIdentity,
    hub: String,
    line: ConnectionSettings,
}

impl Identity {
    /// Enrols a site.
    #[track_caller]
    pub(crate) fn site(hub: &Hub, name: &str, line: ConnectionSettings) -> Self {
        let claim = Claim::Site(name.parse().expect("a site's name"));
        Self::join(hub, &hub.token(name, &[]), &claim, line)
    }

    /// Enrols a publisher.
    #[track_caller]
    pub(crate) fn publisher(hub: &Hub, name: &str, line: ConnectionSettings) -> Self {
        let token = hub
            .cli(&["token", "create", "--publisher", name])
            .expect(0)
            .out;
        Self::join(hub, token.trim(), &Claim::Publisher, line)
    }

    #[track_caller]
    fn join(hub: &Hub, token: &str, claim: &Claim, line: ConnectionSettings) -> Self {
        let token: JoinToken = token.parse().expect("a join token");
        let address = hub.quic.to_string();
        let request = CertificateRequest::new().expect("a key");
        let identity = within(
            "join the hub",
            secs(20),
            transport::join(&address, &token, claim, &line, request),
        )
        .expect("join the hub");
        Self {
            identity,
            hub: address,
            line,
        }
    }

    /// Connects; fails with the hub's error.
    pub(crate) fn try_dial(&self) -> Result<Connection, String> {
        let dialled = within(
            "dial the hub",
            secs(30),
            transport::dial(
                &self.hub,
                &self.identity,
                &self.line,
                CONNECTION_SEND_BYTES_MAX,
            ),
        );
        dialled
            .map(Connection::new)
            .map_err(|fault| fault.to_string())
    }

    /// Connects.
    #[track_caller]
    pub(crate) fn dial(&self) -> Connection {
        self.try_dial().expect("the hub accepts it")
    }

    /// A receipt with any statement, signed by this peer's key.
    pub(crate) fn receipt(&self, statement: &str) -> Value {
        let signature = BASE64.encode(self.identity.sign(statement.as_bytes()).expect("sign"));
        json!({"statement": statement, "signature": signature, "certificate": BASE64.encode(self.identity.cert_der())})
    }
}

/// A connection. Dropped, it is closed.
#[derive(Clone)]
pub(crate) struct Connection {
    link: Link,
}

impl Connection {
    pub(super) fn new(link: Link) -> Self {
        Self { link }
    }

    /// Opens a stream and writes its first bytes.
    #[track_caller]
    pub(crate) fn open(&self, first: &[u8]) -> Stream {
        self.try_open(first).expect("the connection is open")
    }

    /// The same; `None` if the connection has ended.
    pub(crate) fn try_open(&self, first: &[u8]) -> Option<Stream> {
        let (send, recv) = within("open a stream", secs(20), self.link.open(PRIORITY_BULK)).ok()?;
        let mut stream = Stream { send, recv };
        stream.write(first).ok()?;
        Some(stream)
    }

    /// Opens a control stream with the first message of an honest site.
    #[track_caller]
    pub(crate) fn control(&self) -> Stream {
        let mut stream = self.open(b"C");
        stream.message(&json!({"hello": {"version": env!("CARGO_PKG_VERSION"), "share": null, "congestion": "auto"}})).expect("say hello");
        stream
    }

    /// Asks a question. Returns the answer's `Ok`, or its `Err` as JSON text, or how the stream
    /// ended.
    #[track_caller]
    pub(crate) fn ask(&self, question: &Value) -> Result<Value, String> {
        self.ask_bytes(&serde_json::to_vec(question).expect("JSON"))
    }

    /// The same with the unchanged bytes of the question.
    #[track_caller]
    pub(crate) fn ask_bytes(&self, question: &[u8]) -> Result<Value, String> {
        let mut stream = self.open(b"Q");
        stream.write(&framed(question))?;
        stream.finish();
        let mut answer = stream.receive(secs(60))?;
        match answer.get_mut("Ok") {
            Some(ok) => Ok(ok.take()),
            None => Err(answer.to_string()),
        }
    }

    /// Opens a fetch stream with this request. Its answer is read with [`Stream::read_to_end`].
    #[track_caller]
    pub(crate) fn fetch(&self, digest: content::manifest::Digest, wants: Vec<Wanted>) -> Stream {
        let request = postcard::to_stdvec(&FetchRequest {
            digest,
            priority: 0,
            wants,
        })
        .expect("postcard");
        let mut stream = self.open(b"F");
        // A refusal may arrive before the whole request is written.
        let _ = stream.write(&framed(&request));
        stream.finish();
        stream
    }

    /// Sends all these requests, as many at once as a site has, and reads the answers, in the
    /// background. The returned call waits for the end, and returns the bytes that were read.
    pub(crate) fn drain(
        &self,
        digest: content::manifest::Digest,
        requests: &[Vec<Wanted>],
    ) -> impl FnOnce(Duration) -> u64 + use<> {
        let link = self.link.clone();
        let messages: Vec<Vec<u8>> = requests
            .iter()
            .map(|wants| {
                let request = FetchRequest {
                    digest,
                    priority: 0,
                    wants: wants.clone(),
                };
                let request = framed(&postcard::to_stdvec(&request).expect("postcard"));
                [b"F".as_slice(), &request].concat()
            })
            .collect();
        let reading = RUNTIME.spawn(
            futures::stream::iter(messages)
                .map(move |message| {
                    let link = link.clone();
                    async move {
                        let (mut send, mut recv) = link.open(PRIORITY_BULK).await?;
                        send.write_all(&message).await?;
                        send.finish()?;
                        let mut read = 0;
                        while let Some(bytes) = recv.read_chunk(1 << 20).await? {
                            read += bytes.len() as u64;
                        }
                        Ok::<u64, base::fault::Fault>(read)
                    }
                })
                .buffer_unordered(FETCH_IN_FLIGHT_MAX)
                .map(|read| read.expect("the hub answers"))
                .fold(0, |all, read| std::future::ready(all + read)),
        );
        move |limit| within("the hub answers", limit, reading).expect("no panic")
    }

    /// Answers the peer's fetches from these artifacts, and refuses every question, in the
    /// background. The counter counts the fetch requests.
    pub(crate) fn serve(&self, artifacts: Vec<Artifact>) -> Arc<AtomicUsize> {
        let asked = Arc::new(AtomicUsize::new(0));
        let (link, counter, artifacts) = (self.link.clone(), asked.clone(), Arc::new(artifacts));
        RUNTIME.spawn(async move {
            while let Some((send, recv)) = link.accept().await {
                tokio::spawn(answer(send, recv, artifacts.clone(), counter.clone()));
            }
        });
        asked
    }

    /// The next stream that the peer opens, with its first byte.
    #[track_caller]
    pub(crate) fn accept(&self, limit: Duration) -> (u8, Stream) {
        let (send, recv) = within("the other end opens a stream", limit, self.link.accept())
            .expect("the connection is open");
        let mut stream = Stream { send, recv };
        let kind = stream.read(1, limit).expect("a stream has a first byte")[0];
        (kind, stream)
    }

    /// Whether it has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.link.is_closed()
    }

    /// Ends it.
    pub(crate) fn close(&self) {
        self.link.close("a hostile peer leaves");
    }
}

async fn answer(
    mut send: SendHalf,
    mut recv: RecvHalf,
    artifacts: Arc<Vec<Artifact>>,
    counter: Arc<AtomicUsize>,
) -> Option<()> {
    let mut kind = [0];
    recv.read_exact(&mut kind).await.ok()?;
    let text = exchange::wire::receive_bytes(&mut recv, ANSWER_BYTES_MAX)
        .await
        .ok()?;
    if kind == *b"F" {
        counter.fetch_add(1, Ordering::Relaxed);
        let request: FetchRequest = postcard::from_bytes(&text).ok()?;
        let artifact = artifacts.iter().find(|a| a.digest() == request.digest)?;
        send.write_all(&artifact.answer(&request.wants))
            .await
            .ok()?;
    } else {
        let no = json!({"Err": {"code": "usage", "message": "no", "next": "", "reason": "internal", "retry": "never"}});
        exchange::wire::send(&mut send, &no).await.ok()?;
    }
    send.finish().ok()
}

/// Bytes after their length.
pub(crate) fn framed(bytes: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(bytes.len())
        .expect("a length")
        .to_le_bytes()
        .to_vec();
    out.extend_from_slice(bytes);
    out
}

/// A stream. If it is dropped unfinished, it is reset.
pub(crate) struct Stream {
    send: SendHalf,
    recv: RecvHalf,
}

impl Stream {
    /// Writes bytes; fails if the peer stopped the stream or the connection.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        within("write to a stream", secs(60), self.send.write_all(bytes))
            .map_err(|fault| fault.to_string())
    }

    /// Writes one message after its length.
    pub(crate) fn message(&mut self, message: &Value) -> Result<(), String> {
        self.write(&framed(&serde_json::to_vec(message).expect("JSON")))
    }

    /// Ends the sending direction.
    pub(crate) fn finish(&mut self) {
        let _ = self.send.finish();
    }

    /// Reads so many bytes.
    pub(crate) fn read(&mut self, len: usize, limit: Duration) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; len];
        within(
            "read from a stream",
            limit,
            self.recv.read_exact(&mut bytes),
        )
        .map_err(|fault| fault.to_string())?;
        Ok(bytes)
    }

    /// Reads one message after its length.
    pub(crate) fn receive(&mut self, limit: Duration) -> Result<Value, String> {
        let text = within(
            "read a message",
            limit,
            exchange::wire::receive_bytes(&mut self.recv, ANSWER_BYTES_MAX),
        );
        serde_json::from_slice(&text.map_err(|fault| fault.to_string())?).map_err(|e| e.to_string())
    }

    /// Reads until the end of the stream.
    pub(crate) fn read_to_end(&mut self, limit: Duration) -> Result<Vec<u8>, String> {
        within(
            "read a stream to its end",
            limit,
            self.recv.read_to_end(ANSWER_BYTES_MAX),
        )
        .map_err(|fault| fault.to_string())
    }
}
