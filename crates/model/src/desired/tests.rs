//! A hub and a site that exchange the desired state over connections that lose messages and end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::transfer::Want;
use content::manifest::Digest;

fn id(n: u8) -> TransferId {
    format!("t-{n:03}").parse().unwrap()
}

fn wanted(n: u8, generation: i64) -> Desired {
    Desired {
        id: id(n),
        delivery: "d-1".parse().unwrap(),
        artifact: format!("model/m{n}:1").parse().unwrap(),
        digest: Digest::of(&[n]),
        want: Want::Run,
        generation,
        total: 1,
        created_ms: 0,
        after: Vec::new(),
        lineage: None,
        known: Known::default(),
    }
}

/// What happens.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// The hub wants a transfer, of this generation.
    Want(u8, i64),
    /// A transfer ends at the hub.
    End(u8),
    /// The row of a transfer becomes unreadable at the hub, or readable again.
    Damage(u8),
    /// The hub looks, and sends what differs.
    Look,
    /// So many messages arrive at the site.
    Deliver(u8),
    /// The next message is lost, which a stream never does.
    Lose,
    /// Another connection: what was on its way is lost.
    Reconnect,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (0..12u8, 0..3i64).prop_map(|(n, generation)| Act::Want(n, generation)),
        3 => (0..12u8).prop_map(Act::End),
        1 => (0..12u8).prop_map(Act::Damage),
        4 => Just(Act::Look),
        4 => (1..4u8).prop_map(Act::Deliver),
        1 => Just(Act::Lose),
        1 => Just(Act::Reconnect),
    ];
    prop::collection::vec(act, 0..60)
}

#[derive(Default)]
struct World {
    open: BTreeMap<TransferId, Desired>,
    damaged: BTreeSet<TransferId>,
    sent: SentList,
    is_list_due: bool,
    wire: VecDeque<Changes>,
    received: ReceivedList,
    /// The transfers of the site.
    live: BTreeMap<TransferId, Desired>,
    /// The transfers that ended at the hub, with the revision of that moment, until the site has
    /// received them again: a message that is on its way may still take them away.
    ended: BTreeMap<TransferId, u64>,
}

impl World {
    fn look(&mut self) {
        let is_list = std::mem::take(&mut self.is_list_due);
        if is_list {
            self.sent.clear();
        }
        self.sent.begin_look();
        let mut part = Part::new(is_list);
        let mut out = Vec::new();
        for (id, wanted) in &self.open {
            if self.damaged.contains(id) {
                if self.sent.found_unreadable(id) {
                    out.extend(part.keep(id.clone(), &mut self.sent));
                }
            } else if self.sent.found(wanted).unwrap() {
                out.extend(part.set(wanted.clone(), &mut self.sent));
            }
        }
        for id in self.sent.not_found() {
            out.extend(part.remove(id, &mut self.sent));
        }
        out.extend(part.end(None, is_list, false, &mut self.sent));
        self.wire.extend(out);
    }

    fn deliver(&mut self) {
        let Some(changes) = self.wire.pop_front() else {
            return;
        };
        match self.received.take(&changes).unwrap() {
            Received::AskList => self.is_list_due = true,
            Received::Applies { complete } => {
                let again = changes.set.iter().map(|wanted| &wanted.id);
                for id in again.chain(&changes.kept) {
                    if self.ended.get(id).is_some_and(|at| changes.revision > *at) {
                        self.ended.remove(id);
                    }
                }
                for wanted in changes.set {
                    self.live.insert(wanted.id.clone(), wanted);
                }
                for id in &changes.removed {
                    self.live.remove(id);
                }
                if complete {
                    let received = &self.received;
                    self.live.retain(|id, _| received.contains(id));
                }
            }
        }
    }

    fn reconnect(&mut self) {
        (self.sent, self.received) = Default::default();
        self.wire.clear();
        self.ended.values_mut().for_each(|at| *at = 0);
        self.is_list_due = true;
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Want(n, generation) => {
                self.open.insert(id(n), wanted(n, generation));
            }
            Act::End(n) => {
                self.open.remove(&id(n));
                self.damaged.remove(&id(n));
                self.ended.insert(id(n), self.sent.revision);
            }
            Act::Damage(n) => {
                if !self.damaged.remove(&id(n)) {
                    self.damaged.insert(id(n));
                }
            }
            Act::Look => self.look(),
            Act::Deliver(n) => (0..n).for_each(|_| self.deliver()),
            Act::Lose => drop(self.wire.pop_front()),
            Act::Reconnect => self.reconnect(),
        }
    }

    /// Looks and delivers until nothing moves.
    fn settle(&mut self) {
        for _ in 0..4 {
            self.look();
            while !self.wire.is_empty() {
                self.deliver();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn both_sides_agree_in_the_end(acts in acts(), ends_with_reconnect: bool) {
        let mut world = World { is_list_due: true, ..World::default() };
        for act in acts {
            let ended = world.ended.clone();
            let before: BTreeSet<TransferId> = world.live.keys().cloned().collect();
            world.act(act);
            for id in world.damaged.iter().filter(|id| world.open.contains_key(id)) {
                prop_assert!(
                    !before.contains(id) || ended.contains_key(id) || world.live.contains_key(id),
                    "a transfer that the hub cannot read was given up: {id}"
                );
            }
        }
        if ends_with_reconnect {
            world.reconnect();
        }
        // A loss behind which no message follows is noticed with the next one.
        let last = wanted(99, 0);
        world.open.insert(last.id.clone(), last);
        world.settle();
        let readable = |map: &BTreeMap<TransferId, Desired>| -> Vec<Desired> {
            let all = map.iter().filter(|(id, _)| !world.damaged.contains(id));
            all.map(|(_, wanted)| wanted.clone()).collect()
        };
        prop_assert_eq!(readable(&world.live), readable(&world.open));
        prop_assert!(world.live.keys().all(|id| world.open.contains_key(id)));
    }
}

#[test]
fn a_list_has_parts_of_bounded_size_and_later_changes_are_small() {
    let mut sent = SentList::default();
    let mut received = ReceivedList::default();
    let all: Vec<Desired> = (0..500u32)
        .map(|n| Desired {
            id: format!("t-{n:030}").parse().unwrap(),
            ..wanted(1, 0)
        })
        .collect();
    let look = |sent: &mut SentList, is_list: bool, all: &[Desired]| {
        sent.begin_look();
        let mut part = Part::new(is_list);
        let mut out = Vec::new();
        for wanted in all {
            if sent.found(wanted).unwrap() {
                out.extend(part.set(wanted.clone(), sent));
            }
        }
        for id in sent.not_found() {
            out.extend(part.remove(id, sent));
        }
        out.extend(part.end(None, is_list, false, sent));
        out
    };
    let list = look(&mut sent, true, &all);
    assert!(list.len() > 3, "{} parts", list.len());
    let (last, others) = list.split_last().unwrap();
    for part in others {
        assert!(json_bytes(part) < CHANGES_BYTES_MAX + (4 << 10));
        assert_eq!(
            received.take(part).unwrap(),
            Received::Applies { complete: false }
        );
        assert!(!received.contains(&all[0].id), "a list without its end");
    }
    assert_eq!(
        received.take(last).unwrap(),
        Received::Applies { complete: true }
    );
    assert!(all.iter().all(|wanted| received.contains(&wanted.id)));
    assert!(look(&mut sent, false, &all).is_empty(), "nothing changed");
    let changed = look(&mut sent, false, &all[1..]);
    assert_eq!(changed.len(), 1);
    assert!(json_bytes(&changed[0]) < 80, "{:?}", changed[0]);
    received.take(&changed[0]).unwrap();
    assert!(!received.contains(&all[0].id) && received.contains(&all[1].id));
}

#[test]
fn a_site_asks_until_a_list_comes_and_accepts_a_bounded_number_of_transfers() {
    let mut received = ReceivedList::default();
    let change = |revision| Changes {
        revision,
        ..Changes::default()
    };
    assert_eq!(received.take(&change(7)).unwrap(), Received::AskList);
    assert_eq!(received.take(&change(8)).unwrap(), Received::AskList);
    let list = Changes {
        begin: true,
        end: true,
        ..change(9)
    };
    assert_eq!(
        received.take(&list).unwrap(),
        Received::Applies { complete: true }
    );
    assert_eq!(received.take(&change(u64::MAX)).unwrap(), Received::AskList);
    let many = Changes {
        begin: true,
        kept: (0..=TRANSFERS_LISTED_MAX as u32)
            .map(|n| TransferId::made(1, n))
            .collect(),
        ..change(1)
    };
    assert!(received.take(&many).is_err());
}

#[test]
fn a_list_that_leaves_out_transfers_gives_up_none() {
    let mut received = ReceivedList::default();
    let list = |partial, n| Changes {
        revision: 1,
        begin: true,
        end: true,
        partial,
        set: vec![wanted(n, 0)],
        ..Changes::default()
    };
    received.take(&list(false, 1)).unwrap();
    assert_eq!(
        received.take(&list(true, 2)).unwrap(),
        Received::Applies { complete: false }
    );
    assert!(received.contains(&id(1)) && received.contains(&id(2)));
    // Many such lists are bounded too.
    let most = TRANSFERS_LISTED_MAX as u32;
    let many = Changes {
        set: Vec::new(),
        kept: (0..most).map(|n| TransferId::made(1, n)).collect(),
        ..list(true, 2)
    };
    assert!(received.take(&many).is_err());
}
