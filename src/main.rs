//! `packhorse`: the daemon at the hub and at every site, and the command line for both.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use packhorse::cli;

fn main() -> ExitCode {
    let args = cli::Args::parse();
    cli::init_log(&args);
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
    let code = runtime.block_on(cli::run(args));
    // A thread that is blocked by a NAS that does not answer must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_secs(2));
    code
}
