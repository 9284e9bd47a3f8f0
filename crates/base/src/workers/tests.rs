#![expect(clippy::panic, reason = "workers that panic are what is tested")]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;

fn workers() -> (Workers, CancellationToken) {
    let stop = CancellationToken::new();
    (Workers::new(stop.clone()), stop)
}

fn report(workers: &Workers, name: &str) -> Report {
    workers
        .list()
        .into_iter()
        .find(|report| report.name == name)
        .unwrap()
}

/// Lets all tasks run until each of them waits for something, without moving the clock.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_panics_is_restarted_after_growing_pauses_and_shown_while_others_continue() {
    let (workers, _stop) = workers();
    let starts = Arc::new(AtomicU32::new(0));
    let counted = starts.clone();
    workers.start("breaks", Pace::on_request(), &(), move |(), worker| {
        let nth = counted.fetch_add(1, Ordering::SeqCst);
        async move {
            if nth < 3 {
                std::panic::panic_any(format!("disk {nth} is gone"));
            }
            let _ = worker.iterate(async { Ok(()) }).await;
            std::future::pending().await
        }
    });
    workers.repeat("sound", Duration::from_millis(100), &(), |()| async {
        Ok(())
    });
    settle().await;
    let failed = report(&workers, "breaks");
    assert_eq!(
        (failed.state, failed.errors, failed.restarts),
        (State::Failed, 1, 0)
    );
    let error = failed.last_error.unwrap();
    assert!(
        error.fault.message.contains("panicked: disk 0 is gone") && error.at_ms > 0,
        "{error:?}"
    );
    let lines = workers.doctor();
    assert!(
        lines.len() == 2 && lines[0].starts_with("fault worker breaks: it ended"),
        "{lines:?}"
    );
    assert!(
        lines[0].contains("disk 0 is gone") && lines[0].contains("restarted by itself"),
        "{lines:?}"
    );
    // The pauses are 1, 2 and 4 s.
    let mut began = Vec::new();
    let first = Instant::now();
    for nth in 2..=4 {
        while starts.load(Ordering::SeqCst) < nth {
            sleep(Duration::from_millis(50)).await;
        }
        began.push(first.elapsed().as_secs());
    }
    assert_eq!(began, [1, 3, 7]);
    settle().await;
    let restarted = report(&workers, "breaks");
    assert_eq!(
        (restarted.state, restarted.errors, restarted.restarts),
        (State::Idle, 3, 3)
    );
    assert_eq!((restarted.iterations, restarted.problem), (1, None));
    assert!(
        restarted.last_error.is_some(),
        "the past error is still shown"
    );
    let sound = report(&workers, "sound");
    assert!(sound.iterations >= 65 && sound.errors == 0, "{sound:?}");
    let lines = workers.doctor();
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].starts_with("ok workers: 2 background workers: ") && lines[0].contains("sound "),
        "{lines:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn the_pause_before_a_restart_is_bounded_and_short_again_after_a_long_time_without_a_failure()
{
    let (workers, _stop) = workers();
    let (starts, lasts) = (
        Arc::new(Mutex::new(Vec::new())),
        Arc::new(AtomicBool::new(false)),
    );
    let (noted, long) = (starts.clone(), lasts.clone());
    workers.start("returns", Pace::Continuous, &(), move |(), _| {
        noted.lock().push(Instant::now());
        let long = long.load(Ordering::SeqCst);
        async move {
            if long {
                sleep(Duration::from_secs(600)).await;
            }
            Ok(())
        }
    });
    sleep(Duration::from_secs(1000)).await;
    let pauses: Vec<u64> = starts
        .lock()
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs())
        .collect();
    assert_eq!(pauses[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
    assert!(
        report(&workers, "returns")
            .last_error
            .unwrap()
            .fault
            .message
            .contains("it returned")
    );
    lasts.store(true, Ordering::SeqCst);
    sleep(Duration::from_secs(700)).await;
    let starts = starts.lock();
    let (before, last) = (starts[starts.len() - 2], starts[starts.len() - 1]);
    assert_eq!(
        (last - before).as_secs(),
        601,
        "it worked for 600 s and was restarted after 1 s"
    );
}

#[tokio::test(start_paused = true)]
async fn work_that_is_complete_has_ended_and_a_failed_try_is_repeated() {
    let (workers, _stop) = workers();
    let tries = Arc::new(AtomicU32::new(0));
    workers.start_until_done("rebuild", Pace::on_request(), &tries, |tries| async move {
        if tries.fetch_add(1, Ordering::SeqCst) == 0 {
            Err(Fault::no_space("the disk is full"))
        } else {
            Ok(())
        }
    });
    settle().await;
    let failed = report(&workers, "rebuild");
    assert_eq!((failed.state, failed.errors), (State::Failed, 1));
    assert!(
        failed
            .problem
            .unwrap()
            .starts_with("its last iteration failed")
    );
    sleep(Duration::from_secs(2)).await;
    let done = report(&workers, "rebuild");
    assert_eq!(
        (done.state, done.iterations, done.errors, done.problem),
        (State::Ended, 2, 1, None)
    );
    timeout(Duration::from_secs(1), workers.stopped())
        .await
        .expect("nothing is left to wait for");
}

#[tokio::test(start_paused = true)]
async fn a_failed_iteration_is_shown_until_one_succeeds_and_logged_once() {
    let (log, _captured) = crate::tally::Log::capture();
    let (workers, _stop) = workers();
    let full = Arc::new(AtomicBool::new(true));
    workers.repeat("flush", Duration::from_secs(1), &full, |full| async move {
        if full.load(Ordering::SeqCst) {
            Err(Fault::no_space("/data: the disk is full"))
        } else {
            Ok(())
        }
    });
    sleep(Duration::from_millis(4500)).await;
    let failed = report(&workers, "flush");
    assert_eq!(
        (
            failed.state,
            failed.iterations,
            failed.errors,
            failed.restarts
        ),
        (State::Failed, 5, 5, 0)
    );
    let lines = workers.doctor();
    assert!(
        lines[0].starts_with("fault worker flush: its last iteration failed"),
        "{lines:?}"
    );
    assert!(
        lines[0].ends_with(&format!(
            "/data: the disk is full; {}",
            Fault::no_space("").next
        )),
        "{lines:?}"
    );
    assert_eq!(log.lines_with("a background worker failed").len(), 1);
    full.store(false, Ordering::SeqCst);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(
        (
            report(&workers, "flush").state,
            workers.doctor()[0].starts_with("ok ")
        ),
        (State::Idle, true)
    );
    assert_eq!(log.lines_with("works again").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_late_or_whose_iteration_does_not_end_is_reported() {
    let (workers, _stop) = workers();
    workers.start(
        "late",
        Pace::every(Duration::from_secs(10)),
        &(),
        |(), worker| async move {
            let _ = worker.iterate(async { Ok(()) }).await;
            std::future::pending().await
        },
    );
    workers.start("stuck", Pace::on_request(), &(), |(), worker| async move {
        worker.iterate(std::future::pending()).await
    });
    workers.start(
        "reads-much",
        Pace::on_request().long(),
        &(),
        |(), worker| async move { worker.iterate(std::future::pending()).await },
    );
    workers.start("serves", Pace::Continuous, &(), |(), _| {
        std::future::pending()
    });
    sleep(Duration::from_secs(10)).await;
    let states: Vec<State> = workers
        .list()
        .into_iter()
        .map(|worker| worker.state)
        .collect();
    assert_eq!(
        states,
        [State::Idle, State::Busy, State::Busy, State::Running]
    );
    assert_eq!(
        workers.doctor(),
        [
            "ok workers: 4 background workers: late idle, stuck busy, reads-much busy, serves running"
        ]
    );
    sleep(WORKER_BUSY_MAX + WORKER_LATE_AFTER).await;
    let lines = workers.doctor();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(
        lines[0].starts_with("fault worker late: it has not started an iteration for"),
        "{lines:?}"
    );
    assert!(lines[0].contains("every 10 s"), "{lines:?}");
    assert!(
        lines[1].starts_with("fault worker stuck: its current iteration has not ended for"),
        "{lines:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn when_the_daemon_stops_the_iterations_in_progress_end_and_no_other_begins() {
    let (workers, stop) = workers();
    let (finished, closed) = (
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    workers.repeat("quick", Duration::ZERO, &finished, |finished| async move {
        sleep(Duration::from_millis(500)).await;
        finished.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    workers.repeat("waits", Duration::from_secs(3600), &(), |()| async {
        Ok(())
    });
    workers.start(
        "serves",
        Pace::Continuous,
        &closed,
        |closed, worker| async move {
            worker.stop().cancelled().await;
            sleep(Duration::from_secs(1)).await;
            closed.store(true, Ordering::SeqCst);
            Ok(())
        },
    );
    sleep(Duration::from_millis(100)).await;
    stop.cancel();
    let began = Instant::now();
    workers.stopped().await;
    assert_eq!(
        finished.load(Ordering::SeqCst),
        1,
        "the iteration in progress ended, and no other began"
    );
    assert!(
        closed.load(Ordering::SeqCst) && began.elapsed() < Duration::from_millis(1100),
        "{:?}",
        began.elapsed()
    );
    assert!(
        workers
            .list()
            .iter()
            .all(|worker| worker.state == State::Ended && worker.errors == 0)
    );
    assert!(workers.unfinished().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_hangs_does_not_keep_the_daemon_from_stopping() {
    let (workers, stop) = workers();
    workers.repeat("hangs", Duration::from_secs(1), &(), |()| {
        std::future::pending()
    });
    settle().await;
    stop.cancel();
    let began = Instant::now();
    settle().await;
    assert_eq!(workers.unfinished(), ["hangs"]);
    workers.stopped().await;
    assert_eq!(began.elapsed(), WORKER_STOP_MAX);
}

#[test]
fn a_thread_reports_a_panic_in_an_iteration_and_continues() {
    let workers = Workers::new(CancellationToken::new());
    let worker = workers.register("thread", Pace::on_request());
    let thread = std::thread::spawn(move || {
        let failed = worker
            .iterate_blocking(|| -> Result<(), Fault> { std::panic::panic_any("a full disk") });
        let again = worker.iterate_blocking(|| Ok(7));
        worker.end();
        (failed, again)
    });
    let (failed, again) = thread.join().unwrap();
    assert!(failed.unwrap_err().message.contains("a full disk"));
    assert_eq!(again, Ok(7));
    let report = report(&workers, "thread");
    assert_eq!(
        (report.state, report.iterations, report.errors),
        (State::Ended, 2, 1)
    );
}
