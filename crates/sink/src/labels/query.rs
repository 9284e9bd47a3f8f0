//! A query whose rows are published: its columns, and the statement that reads exactly these.
//!
//! Both engines prepare the user's query, check the names of its columns, and run it as a subquery
//! of their own statement. Therefore the query must return rows, and it runs in a context without
//! write access. This module keeps no state.

use base::fault::{Code, Fault, Retry};
use content::label_rows::{QUERY_COLUMNS, QueryRow};

/// The positions of these columns in [`QUERY_COLUMNS`].
const SAMPLE_PATH: usize = 0;
const LABEL_SET: usize = QUERY_COLUMNS.len() - 2;
const VERSION: usize = QUERY_COLUMNS.len() - 1;
/// Columns of the views that say nothing more than the others, or that a new version numbers anew:
/// `SELECT *` may return them.
const PASSED_OVER: [&str; 3] = ["annotation_no", "supercategory", "attrs_jsonb"];
/// The number of rows in a batch.
pub(super) const ROWS_A_BATCH: usize = 500;

/// The statement that is run instead of the user's query.
pub(super) struct Plan {
    pub(super) sql: String,
    /// The index in [`QUERY_COLUMNS`] of each column of the statement.
    pub(super) columns: Vec<usize>,
}

/// The query without trailing semicolons, for use in parentheses.
pub(super) fn without_semicolon(query: &str) -> &str {
    query
        .trim()
        .trim_end_matches(|c: char| c == ';' || c.is_whitespace())
}

/// Plans the statement for a query that returns columns with these names. `cast` is appended to
/// each.
pub(super) fn plan<'a>(
    query: &str,
    names: impl Iterator<Item = &'a str>,
    cast: &str,
) -> Result<Plan, Fault> {
    let advice = || {
        format!(
            "the allowed columns are {}; rename other columns with AS, or omit them",
            QUERY_COLUMNS.join(", ")
        )
    };
    let (mut columns, mut list) = (Vec::new(), Vec::new());
    for name in names {
        if PASSED_OVER
            .iter()
            .any(|known| known.eq_ignore_ascii_case(name))
        {
            continue;
        }
        let Some(column) = QUERY_COLUMNS
            .iter()
            .position(|known| known.eq_ignore_ascii_case(name))
        else {
            return Err(Fault::usage(format!(
                "the query returns a column {name:?}, which is not a column of labels"
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
            "the query does not return the column sample_path, so its rows belong to no sample",
        )
        .with_next(advice()));
    }
    // On its own line, because the query may end with a comment.
    Ok(Plan {
        sql: format!(
            "SELECT {} FROM (\n{}\n) AS q",
            list.join(", "),
            without_semicolon(query)
        ),
        columns,
    })
}

/// A batch of rows, which must all belong to one version if they state it.
#[derive(Default)]
pub(super) struct Batch {
    rows: Vec<QueryRow>,
    version: Option<[Option<String>; 2]>,
}

impl Batch {
    /// Adds a row. Returns all rows when they fill a batch.
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
                .with_next("add WHERE label_set = … AND version = …; to mix them intentionally, do not return these two columns"));
        }
        self.rows.push(row);
        Ok((self.rows.len() == ROWS_A_BATCH).then(|| std::mem::take(&mut self.rows)))
    }

    /// The remaining rows.
    pub(super) fn finish(self) -> Vec<QueryRow> {
        self.rows
    }
}

/// The fault of a reader that disappeared.
pub(super) fn reader_gone() -> Fault {
    Fault::internal("the reader of the query's rows ended unexpectedly")
}

/// A fault of the user's own statement, which the user must correct; a retry does not help.
pub(super) fn as_query_fault(fault: Fault) -> Fault {
    Fault {
        code: Code::Usage,
        retry: Retry::Never,
        ..fault
    }
    .context("the query")
    .with_next("test the query in a database client; it must be one SELECT that only reads")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_must_be_known_and_unique() {
        let plan_of = |names: &[&str]| plan("SELECT 1 -- x ; ", names.iter().copied(), "::text");
        let plan = plan_of(&["Sample_Path", "annotation_no", "x"]).unwrap();
        assert_eq!(plan.columns, [0, 5]);
        assert_eq!(
            plan.sql,
            "SELECT q.\"Sample_Path\"::text, q.\"x\"::text FROM (\nSELECT 1 -- x\n) AS q"
        );
        for (names, why) in [
            (&["x"][..], "not return the column sample_path"),
            (&["sample_path", "colour"], "\"colour\""),
            (&["sample_path", "x", "X"], "twice"),
        ] {
            let fault = plan_of(names).err().unwrap();
            assert_eq!(fault.code, Code::Usage);
            assert!(fault.message.contains(why), "{fault}");
        }
    }
}
