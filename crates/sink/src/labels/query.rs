//! A query whose rows are to be published: which columns it returns, and the statement that reads
//! just these.
//!
//! Both engines prepare what the user wrote, look at the names of its columns, and run it as a
//! subquery of a statement of their own. So it must be one that returns rows, and it runs where
//! nothing can be written. Keeps nothing.

use base::fault::{Code, Fault, Retry};
use content::label_rows::{QUERY_COLUMNS, QueryRow};

/// The place of these columns in [`QUERY_COLUMNS`].
const SAMPLE_PATH: usize = 0;
const LABEL_SET: usize = QUERY_COLUMNS.len() - 2;
const VERSION: usize = QUERY_COLUMNS.len() - 1;
/// Rows that travel together.
pub(super) const ROWS_A_BATCH: usize = 500;

/// What is run in the user's place.
pub(super) struct Plan {
    /// The statement.
    pub(super) sql: String,
    /// Which of [`QUERY_COLUMNS`] each column of it is.
    pub(super) columns: Vec<usize>,
}

/// The query as it may stand in brackets.
pub(super) fn bare(query: &str) -> &str {
    query
        .trim()
        .trim_end_matches(|c: char| c == ';' || c.is_whitespace())
}

/// Plans the statement for a query that returns columns of these names. `cast` is put behind each.
pub(super) fn plan<'a>(
    query: &str,
    names: impl Iterator<Item = &'a str>,
    cast: &str,
) -> Result<Plan, Fault> {
    let advice = || {
        format!(
            "the columns may be {}; rename others by AS, or leave them out",
            QUERY_COLUMNS.join(", ")
        )
    };
    let (mut columns, mut list) = (Vec::new(), Vec::new());
    for name in names {
        let Some(column) = QUERY_COLUMNS
            .iter()
            .position(|known| known.eq_ignore_ascii_case(name))
        else {
            return Err(Fault::usage(format!(
                "the query returns a column {name:?}, for which labels have no place"
            ))
            .with_next(advice()));
        };
        if columns.contains(&column) {
            return Err(
                Fault::usage(format!("the query returns the column {name:?} twice"))
                    .with_next(advice()),
            );
        }
        columns.push(column);
        list.push(format!("q.\"{name}\"{cast}"));
    }
    if !columns.contains(&SAMPLE_PATH) {
        return Err(Fault::usage(
            "the query returns no column sample_path, so that its rows belong to no sample",
        )
        .with_next(advice()));
    }
    // On a line of its own: the query may end with a comment.
    Ok(Plan {
        sql: format!("SELECT {} FROM (\n{}\n) AS q", list.join(", "), bare(query)),
        columns,
    })
}

/// Rows on their way out, which must all be of one version where they say it.
#[derive(Default)]
pub(super) struct Batch {
    rows: Vec<QueryRow>,
    version: Option<[Option<String>; 2]>,
}

impl Batch {
    /// Adds a row; gives back all rows once they make a batch.
    pub(super) fn push(&mut self, row: QueryRow) -> Result<Option<Vec<QueryRow>>, Fault> {
        let version = [row[LABEL_SET].clone(), row[VERSION].clone()];
        let first = self.version.get_or_insert_with(|| version.clone());
        if *first != version {
            let name = |v: &[Option<String>; 2]| {
                format!(
                    "{}:{}",
                    v[0].as_deref().unwrap_or("?"),
                    v[1].as_deref().unwrap_or("?")
                )
            };
            return Err(Fault::usage(format!("the query mixes the rows of {} with those of {}", name(first), name(&version)))
                .with_next("add WHERE label_set = … AND version = …; to mix them on purpose, do not return these two columns"));
        }
        self.rows.push(row);
        Ok((self.rows.len() == ROWS_A_BATCH).then(|| std::mem::take(&mut self.rows)))
    }

    /// The last rows.
    pub(super) fn finish(self) -> Vec<QueryRow> {
        self.rows
    }
}

/// The fault of the reader that went away.
pub(super) fn unread() -> Fault {
    Fault::internal("the reader of the query's rows ended early")
}

/// A fault of the user's own statement: his to mend, and nothing gets better by waiting.
pub(super) fn users(fault: Fault) -> Fault {
    Fault {
        code: Code::Usage,
        retry: Retry::Never,
        ..fault
    }
    .context("the query")
    .with_next("try the query in a client of the database; it must be one SELECT that only reads")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_known_and_come_once() {
        let plan_of = |names: &[&str]| plan("SELECT 1 -- x ; ", names.iter().copied(), "::text");
        let plan = plan_of(&["Sample_Path", "x"]).unwrap();
        assert_eq!(plan.columns, [0, 5]);
        assert_eq!(
            plan.sql,
            "SELECT q.\"Sample_Path\"::text, q.\"x\"::text FROM (\nSELECT 1 -- x\n) AS q"
        );
        for (names, why) in [
            (&["x"][..], "no column sample_path"),
            (&["sample_path", "colour"], "\"colour\""),
            (&["sample_path", "x", "X"], "twice"),
        ] {
            let fault = plan_of(names).err().unwrap();
            assert_eq!(fault.code, Code::Usage);
            assert!(fault.message.contains(why), "{fault}");
        }
    }
}
