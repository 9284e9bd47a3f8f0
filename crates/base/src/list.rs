//! Lists from peers, limited while they are parsed.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};

/// A list of at most `MAX` entries. A longer list is an error.
pub fn at_most<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MAX: usize>(
    d: D,
) -> Result<Vec<T>, D::Error> {
    struct Entries<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Entries<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX} entries")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = list.next_element()? {
                if entries.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                entries.push(entry);
            }
            Ok(entries)
        }
    }

    d.deserialize_seq(Entries::<T, MAX>(PhantomData))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    #[test]
    fn a_longer_list_is_refused() {
        #[derive(Deserialize)]
        struct Message {
            #[serde(deserialize_with = "super::at_most::<_, _, 3>")]
            list: Vec<u8>,
        }
        let parse = |json: &str| serde_json::from_str::<Message>(json);
        assert_eq!(parse(r#"{"list":[1,2,3]}"#).unwrap().list, [1, 2, 3]);
        let refusal = parse(r#"{"list":[1,2,3,4]}"#).map(|m| m.list).unwrap_err();
        assert!(
            refusal.to_string().contains("at most 3 entries"),
            "{refusal}"
        );
    }
}
