//! The hub's memory with many sites: what an idle one costs, what they cost when all of them fetch at
//! once, and what stays afterwards.
//!
//! The sites are light clients: many in this process, which dial and read as real ones do, and write
//! nothing. `scripts/many-sites 1000` runs the test with so many.

use std::time::Instant;

use bytes::Bytes;
use content::chunk::Hash;
use content::frame::{Frame, HEADER_BYTES, Header};
use content::manifest::{Digest, Root, children};
use model::protocol::Wanted;
use packhorse::config::Transport;

use crate::support::daemon::Hub;
use crate::support::hostile::{Connection, Identity, over};
use crate::support::{Scratch, data, limit, secs, wait_for};

const SITES: usize = 80;
const REFERENCE: &str = "model/m:v1";
/// The configured budget, and what the hub's memory may exceed it by. A smaller budget than the
/// default, so that what is not counted is seen.
const BUDGET: u64 = 128 << 20;
const ABOVE_BUDGET: u64 = 64 << 20;
/// What an idle site costs, in a build that is not optimised, with what its handshake left in the
/// allocator.
const IDLE_BYTES_MAX: u64 = 128 << 10;
/// What stays resident a minute after the sites have fetched. The hub frees its buffers; the allocator
/// keeps pages on which a few small blocks are in use.
const RESTING_MAX: u64 = BUDGET;
const SIZE: usize = 20 << 20;

/// The only frame of an answer.
fn content(answer: Vec<u8>, id: Hash) -> Bytes {
    let header = Header::parse(answer.first_chunk::<HEADER_BYTES>().unwrap()).unwrap();
    let len = header.raw_len;
    let frame = Frame::from_line(header, answer.into()).unwrap();
    frame.verify(id, len).unwrap().bytes
}

/// The requests for all content of an artifact, as a site sends them: 1 MiB each.
fn requests(site: &Connection, digest: Digest) -> (Vec<Vec<Wanted>>, u64) {
    let read = |wants| site.fetch(digest, wants).read_to_end(secs(30)).unwrap();
    let root = Root::parse(&content(read(vec![Wanted::Root]), digest), digest).unwrap();
    assert_eq!(root.depth, 0, "its pages list chunks");
    let (mut out, mut bytes) = (Vec::new(), 0);
    for (number, page) in (0..).zip(&root.pages) {
        let wanted = vec![Wanted::TopPages(vec![(number, 1)])];
        let chunks = children(&content(read(wanted), page.id), &root).unwrap();
        let (mut first, mut size) = (0, 0);
        for (next, chunk) in (1..).zip(&chunks) {
            size += chunk.len;
            if size >= 1 << 20 || next as usize == chunks.len() {
                out.push(vec![Wanted::Children {
                    page: page.id,
                    ranges: vec![(first, next - first)],
                }]);
                (first, size) = (next, 0);
            }
            bytes += u64::from(chunk.len);
        }
    }
    (out, bytes)
}

#[test]
fn many_sites_at_once_stay_within_the_memory_of_the_hub() {
    let count = std::env::var("PACKHORSE_LIGHT_SITES").map_or(SITES, |n| {
        n.parse().expect("PACKHORSE_LIGHT_SITES is a number")
    });
    let _limit = limit(secs(240 + 2 * count as u64));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    let text = std::fs::read_to_string(&hub.config).unwrap();
    let memory = format!("{text}[limits]\nmemory = \"{}MiB\"\n", BUDGET >> 20);
    std::fs::write(&hub.config, memory).unwrap();
    hub.start();
    let source = scratch.join("model");
    data::model(&source, SIZE);
    hub.publish(&source, REFERENCE, &[]);
    let named = hub.json(&["show", REFERENCE]);
    let digest: Digest = named["digest"].as_str().unwrap().parse().unwrap();
    let identities: Vec<Identity> = (0..count)
        .map(|n| Identity::site(&hub, &format!("light-{n}"), over(Transport::Quic)))
        .collect();
    hub.deliver(&[REFERENCE], "all");
    // What publishing and joining cost is not counted.
    hub.stop();
    hub.start();

    let first = identities[0].dial();
    let (requests, bytes) = requests(&first, digest);
    assert!(bytes > SIZE as u64 && requests.len() >= 20, "{bytes}");
    let anonymous = || hub.memory("RssAnon");
    let before = anonymous();
    let began = Instant::now();
    let mut sites = vec![first];
    sites.extend(identities[1..].iter().map(Identity::dial));
    let controls: Vec<_> = sites.iter().map(Connection::control).collect();
    wait_for("all sites are online", secs(60 + count as u64), || {
        let all = hub.json(&["sites"]);
        let online = |site: &serde_json::Value| site["online"] == true;
        let there = all.as_array().unwrap().iter().filter(|site| online(site));
        (there.count() == count).then_some(())
    });
    let connected = began.elapsed();
    let idle = anonymous().saturating_sub(before);

    let began = Instant::now();
    let reading: Vec<_> = sites
        .iter()
        .map(|site| site.drain(digest, &requests))
        .collect();
    for read in reading {
        let read = read(secs(120 + 2 * count as u64));
        assert!(read >= bytes, "{read} of {bytes} bytes");
    }
    // Without the code, of which a build that is not optimised has twice as much.
    let code = hub.memory("RssFile");
    let (took, peak) = (began.elapsed(), hub.memory("VmHWM").saturating_sub(code));
    let busy = anonymous();
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    println!(
        "{count} sites: online after {connected:.1?}; idle {:.1} KiB each; {:.0} MiB sent in {took:.1?}; peak {:.0} MiB resident without code; {:.0} MiB of heap before, {:.0} after",
        idle as f64 / 1024.0 / count as f64,
        mib(bytes * count as u64),
        mib(peak),
        mib(before),
        mib(busy),
    );
    assert!(peak <= BUDGET + ABOVE_BUDGET, "{peak} bytes");
    assert!(
        idle <= IDLE_BYTES_MAX * count as u64,
        "{idle} bytes for {count} idle sites"
    );
    let resting = wait_for("the hub releases its buffers", secs(60), || {
        Some(anonymous()).filter(|now| *now <= RESTING_MAX)
    });
    println!("{:.0} MiB of heap at rest", mib(resting));
    drop((controls, sites));
}
