//! The classes of a label set: by number, by name, or by both, in any order and from several files.
//!
//! A class keeps the number that the input gives it; names without a number get the next ones, in
//! the order of the names, when all records were read. Names and attributes stay in memory and are
//! bounded.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use base::fault::Fault;
use base::limits::LABEL_CLASSES_MAX;

use super::collect::ClassRef;
use super::refuse::{Refusals, Why};

/// The longest class name, in bytes.
const CLASS_NAME_BYTES_MAX: usize = 1024;
/// Names and attributes of all classes, in bytes: they stay in memory.
const CLASS_TABLE_BYTES_MAX: usize = 16 << 20;

/// The classes of a label set while it is read.
#[derive(Default)]
pub(super) struct Classes {
    declared: BTreeMap<i64, Class>,
    ids: HashMap<String, i64>,
    implied: BTreeSet<i64>,
    named: Vec<String>,
    indices: HashMap<String, u32>,
    bytes: usize,
}

/// One class.
pub(super) struct Class {
    pub(super) name: String,
    pub(super) attrs: Option<String>,
}

/// The classes in their final form.
pub(super) struct ClassTable {
    pub(super) rows: BTreeMap<i64, Class>,
    named: Vec<i64>,
}

impl ClassTable {
    /// The class's id; `None` when the list has no such class.
    pub(super) fn id(&self, class: ClassRef) -> Option<i64> {
        match class {
            ClassRef::Id(id) => self.rows.contains_key(&id).then_some(id),
            ClassRef::Named(index) => self.named.get(index as usize).copied(),
        }
    }
}

impl Classes {
    /// A class that the input lists with its id and name. The same pair may come again where
    /// `repeats` says so.
    pub(super) fn declare(
        &mut self,
        place: &str,
        id: i64,
        name: &str,
        attrs: Option<String>,
        repeats: bool,
        refusals: &mut Refusals,
    ) -> Result<(), Fault> {
        if repeats
            && self
                .declared
                .get(&id)
                .is_some_and(|class| class.name == name)
        {
            return Ok(());
        }
        if !check_name(place, name, refusals) {
            return Ok(());
        }
        if let Some(class) = self.declared.get(&id) {
            refusals.add(
                Why::DuplicateClass,
                place,
                format!(
                    "class {id} is {:?} already, here it is {name:?}",
                    class.name
                ),
            );
            return Ok(());
        }
        if let Some(other) = self.ids.get(name) {
            refusals.add(
                Why::DuplicateClass,
                place,
                format!("the name {name:?} belongs to class {other} already, here to {id}"),
            );
            return Ok(());
        }
        self.make_room(name.len() + attrs.as_ref().map_or(0, String::len))?;
        self.ids.insert(name.to_owned(), id);
        self.declared.insert(
            id,
            Class {
                name: name.to_owned(),
                attrs,
            },
        );
        Ok(())
    }

    /// A class that the input lists by name, in an order that gives it this id; whether it is new.
    /// The files of a set may list the same names.
    pub(super) fn declare_name(
        &mut self,
        place: &str,
        id: i64,
        name: &str,
        attrs: Option<String>,
        refusals: &mut Refusals,
    ) -> Result<bool, Fault> {
        if self.ids.contains_key(name) {
            return Ok(false);
        }
        let id = match self.declared.contains_key(&id) {
            true => self
                .declared
                .last_key_value()
                .map_or(0, |(last, _)| last.saturating_add(1)),
            false => id,
        };
        self.declare(place, id, name, attrs, false, refusals)?;
        Ok(true)
    }

    /// A class of the version that rows come from: it is added, or gets its attributes, unless the
    /// rows give its id or its name to another class.
    pub(super) fn complete(
        &mut self,
        id: i64,
        name: &str,
        attrs: Option<String>,
    ) -> Result<(), Fault> {
        let bytes = name.len() + attrs.as_ref().map_or(0, String::len);
        match (self.declared.get_mut(&id), self.ids.get(name)) {
            (None, None) => {
                self.make_room(bytes)?;
                self.ids.insert(name.to_owned(), id);
                let name = name.to_owned();
                self.declared.insert(id, Class { name, attrs });
            }
            (Some(class), Some(known)) if *known == id && class.attrs.is_none() => {
                class.attrs = attrs;
                self.make_room(bytes)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// A class that annotations name by number only; its name is the number unless it is declared
    /// too.
    pub(super) fn by_id(&mut self, id: i64) -> Result<ClassRef, Fault> {
        if !self.implied.contains(&id) {
            self.make_room(size_of::<i64>())?;
            self.implied.insert(id);
        }
        Ok(ClassRef::Id(id))
    }

    /// A class that annotations name by name only; `None` when the name was refused.
    pub(super) fn named(
        &mut self,
        place: &str,
        name: &str,
        refusals: &mut Refusals,
    ) -> Result<Option<ClassRef>, Fault> {
        if let Some(index) = self.indices.get(name) {
            return Ok(Some(ClassRef::Named(*index)));
        }
        if !check_name(place, name, refusals) {
            return Ok(None);
        }
        self.make_room(name.len())?;
        let index = self.named.len() as u32;
        self.indices.insert(name.to_owned(), index);
        self.named.push(name.to_owned());
        Ok(Some(ClassRef::Named(index)))
    }

    /// How the record names the class, whatever the order in which classes came.
    pub(super) fn word(&self, class: ClassRef) -> String {
        match class {
            ClassRef::Id(id) => id.to_string(),
            ClassRef::Named(index) => self.named.get(index as usize).cloned().unwrap_or_default(),
        }
    }

    fn make_room(&mut self, bytes: usize) -> Result<(), Fault> {
        self.bytes += bytes;
        let classes = self.declared.len() + self.implied.len() + self.named.len();
        if classes < LABEL_CLASSES_MAX && self.bytes <= CLASS_TABLE_BYTES_MAX {
            return Ok(());
        }
        let limit = format!(
            "more than {LABEL_CLASSES_MAX} classes, or {CLASS_TABLE_BYTES_MAX} bytes of them"
        );
        Err(Fault::integrity(limit)
            .with_next("check that the class is taken from the right column or field"))
    }

    /// Gives each class its id: those that came without one get the next free ones in the order of
    /// their names, so that ids do not depend on the order of the records.
    pub(super) fn resolve(mut self, refusals: &mut Refusals) -> ClassTable {
        for id in std::mem::take(&mut self.implied) {
            let name = id.to_string();
            if self.declared.contains_key(&id) {
                continue;
            }
            if let Some(other) = self.ids.get(&name) {
                refusals.add(
                    Why::DuplicateClass,
                    format!("class {id}"),
                    format!("its number is the name of class {other}"),
                );
                continue;
            }
            self.ids.insert(name.clone(), id);
            self.declared.insert(id, Class { name, attrs: None });
        }
        let mut names: Vec<&String> = self
            .named
            .iter()
            .filter(|name| !self.ids.contains_key(*name))
            .collect();
        names.sort_unstable();
        let first = self
            .declared
            .last_key_value()
            .map_or(Some(0), |(id, _)| id.checked_add(1));
        let mut free = first.into_iter().flat_map(|first| first.max(0)..=i64::MAX);
        let fresh: Vec<(String, Option<i64>)> = names
            .into_iter()
            .map(|name| (name.clone(), free.next()))
            .collect();
        for (name, id) in fresh {
            let Some(id) = id else {
                refusals.add(
                    Why::ClassIds,
                    format!("class {name:?}"),
                    "it needs an id of its own, and the largest that there is is taken",
                );
                continue;
            };
            self.ids.insert(name.clone(), id);
            self.declared.insert(id, Class { name, attrs: None });
        }
        let named = self
            .named
            .iter()
            .map(|name| self.ids.get(name).copied().unwrap_or(-1))
            .collect();
        ClassTable {
            rows: self.declared,
            named,
        }
    }
}

fn check_name(place: &str, name: &str, refusals: &mut Refusals) -> bool {
    let problem = match name.len() {
        0 => "the class's name is empty".to_owned(),
        CLASS_NAME_BYTES_MAX.. => {
            format!("the class's name is longer than {CLASS_NAME_BYTES_MAX} bytes")
        }
        _ if name.contains('\0') => "the class's name holds a NUL".to_owned(),
        _ => return true,
    };
    refusals.add(Why::Shape, place, problem);
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_get_ids_by_their_order_not_the_records() {
        let mut refusals = Refusals::default();
        let mut classes = Classes::default();
        let scratch = classes
            .named("x", "scratch", &mut refusals)
            .unwrap()
            .unwrap();
        let dent = classes.named("x", "dent", &mut refusals).unwrap().unwrap();
        let seven = classes.by_id(7).unwrap();
        classes
            .declare("x", 3, "stain", None, false, &mut refusals)
            .unwrap();
        let stain = classes.named("x", "stain", &mut refusals).unwrap().unwrap();
        let table = classes.resolve(&mut refusals);
        assert_eq!(
            [dent, scratch, seven, stain].map(|c| table.id(c)),
            [Some(8), Some(9), Some(7), Some(3)]
        );
        assert_eq!(table.id(ClassRef::Id(1)), None);
        assert!(refusals.check().is_ok());
    }

    #[test]
    fn a_name_without_an_id_left_for_it_is_refused() {
        for (taken, refused) in [(i64::MAX, 2), (i64::MAX - 1, 1), (i64::MAX - 2, 0)] {
            let mut refusals = Refusals::default();
            let mut classes = Classes::default();
            let last = classes.by_id(taken).unwrap();
            let dent = classes.named("x", "dent", &mut refusals).unwrap().unwrap();
            let scratch = classes
                .named("x", "scratch", &mut refusals)
                .unwrap()
                .unwrap();
            let table = classes.resolve(&mut refusals);
            assert_eq!(refusals.count(Why::ClassIds), refused, "{taken}");
            assert_eq!(table.rows[&taken].name, taken.to_string());
            let ids: Vec<Option<i64>> = [last, dent, scratch]
                .into_iter()
                .map(|class| table.id(class))
                .collect();
            assert_eq!(ids[0], Some(taken));
            if refused == 0 {
                assert_eq!(ids[1..], [Some(i64::MAX - 1), Some(i64::MAX)]);
            }
        }
    }
}
