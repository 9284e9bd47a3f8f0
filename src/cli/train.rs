//! `train`: training runs, and their text form.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use tokio::time::Instant;

use super::args::{Global, Output, Wait};
use super::client::Client;
use super::follow::{Deadline, Progress, patiently};
use super::human;
use super::output::{self, Cell, Table, emit, fields, one, rows};
use crate::api::types::{Run, RunActionRequest, RunRequest, RunState, RunVerb};
use crate::config;
use crate::trainer;
use base::fault::{Code, Fault, Retry};
use base::limits::DAEMON_AWAY_MAX;

/// The longest wait of one request for the end of a run.
const LOOK_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Subcommand)]
pub(super) enum TrainCommand {
    /// Start a run: the inputs are delivered to the training site, and the model is delivered back.
    #[command(
        after_help = "Example:\n  packhorse train start --name line3-7 --from chengdu --on xian --expect model/line3 --input dataset/line3:v1 operator/adc:v2"
    )]
    Start(TrainStart),
    /// List the runs.
    #[command(after_help = "Example:\n  packhorse train list")]
    List,
    /// Show one run: its inputs, its trainer, its model.
    #[command(after_help = "Example:\n  packhorse train show line3-7")]
    Show {
        /// The run's name.
        run: String,
    },
    /// Report that the training platform has finished a run.
    #[command(
        after_help = "Examples:\n  packhorse train finish line3-7\n  packhorse train finish line3-7 --failed timeout"
    )]
    Finish {
        /// The run's name.
        run: String,
        /// The run failed, for this reason.
        #[arg(long, value_name = "WHY")]
        failed: Option<String>,
    },
    /// Cancel a run: stop its trainer and remove the borrowed inputs.
    #[command(after_help = "Example:\n  packhorse train cancel line3-7")]
    Cancel {
        /// The run's name.
        run: String,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct TrainStart {
    /// A unique name for the run: [a-z0-9][a-z0-9._-]*.
    #[arg(long, value_name = "RUN")]
    name: String,
    /// The site that borrows the trainer and receives the model.
    #[arg(long, value_name = "SITE")]
    from: String,
    /// The site that trains.
    #[arg(long, value_name = "SITE")]
    on: String,
    /// An input of the training: KIND/NAME:VERSION; one or more.
    #[arg(long = "input", value_name = "REF", required = true, num_args = 1..)]
    inputs: Vec<String>,
    /// The model that the run makes; without a version, the name of the run is the version.
    #[arg(long, value_name = "model/NAME[:VERSION]")]
    expect: String,
    /// The time limit for making the model.
    #[arg(long, default_value = "7d", value_name = "DURATION", value_parser = config::parse_duration)]
    ttl: Duration,
    #[command(flatten)]
    wait: Wait,
}

/// The hidden command `trainer`, which the daemon of a site starts for a run.
#[derive(Debug, clap::Args)]
pub(super) struct Trainer {
    /// Replace this process by the command, which ends together with the process that started it.
    #[arg(long)]
    exec: bool,
    /// The directory of the run; with --exec, the command.
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

impl Trainer {
    pub(super) fn run(self) -> Result<(), Fault> {
        if self.exec {
            return Err(trainer::become_trainer(&self.rest));
        }
        trainer::watch(Path::new(&PathBuf::from(self.rest.concat())))
    }
}

/// `train …`
pub(super) async fn run(global: &Global, command: TrainCommand) -> Result<(), Fault> {
    let client = Client::new(global)?;
    let act = async |name: String, action, failed| -> Result<(), Fault> {
        let run: Run = client
            .post(
                "/v1/runs/action",
                &RunActionRequest {
                    name,
                    action,
                    failed,
                },
            )
            .await?;
        one(global.output, &run, detail)
    };
    match command {
        TrainCommand::Start(start) => self::start(&client, global, start).await,
        TrainCommand::List => {
            let runs: Vec<Run> = client.get("/v1/runs", &()).await?;
            rows(global.output, &runs, |runs| table(runs, output::colour()))
        }
        TrainCommand::Show { run } => {
            let run: Run = client.get("/v1/runs/show", &[("name", run)]).await?;
            one(global.output, &run, detail)
        }
        TrainCommand::Finish { run, failed } => act(run, RunVerb::Finish, failed).await,
        TrainCommand::Cancel { run } => act(run, RunVerb::Cancel, None).await,
    }
}

async fn start(client: &Client, global: &Global, start: TrainStart) -> Result<(), Fault> {
    let deadline = Deadline::after(start.wait.timeout);
    let request = RunRequest {
        name: start.name,
        from: start.from,
        on: start.on,
        inputs: start.inputs,
        expect: start.expect,
        ttl_seconds: start.ttl.as_secs(),
    };
    let run: Run = client.post("/v1/runs", &request).await?;
    if !start.wait.wait {
        return one(global.output, &run, |run| {
            format!(
                "run {} is {}\n{}",
                run.name,
                run.state.as_str(),
                detail(run)
            )
        });
    }
    let run = follow(client, run, deadline).await?;
    match global.output {
        Output::Table => emit(&detail(&run))?,
        _ => one(global.output, &run, detail)?,
    }
    verdict(&run)
}

/// Waits for the end of a run.
async fn follow(client: &Client, mut run: Run, deadline: Deadline) -> Result<Run, Fault> {
    let progress = Progress::new();
    let mut printed = None;
    loop {
        let now = (run.state, run.message.clone());
        if printed.as_ref() != Some(&now) {
            let why = run
                .message
                .as_deref()
                .map(|m| format!(": {}", human::clean(m)))
                .unwrap_or_default();
            progress.say(&format!("run {} is {}{why}", run.name, run.state.as_str()));
            printed = Some(now);
        }
        if run.state.is_final() {
            return Ok(run);
        }
        if deadline.passed() {
            return Err(Fault::deadline(format!(
                "run {} is still {}",
                run.name,
                run.state.as_str()
            ))
            .with_next(format!(
                "see 'packhorse train show {}'; the run continues",
                run.name
            )));
        }
        // Short waits, so that each state is reported.
        let wait = deadline.cap(LOOK_MAX).min(Duration::from_secs(1));
        let query = [
            ("name", run.name.to_string()),
            ("wait", wait.as_secs().to_string()),
        ];
        let began = Instant::now();
        run = patiently(&progress, deadline, DAEMON_AWAY_MAX, || {
            client.get_within("/v1/runs/show", &query, wait)
        })
        .await?;
        if began.elapsed() < Duration::from_millis(100) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// The result of a command that waited for a run.
fn verdict(run: &Run) -> Result<(), Fault> {
    if run.state == RunState::Done {
        return Ok(());
    }
    let why = run.message.clone().unwrap_or_else(|| "no message".into());
    let fault = Fault::internal(format!("run {} is {}: {why}", run.name, run.state.as_str()))
        .with_retry(Retry::Never);
    Err(Fault {
        code: Code::Partial,
        ..fault
    }
    .with_next(run.next.clone().unwrap_or_default()))
}

/// The table of `train list`.
pub(super) fn table(runs: &[Run], colour: bool) -> String {
    if runs.is_empty() {
        return "no runs\n".into();
    }
    let mut table = Table::new(&["RUN", "FROM", "ON", "STATE", "MODEL", "BEGAN", "WHY"]);
    for run in runs {
        let model = run
            .model
            .as_ref()
            .map_or_else(|| run.expect.clone(), |m| m.artifact.clone());
        table.row(vec![
            run.name.as_str().into(),
            run.from.as_str().into(),
            run.on.as_str().into(),
            Cell::from(run.state.as_str()),
            model.into(),
            human::local(&run.created_at).into(),
            run.message.as_deref().unwrap_or("-").into(),
        ]);
    }
    table.render(colour)
}

/// All fields of one run.
pub(super) fn detail(run: &Run) -> String {
    let mut pairs = vec![
        ("run", run.name.to_string()),
        ("from", run.from.to_string()),
        ("on", run.on.to_string()),
        ("state", run.state.as_str().into()),
    ];
    let mut add = |name, value: Option<String>| pairs.extend(value.map(|v| (name, v)));
    add("message", run.message.clone());
    add("next", run.next.clone());
    add("expects", Some(run.expect.clone()));
    add(
        "model",
        run.model
            .as_ref()
            .map(|m| format!("{} ({})", m.artifact, m.digest)),
    );
    for input in &run.inputs {
        add(
            "input",
            Some(format!(
                "{} ({}, {})",
                input.artifact,
                human::bytes(input.bytes),
                input.digest
            )),
        );
    }
    add("delivery", Some(run.delivery.clone()));
    add("home", run.home.clone());
    if let Some(trainer) = &run.trainer {
        add(
            "trainer",
            Some(
                trainer
                    .message
                    .clone()
                    .unwrap_or_else(|| trainer.phase.clone()),
            ),
        );
        add("exit code", trainer.exit_code.map(|code| code.to_string()));
        add(
            "starts",
            (trainer.starts > 1).then(|| trainer.starts.to_string()),
        );
        add("started", trainer.started_at.as_deref().map(human::local));
        add("ended", trainer.ended_at.as_deref().map(human::local));
    }
    add(
        "borrowed",
        run.state.is_final().then(|| {
            if run.released {
                "removed"
            } else {
                "being removed"
            }
            .into()
        }),
    );
    add("created", Some(human::local(&run.created_at)));
    add("deadline", Some(human::local(&run.deadline_at)));
    add("finished", run.finished_at.as_deref().map(human::local));
    let mut out = fields(&pairs);
    if let Some(tail) = run
        .trainer
        .as_ref()
        .and_then(|t| t.tail.as_deref())
        .filter(|tail| !tail.is_empty())
    {
        out.push_str(&format!(
            "\nlast output of the trainer:\n    {}\n",
            human::clean_lines(tail)
        ));
    }
    out
}
