//! The steps of a commit, and the removal of leftovers. The parent module describes the complete
//! procedure.

use sqlx::PgConnection;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Postgres;
use super::connect::NO_TIME_LIMITS_HERE;
use crate::labels::canonical::{Table, read_annotations, read_classes, read_samples};
use crate::labels::copy::CopyRows;
use crate::labels::engine::{NewVersion, join_thread, pump};
use base::fault::Fault;
use base::limits::{LABEL_BATCH_BYTES, LABEL_SILENCE_MAX, LABEL_STATEMENT_MAX};

/// The state of a version whose rows are complete and that waits for its switch; the name is from
/// when versions were partitions.
const LOADED: &str = "attached";
/// Separates the name of a version that is being removed from its id; no version name contains it.
const REMOVED_MARK: char = '~';
/// A transaction that has been open for longer than this may find no active version.
const PERIODS_KEPT: &str = "7 days";
/// The statements that make a version the active one for every transaction that begins from now on.
/// `now()` is the start of their transaction, which is a short one, so that it is close to its commit.
fn activation(id: i64) -> String {
    let set = format!("(SELECT label_set_id FROM packhorse.label_version WHERE id = {id})");
    format!(
        "INSERT INTO packhorse.label_active (label_set_id, version_id) VALUES ({set}, {id})
         ON CONFLICT (label_set_id) DO UPDATE SET version_id = EXCLUDED.version_id;
         UPDATE packhorse.label_switch SET until = now() WHERE label_set_id = {set} AND until = 'infinity';
         INSERT INTO packhorse.label_switch (label_set_id, version_id, since) VALUES ({set}, {id}, now());
         DELETE FROM packhorse.label_switch WHERE label_set_id = {set} AND until < now() - interval '{PERIODS_KEPT}'"
    )
}

/// A stored version that is loaded again.
struct Replaced {
    was_active: bool,
    /// The transfer that delivered it.
    transfer: Option<String>,
}

impl Postgres {
    /// Deletes a version that the views do not show. Neither waits for readers nor delays them: they
    /// read what their snapshot contains.
    pub(super) async fn drop_version(&self, conn: &mut PgConnection, id: i64) -> Result<(), Fault> {
        let sql = format!(
            "BEGIN; {NO_TIME_LIMITS_HERE};
             DELETE FROM packhorse.annotation WHERE version_id = {id};
             DELETE FROM packhorse.version_sample WHERE version_id = {id};
             DELETE FROM packhorse.label_class WHERE version_id = {id};
             DELETE FROM packhorse.label_switch WHERE version_id = {id};
             DELETE FROM packhorse.label_request WHERE version_id = {id};
             DELETE FROM packhorse.label_version WHERE id = {id}; COMMIT"
        );
        self.run(conn, "delete the rows of a version", sql).await
    }

    /// Hides a version from readers, in one small transaction that no reader can delay. If it was
    /// the active one, the remaining version that was requested last becomes active, only for transactions after the
    /// end of all other periods, so that no transaction sees two versions. The name of the hidden
    /// version can be used again.
    pub(super) async fn hide_version(&self, conn: &mut PgConnection, id: i64) -> Result<(), Fault> {
        let set = format!("(SELECT label_set_id FROM packhorse.label_version WHERE id = {id})");
        let hide = format!(
            "BEGIN; UPDATE packhorse.label_version SET state = 'removing', version = split_part(version, '{REMOVED_MARK}', 1) || '{REMOVED_MARK}' || id
             WHERE id = {id};
             DELETE FROM packhorse.label_active WHERE version_id = {id};
             DELETE FROM packhorse.label_switch WHERE version_id = {id};
             INSERT INTO packhorse.label_active (label_set_id, version_id)
             SELECT v.label_set_id, v.id FROM packhorse.label_version v
             LEFT JOIN packhorse.label_request r ON r.version_id = v.id
             WHERE v.state = 'ready' AND v.label_set_id = {set}
             ORDER BY coalesce(r.transfer, '') DESC, v.id DESC LIMIT 1 ON CONFLICT (label_set_id) DO NOTHING;
             INSERT INTO packhorse.label_switch (label_set_id, version_id, since)
             SELECT a.label_set_id, a.version_id, greatest(v.committed_at,
                 (SELECT max(s.until) FROM packhorse.label_switch s WHERE s.label_set_id = a.label_set_id))
             FROM packhorse.label_active a JOIN packhorse.label_version v ON v.id = a.version_id
             WHERE a.label_set_id = {set} AND NOT EXISTS
                 (SELECT 1 FROM packhorse.label_switch s WHERE s.label_set_id = a.label_set_id AND s.until = 'infinity');
             COMMIT"
        );
        self.run(conn, "hide the version", hide).await
    }

    /// Deletes the leftovers of earlier commits and removals of this set. Returns the version that is
    /// loaded with this digest and only waits for its switch.
    async fn drop_leftovers(
        &self,
        conn: &mut PgConnection,
        new: &NewVersion,
    ) -> Result<Option<i64>, Fault> {
        let query = sqlx::query_as::<_, (i64, String, String, String)>(
            "SELECT v.id, v.version, v.manifest_digest, v.state FROM packhorse.label_version v
             JOIN packhorse.label_set s ON s.id = v.label_set_id WHERE s.name = $1 AND v.state <> 'ready'",
        )
        .bind(&new.set);
        let rows = self
            .within(
                "look up leftovers",
                LABEL_STATEMENT_MAX,
                query.fetch_all(&mut *conn),
            )
            .await?;
        let mut loaded = None;
        for (id, version, digest, state) in rows {
            if state == LOADED && version == new.version && digest == new.digest.hex() {
                loaded = Some(id);
            } else {
                tracing::info!(label_set = %new.set, version = %version, state = %state, "deleting leftovers of an earlier attempt from the label database");
                self.drop_version(conn, id).await?;
            }
        }
        Ok(loaded)
    }

    /// Step 2 of the parent module's description.
    async fn copy_version(&self, conn: &mut PgConnection, new: &NewVersion) -> Result<i64, Fault> {
        let insert_set = sqlx::query(
            "INSERT INTO packhorse.label_set (name) VALUES ($1) ON CONFLICT (name) DO NOTHING",
        )
        .bind(&new.set);
        self.within(
            "add the label set",
            LABEL_STATEMENT_MAX,
            insert_set.execute(&mut *conn),
        )
        .await?;
        let insert = sqlx::query_scalar(
            "INSERT INTO packhorse.label_version (label_set_id, version, manifest_digest, state)
             SELECT id, $2, $3, 'loading' FROM packhorse.label_set WHERE name = $1 RETURNING id",
        )
        .bind(&new.set)
        .bind(&new.version)
        .bind(new.digest.hex());
        let id: i64 = self
            .within(
                "add the version",
                LABEL_STATEMENT_MAX,
                insert.fetch_one(&mut *conn),
            )
            .await?;
        self.fill(conn, new, id).await?;
        Ok(id)
    }

    /// Copies the rows of a version, in one transaction.
    async fn fill(&self, conn: &mut PgConnection, new: &NewVersion, id: i64) -> Result<(), Fault> {
        let begin = format!("BEGIN; {NO_TIME_LIMITS_HERE}");
        self.run(conn, "start the load", begin).await?;

        let dir = new.dir.clone();
        let sql = "COPY packhorse.label_class (version_id, class_id, name, attrs) FROM STDIN WITH (FORMAT binary)";
        let (copied, classes) = self
            .copy(conn, "copy the classes", sql, move |rows, send_batch| {
                read_classes(&dir, &mut |class| {
                    rows.row(4)
                        .int(id)
                        .int(class.id)
                        .text(class.name)
                        .opt_text(class.attrs);
                    rows.full().map_or(Ok(()), &mut *send_batch)
                })
            })
            .await?;
        new.check_count(Table::Classes, classes.len() as u64)?;
        self.check_all_copied(Table::Classes, classes.len() as u64, copied)?;

        let dir = new.dir.clone();
        let sql = "COPY packhorse.version_sample (version_id, sample_no, path, hash, width, height, split, meta) FROM STDIN WITH (FORMAT binary)";
        let (copied, samples) = self
            .copy(conn, "copy the samples", sql, move |rows, send_batch| {
                read_samples(&dir, &mut |no, sample| {
                    rows.row(8)
                        .int(id)
                        .int(no.cast_signed())
                        .text(sample.path)
                        .opt_text(sample.hash);
                    rows.opt_int(sample.width)
                        .opt_int(sample.height)
                        .opt_text(sample.split)
                        .opt_text(sample.meta);
                    rows.full().map_or(Ok(()), &mut *send_batch)
                })
            })
            .await?;
        new.check_count(Table::Samples, samples)?;
        self.check_all_copied(Table::Samples, samples, copied)?;

        let dir = new.dir.clone();
        let sql = "COPY packhorse.annotation (version_id, ann_no, sample_no, class_id, kind, x, y, w, h, geom, attrs, raw) FROM STDIN WITH (FORMAT binary)";
        let (copied, (annotations, rows_digest)) = self
            .copy(
                conn,
                "copy the annotations",
                sql,
                move |rows, send_batch| {
                    read_annotations(&dir, &classes, &mut |no, sample_no, row| {
                        rows.row(12)
                            .int(id)
                            .int(no.cast_signed())
                            .int(sample_no.cast_signed())
                            .opt_int(row.class)
                            .text(row.kind);
                        for value in row.bbox {
                            rows.opt_float(value);
                        }
                        rows.opt_text(row.geom).opt_text(row.attrs).text(row.raw);
                        rows.full().map_or(Ok(()), &mut *send_batch)
                    })
                },
            )
            .await?;
        new.check_count(Table::Annotations, annotations)?;
        self.check_all_copied(Table::Annotations, annotations, copied)?;

        let finish = format!(
            "UPDATE packhorse.label_version SET n_classes = {}, n_samples = {samples}, n_annotations = {annotations},
             rows_digest = '{rows_digest}', state = '{LOADED}' WHERE id = {id};
             COMMIT",
            new.info.classes
        );
        self.run(conn, "end the load", finish).await
    }

    fn check_all_copied(&self, table: Table, sent: u64, copied: u64) -> Result<(), Fault> {
        if sent == copied {
            return Ok(());
        }
        Err(Fault::integrity(format!(
            "{}: only {copied} of {sent} rows of {} were stored",
            self.place,
            table.file()
        )))
    }

    /// One COPY, encoded on a thread of the sink. Returns the row count of the server and the
    /// result of `work`. After any error the connection must be closed, because the driver cannot
    /// continue its COPY.
    async fn copy<R, W>(
        &self,
        conn: &mut PgConnection,
        what: &str,
        sql: &str,
        work: W,
    ) -> Result<(u64, R), Fault>
    where
        R: Send + 'static,
        W: FnOnce(&mut CopyRows, &mut dyn FnMut(Vec<u8>) -> Result<(), Fault>) -> Result<R, Fault>
            + Send
            + 'static,
    {
        let mut copy = self
            .within(what, LABEL_STATEMENT_MAX, conn.copy_in_raw(sql))
            .await?;
        let (mut batches, task): (mpsc::Receiver<Vec<u8>>, JoinHandle<_>) =
            pump(&self.threads, move |send_batch| {
                let mut rows = CopyRows::new(LABEL_BATCH_BYTES);
                let result = work(&mut rows, send_batch)?;
                send_batch(rows.finish())?;
                Ok(result)
            });
        while let Some(batch) = batches.recv().await {
            self.within(what, LABEL_SILENCE_MAX, copy.send(batch))
                .await?;
        }
        let result = join_thread(task).await?;
        let copied = self
            .within(what, LABEL_STATEMENT_MAX, copy.finish())
            .await?;
        Ok((copied, result))
    }

    /// Steps 3 and 4: the statistics, then the switch. Without statistics the planner does not
    /// recognise that one active version is a small part of all rows. Autovacuum ignores tables with
    /// few rows, and comes too late for the others. What another session analyses at the moment is
    /// passed over, because that session may hold its lock for long.
    ///
    /// The version becomes the active one unless that one was requested later, or, if it replaces a
    /// stored one, if that was the active one. The lock of the set covers both.
    async fn switch(
        &self,
        conn: &mut PgConnection,
        id: i64,
        new: &NewVersion,
        replaced: Option<Replaced>,
    ) -> Result<(), Fault> {
        let analyse = "ANALYZE (SKIP_LOCKED) packhorse.version_sample, packhorse.annotation";
        self.run(conn, "analyse the rows", analyse.into()).await?;
        let (was_active, requested) = match replaced {
            Some(replaced) => (Some(replaced.was_active), replaced.transfer),
            None => (None, None),
        };
        let what = "switch to the new version";
        let query = sqlx::query_scalar(
            "WITH added AS (INSERT INTO packhorse.label_request (version_id, transfer)
                 VALUES ($1, greatest($2, $3)) ON CONFLICT (version_id) DO UPDATE SET transfer = EXCLUDED.transfer
                 RETURNING transfer)
             SELECT coalesce((SELECT coalesce($4, coalesce(r.transfer, '') <= added.transfer)
                 FROM packhorse.label_version v JOIN packhorse.label_active a ON a.label_set_id = v.label_set_id
                 LEFT JOIN packhorse.label_request r ON r.version_id = a.version_id WHERE v.id = $1), true)
             FROM added",
        )
        .bind(id)
        .bind(new.transfer.as_str())
        .bind(requested)
        .bind(was_active);
        let is_newest: bool = self
            .within(what, LABEL_STATEMENT_MAX, query.fetch_one(&mut *conn))
            .await?;
        let activation = if is_newest {
            activation(id)
        } else {
            String::new()
        };
        let sql = format!(
            "BEGIN; UPDATE packhorse.label_version SET state = 'ready', committed_at = now() WHERE id = {id}; {activation}; COMMIT;
             ANALYZE (SKIP_LOCKED) packhorse.label_set, packhorse.label_version, packhorse.label_active, packhorse.label_switch,
             packhorse.label_class"
        );
        self.run(conn, what, sql).await
    }

    /// Makes a version that the views show the active one.
    pub(super) async fn activate_version(
        &self,
        conn: &mut PgConnection,
        id: i64,
    ) -> Result<(), Fault> {
        self.run(
            conn,
            "switch the active version",
            format!("BEGIN; {}; COMMIT", activation(id)),
        )
        .await
    }

    pub(super) async fn load_on(
        &self,
        conn: &mut PgConnection,
        new: &NewVersion,
    ) -> Result<(), Fault> {
        self.lock_set(conn, &new.set).await?;
        let mut replaced = None;
        if let Some((id, held)) = self.held_on(conn, &new.set, &new.version).await? {
            if held.digest != new.digest.hex() {
                return Err(new.conflict(&held.digest));
            }
            if !new.replaces {
                return Ok(());
            }
            replaced = Some(self.replaced(conn, id).await?);
            self.hide_version(conn, id).await?;
        }
        let id = match self.drop_leftovers(conn, new).await? {
            Some(id) => id,
            None => self.copy_version(conn, new).await?,
        };
        self.switch(conn, id, new, replaced).await
    }

    /// What is known of a version before it is hidden.
    async fn replaced(&self, conn: &mut PgConnection, id: i64) -> Result<Replaced, Fault> {
        let query = sqlx::query_as(
            "SELECT EXISTS (SELECT FROM packhorse.label_active WHERE version_id = $1),
             (SELECT transfer FROM packhorse.label_request WHERE version_id = $1)",
        )
        .bind(id);
        let (was_active, transfer) = self
            .within(
                "look up the version",
                LABEL_STATEMENT_MAX,
                query.fetch_one(conn),
            )
            .await?;
        Ok(Replaced {
            was_active,
            transfer,
        })
    }

    /// Cleans up after a load that failed permanently, on a new connection. Best effort: the next
    /// commit deletes what remains.
    pub(super) async fn drop_leftovers_after_failure(&self, new: &NewVersion) -> Result<(), Fault> {
        let mut conn = self.connect().await?;
        self.lock_set(&mut conn, &new.set).await?;
        self.drop_leftovers(&mut conn, new).await?;
        self.close(conn).await;
        Ok(())
    }
}
