//! `packhorse`: the daemon at the hub and at every site, and the command line for both.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use packhorse::cli;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The exit code of a command that SIGHUP ended.
const HUNG_UP: i32 = 129;

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let hangup = early_hangup(&runtime);
    let args = cli::Args::parse();
    cli::init_log(&args);
    if let Some(mut hangup) = hangup.filter(|_| !args.is_daemon()) {
        runtime.spawn(async move {
            hangup.recv().await;
            std::process::exit(HUNG_UP);
        });
    }
    let code = runtime.block_on(cli::run(args));
    // A thread that is blocked by a NAS that does not answer must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_secs(2));
    code
}

/// Takes SIGHUP before anything else is done, if this may be a daemon: a SIGHUP that arrives before the
/// daemon reloads at it must not end the process.
fn early_hangup(runtime: &Runtime) -> Option<Signal> {
    let _entered = runtime.enter();
    std::env::args_os()
        .any(|argument| argument == "serve")
        .then(|| signal(SignalKind::hangup()).ok())?
}
