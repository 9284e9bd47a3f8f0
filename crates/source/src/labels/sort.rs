//! An external merge sort: any number of `(key, value)` records, a fixed amount of memory.
//!
//! The collector of label rows and the join of COCO images with their annotations use it. Records
//! are sorted by key, bytewise; records of one key keep the order in which they were pushed. What
//! does not fit the budget is spilled as sorted runs to files that have no name (unlinked at once),
//! so a crash leaves nothing behind.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use base::fault::{Fault, IoContext};

/// Runs of one size that are merged into one larger run: keeps the open files and the read buffers
/// of a merge few.
const FAN_IN: usize = 32;
/// The read buffer of each run.
const RUN_BUFFER_BYTES: usize = 64 << 10;

/// A key and its value.
pub(crate) type Record<'a> = (&'a [u8], &'a [u8]);

/// Takes records in any order.
pub(crate) struct Sorter {
    dir: PathBuf,
    budget: usize,
    arena: Vec<u8>,
    slots: Vec<Slot>,
    /// `levels[n]` holds runs that came out of `n` merges; later levels hold older records.
    levels: Vec<Vec<File>>,
    spilled: u64,
}

/// One record in the arena: the key, and right behind it the value.
#[derive(Clone, Copy)]
struct Slot {
    /// The key's first eight bytes, so that most comparisons stay out of the arena.
    prefix: u64,
    start: u32,
    key: u32,
    value: u32,
}

impl Slot {
    fn key(self, arena: &[u8]) -> &[u8] {
        &arena[self.start as usize..(self.start + self.key) as usize]
    }

    fn value(self, arena: &[u8]) -> &[u8] {
        &arena[(self.start + self.key) as usize..(self.start + self.key + self.value) as usize]
    }
}

impl Sorter {
    /// A sorter that keeps about `budget` bytes (at most 1 GiB) in memory and spills into the
    /// folder `dir`.
    pub(crate) fn new(dir: &Path, budget: usize) -> Self {
        Self {
            dir: dir.into(),
            budget: budget.min(1 << 30),
            arena: Vec::new(),
            slots: Vec::new(),
            levels: Vec::new(),
            spilled: 0,
        }
    }

    /// Adds a record.
    pub(crate) fn push(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        let size = key.len() + value.len() + size_of::<Slot>();
        let held = self.arena.len() + self.slots.len() * size_of::<Slot>();
        if held + size > self.budget && !self.slots.is_empty() {
            self.spill()?;
        }
        let mut prefix = [0; 8];
        let n = key.len().min(8);
        prefix[..n].copy_from_slice(&key[..n]);
        let slot = Slot {
            prefix: u64::from_be_bytes(prefix),
            start: self.arena.len() as u32,
            key: key.len() as u32,
            value: value.len() as u32,
        };
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        self.slots.push(slot);
        Ok(())
    }

    /// No more records: gives them back in order.
    pub(crate) fn finish(mut self) -> Result<Sorted, Fault> {
        if self.levels.is_empty() {
            self.sort();
            return Ok(Sorted(SortedRecords::Memory {
                arena: self.arena,
                slots: self.slots,
                at: 0,
            }));
        }
        self.spill()?;
        self.arena = Vec::new();
        self.slots = Vec::new();
        let oldest_first: Vec<File> = self.levels.into_iter().rev().flatten().collect();
        Ok(Sorted(SortedRecords::Runs(Merge::new(oldest_first)?)))
    }

    fn sort(&mut self) {
        let arena = &self.arena;
        // `start` grows with every push, so comparing it last keeps the order of equal keys; only
        // an empty record has the start of the one behind it.
        self.slots.sort_unstable_by(|a, b| {
            let keys = a
                .prefix
                .cmp(&b.prefix)
                .then_with(|| a.key(arena).cmp(b.key(arena)));
            keys.then_with(|| (a.start, a.value).cmp(&(b.start, b.value)))
        });
    }

    fn spill(&mut self) -> Result<(), Fault> {
        if self.slots.is_empty() {
            return Ok(());
        }
        self.sort();
        let mut run = RunWriter::create(&self.dir, self.spilled)?;
        for slot in &self.slots {
            run.put(slot.key(&self.arena), slot.value(&self.arena))?;
        }
        let run = run.finish()?;
        self.spilled += 1;
        self.arena.clear();
        self.slots.clear();
        self.add_run(0, run)
    }

    fn add_run(&mut self, level: usize, run: File) -> Result<(), Fault> {
        if self.levels.len() <= level {
            self.levels.push(Vec::new());
        }
        self.levels[level].push(run);
        if self.levels[level].len() < FAN_IN {
            return Ok(());
        }
        let mut merge = Merge::new(std::mem::take(&mut self.levels[level]))?;
        let mut out = RunWriter::create(&self.dir, self.spilled)?;
        self.spilled += 1;
        while let Some((key, value)) = merge.next()? {
            out.put(key, value)?;
        }
        let merged = out.finish()?;
        self.add_run(level + 1, merged)
    }
}

/// Records in order.
pub(crate) struct Sorted(SortedRecords);

enum SortedRecords {
    /// All of them fitted the budget; `at` is the next slot.
    Memory {
        arena: Vec<u8>,
        slots: Vec<Slot>,
        at: usize,
    },
    /// SortedRecords runs on disk.
    Runs(Merge),
}

impl Sorted {
    /// The next record; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Record<'_>>, Fault> {
        match &mut self.0 {
            SortedRecords::Memory { arena, slots, at } => {
                let Some(slot) = slots.get(*at).copied() else {
                    return Ok(None);
                };
                *at += 1;
                Ok(Some((slot.key(arena), slot.value(arena))))
            }
            SortedRecords::Runs(merge) => merge.next(),
        }
    }
}

/// A run file: `key length u32 LE, value length u32 LE, key, value`, again and again.
struct RunWriter(BufWriter<File>);

impl RunWriter {
    fn create(dir: &Path, number: u64) -> Result<Self, Fault> {
        // Two sorters may share the folder: the name only lives until the next line, but must be
        // free until then.
        let path = dir.join(format!(
            ".run-{}-{number}-{:016x}",
            std::process::id(),
            rand::random::<u64>()
        ));
        let at = || format!("make the scratch file {}", path.display());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .at(at())?;
        std::fs::remove_file(&path).at(at())?;
        Ok(Self(BufWriter::with_capacity(256 << 10, file)))
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        let mut head = [0; 8];
        head[..4].copy_from_slice(&(key.len() as u32).to_le_bytes());
        head[4..].copy_from_slice(&(value.len() as u32).to_le_bytes());
        let mut write = || {
            self.0.write_all(&head)?;
            self.0.write_all(key)?;
            self.0.write_all(value)
        };
        write().at("write label rows to the scratch folder")
    }

    fn finish(self) -> Result<File, Fault> {
        let end = || {
            let mut file = self
                .0
                .into_inner()
                .map_err(std::io::IntoInnerError::into_error)?;
            file.rewind()?;
            Ok(file)
        };
        end().at("write label rows to the scratch folder")
    }
}

/// The merge of runs, oldest first.
struct Merge {
    heap: BinaryHeap<Head>,
    /// The record on top was given out and has to make way.
    given: bool,
}

/// The record of a run that is next.
struct Head {
    key: Vec<u8>,
    value: Vec<u8>,
    age: usize,
    run: BufReader<File>,
}

impl Head {
    /// Reads the run's next record; false at its end.
    fn advance(&mut self) -> Result<bool, Fault> {
        self.try_advance()
            .at("read label rows back from the scratch folder")
    }

    fn try_advance(&mut self) -> std::io::Result<bool> {
        use std::io::BufRead;
        if self.run.fill_buf()?.is_empty() {
            return Ok(false);
        }
        let mut head = [0; 8];
        self.run.read_exact(&mut head)?;
        let [a, b, c, d, e, f, g, h] = head;
        self.key
            .resize(u32::from_le_bytes([a, b, c, d]) as usize, 0);
        self.value
            .resize(u32::from_le_bytes([e, f, g, h]) as usize, 0);
        self.run.read_exact(&mut self.key)?;
        self.run.read_exact(&mut self.value)?;
        Ok(true)
    }
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        // Reversed: the heap's top is its greatest, and the smallest key is wanted, of equal ones
        // the oldest.
        other
            .key
            .cmp(&self.key)
            .then_with(|| other.age.cmp(&self.age))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Head {}

impl Merge {
    fn new(runs: Vec<File>) -> Result<Self, Fault> {
        let mut heap = BinaryHeap::with_capacity(runs.len());
        for (age, run) in runs.into_iter().enumerate() {
            let run = BufReader::with_capacity(RUN_BUFFER_BYTES, run);
            let mut head = Head {
                key: Vec::new(),
                value: Vec::new(),
                age,
                run,
            };
            if head.advance()? {
                heap.push(head);
            }
        }
        Ok(Self { heap, given: false })
    }

    fn next(&mut self) -> Result<Option<Record<'_>>, Fault> {
        if self.given
            && let Some(mut top) = self.heap.peek_mut()
            && !top.advance()?
        {
            PeekMut::pop(top);
        }
        self.given = true;
        Ok(self
            .heap
            .peek()
            .map(|head| (head.key.as_slice(), head.value.as_slice())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sort(records: &[(Vec<u8>, Vec<u8>)], budget: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(dir.path(), budget);
        for (key, value) in records {
            sorter.push(key, value).unwrap();
        }
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "no run may be left behind by a crash"
        );
        let mut sorted = sorter.finish().unwrap();
        let mut out = Vec::new();
        while let Some((key, value)) = sorted.next().unwrap() {
            out.push((key.to_vec(), value.to_vec()));
        }
        assert!(sorted.next().unwrap().is_none(), "the end stays the end");
        out
    }

    #[test]
    fn more_runs_than_one_merge_takes() {
        let records: Vec<_> = (0..5000u32)
            .map(|n| {
                (
                    (n * 7919 % 613).to_be_bytes().to_vec(),
                    n.to_be_bytes().to_vec(),
                )
            })
            .collect();
        let mut expected = records.clone();
        expected.sort_by(|a, b| a.0.cmp(&b.0));
        // 4 records a run: 1,250 runs, merged over three levels.
        assert_eq!(sort(&records, 130), expected);
    }

    #[test]
    fn empty_records_keep_their_place() {
        // Found by the property below: an empty record begins where the next one does.
        let records: Vec<_> = [&b""[..], b"a", b"", b"b", b""]
            .map(|value| (Vec::new(), value.to_vec()))
            .to_vec();
        for budget in [1, 60, 4000] {
            assert_eq!(sort(&records, budget), records);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn sorts_as_a_stable_sort_does(keys in prop::collection::vec(prop::collection::vec(0u8..3, 0..12), 0..200), budget in 1usize..4000) {
            let records: Vec<_> = keys.into_iter().enumerate().map(|(n, key)| (key, vec![n as u8; n % 5])).collect();
            let mut expected = records.clone();
            expected.sort_by(|a, b| a.0.cmp(&b.0));
            prop_assert_eq!(sort(&records, budget), expected);
        }
    }
}
