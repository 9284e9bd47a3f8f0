//! Inserts the rows of a version, in batches: a thread of the sink reads the canonical files, the
//! caller's transaction takes the rows.

use sqlx::sqlite::SqliteArguments;
use sqlx::{AssertSqlSafe, Sqlite as Db, SqliteConnection};

use super::Sqlite;
use crate::labels::canonical::{Table, read_annotations, read_classes, read_samples};
use crate::labels::engine::{NewVersion, join_thread, pump};
use base::fault::Fault;
use base::limits::{LABEL_BATCH_BYTES, LABEL_BATCHES_QUEUED_MAX};

/// The rows of one INSERT: SQLite accepts at most 32,766 parameters, and more rows are not faster.
const ROWS_AN_INSERT: usize = 100;

/// One value of a row.
enum Value {
    Int(Option<i64>),
    Float(Option<f64>),
    Text(Option<String>),
}

fn text(value: Option<&str>) -> Value {
    Value::Text(value.map(Into::into))
}

/// Rows of one table, value after value.
#[derive(Default)]
struct Values {
    values: Vec<Value>,
    rows: usize,
    bytes: usize,
}

impl Values {
    /// Adds a row. Returns all rows when they fill a batch.
    fn row<const N: usize>(&mut self, row: [Value; N]) -> Option<Values> {
        let text_bytes = |v: &Value| {
            if let Value::Text(Some(text)) = v {
                text.len()
            } else {
                0
            }
        };
        self.bytes += row.iter().map(text_bytes).sum::<usize>();
        self.values.extend(row);
        self.rows += 1;
        (self.rows == ROWS_AN_INSERT || self.bytes >= LABEL_BATCH_BYTES / LABEL_BATCHES_QUEUED_MAX)
            .then(|| std::mem::take(self))
    }
}

/// An INSERT of one row and one of a whole batch; only these two are prepared.
struct Insert {
    columns: usize,
    one: String,
    many: String,
}

impl Insert {
    fn new(table: &str, columns: &[&str]) -> Self {
        let row = format!("({})", vec!["?"; columns.len()].join(","));
        let head = format!("INSERT INTO {table} ({}) VALUES ", columns.join(","));
        Self {
            columns: columns.len(),
            one: format!("{head}{row}"),
            many: format!("{head}{}", vec![row.as_str(); ROWS_AN_INSERT].join(",")),
        }
    }
}

type Query<'q> = sqlx::query::Query<'q, Db, SqliteArguments>;

fn bind<'q>(query: Query<'q>, value: Value) -> Query<'q> {
    match value {
        Value::Int(value) => query.bind(value),
        Value::Float(value) => query.bind(value),
        Value::Text(value) => query.bind(value),
    }
}

impl Sqlite {
    /// Inserts the rows that `work` reads on a thread of the sink.
    async fn insert<R, W>(
        &self,
        conn: &mut SqliteConnection,
        insert: &Insert,
        work: W,
    ) -> Result<R, Fault>
    where
        R: Send + 'static,
        W: FnOnce(&mut Values, &mut dyn FnMut(Values) -> Result<(), Fault>) -> Result<R, Fault>
            + Send
            + 'static,
    {
        let (mut batches, task) = pump(&self.threads, move |send_batch| {
            let mut values = Values::default();
            let result = work(&mut values, send_batch)?;
            send_batch(values)?;
            Ok(result)
        });
        while let Some(batch) = batches.recv().await {
            let batch: Values = batch;
            let (sql, values_each) = if batch.rows == ROWS_AN_INSERT {
                (&insert.many, insert.columns * ROWS_AN_INSERT)
            } else {
                (&insert.one, insert.columns)
            };
            let mut values = batch.values.into_iter().peekable();
            while values.peek().is_some() {
                let query = sqlx::query(AssertSqlSafe(sql.as_str()));
                let query = values.by_ref().take(values_each).fold(query, bind);
                query
                    .execute(&mut *conn)
                    .await
                    .map_err(|e| self.fault("insert rows", &e))?;
            }
        }
        join_thread(task).await
    }

    /// Inserts the rows of a version, in the transaction of the caller.
    pub(super) async fn fill(
        &self,
        conn: &mut SqliteConnection,
        new: &NewVersion,
        id: i64,
    ) -> Result<(), Fault> {
        let version = move || Value::Int(Some(id));

        let dir = new.dir.clone();
        let insert = Insert::new("label_class", &["version_id", "class_id", "name", "attrs"]);
        let classes = self
            .insert(conn, &insert, move |rows, send_batch| {
                read_classes(&dir, &mut |class| {
                    let row = [
                        version(),
                        Value::Int(Some(class.id)),
                        text(Some(class.name)),
                        text(class.attrs),
                    ];
                    rows.row(row).map_or(Ok(()), &mut *send_batch)
                })
            })
            .await?;
        new.check_count(Table::Classes, classes.len() as u64)?;

        let dir = new.dir.clone();
        let columns = [
            "version_id",
            "sample_no",
            "path",
            "hash",
            "width",
            "height",
            "split",
            "meta",
        ];
        let samples = self
            .insert(
                conn,
                &Insert::new("version_sample", &columns),
                move |rows, send_batch| {
                    read_samples(&dir, &mut |no, sample| {
                        let row = [
                            version(),
                            Value::Int(Some(no.cast_signed())),
                            text(Some(sample.path)),
                            text(sample.hash),
                            Value::Int(sample.width),
                            Value::Int(sample.height),
                            text(sample.split),
                            text(sample.meta),
                        ];
                        rows.row(row).map_or(Ok(()), &mut *send_batch)
                    })
                },
            )
            .await?;
        new.check_count(Table::Samples, samples)?;

        let dir = new.dir.clone();
        let columns = [
            "version_id",
            "ann_no",
            "sample_no",
            "class_id",
            "kind",
            "x",
            "y",
            "w",
            "h",
            "geom",
            "attrs",
            "raw",
        ];
        let (annotations, rows_digest) = self
            .insert(
                conn,
                &Insert::new("annotation", &columns),
                move |rows, send_batch| {
                    read_annotations(&dir, &classes, &mut |no, sample_no, row| {
                        let [x, y, w, h] = row.bbox.map(Value::Float);
                        let (no, sample_no) = (
                            Value::Int(Some(no.cast_signed())),
                            Value::Int(Some(sample_no.cast_signed())),
                        );
                        let (geom, attrs, raw) =
                            (text(row.geom), text(row.attrs), text(Some(row.raw)));
                        let row = [
                            version(),
                            no,
                            sample_no,
                            Value::Int(row.class),
                            text(Some(row.kind)),
                            x,
                            y,
                            w,
                            h,
                            geom,
                            attrs,
                            raw,
                        ];
                        rows.row(row).map_or(Ok(()), &mut *send_batch)
                    })
                },
            )
            .await?;
        new.check_count(Table::Annotations, annotations)?;

        let counts = "UPDATE label_version SET n_classes = ?, n_samples = ?, n_annotations = ?, rows_digest = ? WHERE id = ?";
        sqlx::query(counts)
            .bind(new.info.classes.cast_signed())
            .bind(samples.cast_signed())
            .bind(annotations.cast_signed())
            .bind(rows_digest.hex())
            .bind(id)
            .execute(&mut *conn)
            .await
            .map_err(|e| self.fault("write the counts", &e))?;
        Ok(())
    }
}
