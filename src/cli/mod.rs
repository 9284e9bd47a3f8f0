//! The command line: parses the arguments, calls the daemon's API, prints the answer, and ends with
//! an exit code of the table.
//!
//! `serve`, `join` and `quickstart` run code of the daemon. Nearly all other commands are clients
//! without state of their own, so that it is safe to kill any command and to run it again. Results
//! go to stdout, progress and errors to stderr.

mod access;
mod args;
pub(crate) mod client;
mod commands;
mod follow;
pub(crate) mod human;
mod list;
mod manual;
mod members;
pub(crate) mod output;
mod remote;
mod status;
pub(crate) mod tracker;
mod train;
mod watch;

#[cfg(test)]
mod tests;

pub use args::Args;

use std::io::IsTerminal;
use std::process::ExitCode;

use args::{Command, ConfigCommand, Output, StoreCommand, TokenCommand};
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::format;

use crate::api::ErrorBody;
use crate::log_filter;
use base::fault::Fault;
use base::limits::LOG_FIELD_BYTES_MAX;
use base::text;

/// Sends the log to stderr. `PACKHORSE_LOG` filters it with the syntax of `RUST_LOG`. By default a
/// daemon logs its work, and a command only warnings and errors.
pub fn init_log(args: &Args) {
    let default = if args.command.is_daemon() {
        log_filter::OF_DAEMON
    } else {
        "warn"
    };
    let wanted = log_filter::of_environment();
    let filter = log_filter::parse(wanted.as_deref().unwrap_or(default)).unwrap_or_else(|error| {
        output::note(&format!(
            "warning: PACKHORSE_LOG is not a valid filter ({error}); it is ignored"
        ));
        tracing_subscriber::EnvFilter::new(log_filter::expanded(default))
    });
    let colour = std::io::stderr().is_terminal() && human::colour_wanted();
    // One event is one line, even if the text of a peer, a file name or a server contains line
    // breaks.
    let fields = format::debug_fn(|writer, field, value| {
        let text = log_text(&format!("{value:?}"));
        match field.name() {
            "message" => write!(writer, "{text}"),
            name => write!(writer, "{name}={text}"),
        }
    });
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colour)
        .with_writer(std::io::stderr);
    let log = log
        .fmt_fields(fields.delimited(" "))
        .with_filter_reloading();
    let handle = log.reload_handle();
    // The log is set once per process; a second call (in tests) has no effect.
    if log.try_init().is_ok() {
        log_filter::keep(Box::new(move |filter| {
            handle.reload(filter).map_err(|error| error.to_string())
        }));
    }
}

/// The form of a value in the log.
fn log_text(text: &str) -> String {
    text::line(
        &text.replace('\n', "\\n").replace('\t', " "),
        LOG_FIELD_BYTES_MAX,
    )
}

/// Executes the command and returns the exit code of the process.
pub async fn run(args: Args) -> ExitCode {
    let format = args.global.output;
    match dispatch(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            output::note(render_error(&fault, format).trim_end_matches('\n'));
            ExitCode::from(fault.code.exit())
        }
    }
}

async fn dispatch(args: Args) -> Result<(), Fault> {
    let global = &args.global;
    match args.command {
        Command::Quickstart { dir, once } => Box::pin(crate::quickstart::run(dir, once)).await,
        Command::Serve { until_stdin_ends } => {
            Box::pin(crate::serve::run(global.load_config()?, until_stdin_ends)).await
        }
        Command::Join { hub, token } => commands::join(global, &hub, &token).await,
        Command::Config(ConfigCommand::Check) => commands::config_check(global),
        Command::Token(TokenCommand::Create(create)) => {
            commands::token_create(global, create).await
        }
        Command::Access(command) => access::run(global, command).await,
        Command::Publish(publish) => commands::publish(global, *publish).await,
        Command::Deliver(deliver) => commands::deliver(global, deliver).await,
        Command::Status(status) => commands::status(global, status).await,
        Command::Artifacts => commands::artifacts(global).await,
        Command::Show { artifact } => commands::show(global, &artifact).await,
        Command::Sites => commands::sites(global).await,
        Command::Site(command) => members::site(global, command).await,
        Command::Publisher(command) => members::publisher(global, command).await,
        Command::Pause { transfer } => {
            commands::act(global, transfer, crate::api::types::Action::Pause).await
        }
        Command::Resume { transfer } => {
            commands::act(global, transfer, crate::api::types::Action::Resume).await
        }
        Command::Cancel { id } => commands::cancel(global, id).await,
        Command::Jobs => commands::jobs(global).await,
        Command::Retry { transfer } => {
            commands::act(global, transfer, crate::api::types::Action::Retry).await
        }
        Command::Train(command) => train::run(global, command).await,
        Command::Trainer(trainer) => trainer.run(),
        Command::SampleTrainer { descriptor } => crate::quickstart::train(&descriptor),
        Command::Plan { artifacts, to } => commands::plan(global, artifacts, to).await,
        Command::Verify {
            artifact,
            repair,
            quick,
        } => commands::verify(global, artifact, repair, quick).await,
        Command::Pin { artifact } => commands::pin(global, artifact, true).await,
        Command::Unpin { artifact } => commands::pin(global, artifact, false).await,
        Command::ExportLabels {
            artifact,
            format,
            out,
        } => commands::export_labels(global, artifact, format, &out).await,
        Command::Export { artifacts, out } => commands::export(global, artifacts, &out).await,
        Command::Import { file } => commands::import(global, &file).await,
        Command::Adopt => commands::adopt(global).await,
        Command::Gc => commands::gc(global).await,
        Command::Store(StoreCommand::RebuildIndex) => commands::rebuild_index(global).await,
        Command::Doctor => commands::doctor(global).await,
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { dir } => manual::man(global, &dir),
    }
}

/// The text of an error and its next step. With a JSON format, one line of JSON with the same
/// content follows.
fn render_error(fault: &Fault, format: Output) -> String {
    let mut text = format!("error: {}\n", human::clean_lines(&fault.message));
    if !fault.next.is_empty() {
        text.push_str(&format!("  next: {}\n", human::clean_lines(&fault.next)));
    }
    if format != Output::Table {
        text.push_str(&ErrorBody::from(fault).to_json());
        text.push('\n');
    }
    text
}
