//! `mini-vmm preflight`: asks before a migration, and shows the answer.

use std::time::Duration;

use clap::Args;
use indicatif::HumanBytes;
use migration::forecast::Forecast;
use migration::params::Parameters;
use migration::problem::Problem;
use migration::source::{Preflight, Rehearsal};
use serde_json::{Value, json};

use super::{CliError, VmArg, checked_uri};
use crate::client::ClientError;
use crate::config::{HumanDuration, MigrationUri, Rate};

pub(super) const EXAMPLES: &str = "\
Examples:
  mini-vmm preflight --vm web tcp:other-host:7000              everything that stands against it
  mini-vmm preflight --vm web tcp:other-host:7000 --sample 5s  ... and a better forecast
  mini-vmm preflight --vm web tcp:other-host:7000 --json | jq -r '.problems[].code'
  mini-vmm preflight --vm web tcp:other-host:7000 --rehearse   ... and is its state loaded there?
  mini-vmm preflight --vm web --qemu                           what stands against any QEMU; nobody is asked
  mini-vmm preflight --vm web tcp:other-host:7000 && mini-vmm migrate --vm web tcp:other-host:7000
docs/preflight.md explains every code.
";

#[derive(Debug, Args)]
pub(super) struct PreflightArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Where a mini-vmm waits: tcp:HOST:PORT or unix:PATH
    #[arg(required_unless_present = "qemu")]
    uri: Option<String>,
    /// What stands against moving to a QEMU, which can't be asked: nobody is
    #[arg(long, conflicts_with_all = ["uri", "sample", "downtime", "bandwidth", "rehearse"])]
    qemu: bool,
    /// For how long the guest's writes are watched, for the forecast; 0s leaves the forecast out
    #[arg(long, value_name = "TIME", default_value = "1s")]
    sample: HumanDuration,
    /// How long the guest may stand still [default: 300ms]
    #[arg(long, value_name = "TIME")]
    downtime: Option<HumanDuration>,
    /// The most to send in a second while the guest runs [default: no limit]
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<Rate>,
    /// Load the state of devices and vCPUs there, for show: the guest stands still for about a millisecond
    #[arg(long)]
    rehearse: bool,
    /// The answer as JSON
    #[arg(long)]
    json: bool,
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn preflight(args: &PreflightArgs) -> Result<(), CliError> {
    let Some(uri) = &args.uri else {
        return ask(&args.vm, json!({ "qemu": true }), "a QEMU".into(), args.json);
    };
    let uri = checked_uri(uri)?.to_string();
    let known = Parameters::default();
    let question = json!({
            "uri": uri,
            "sample": ms(args.sample.0),
            "rehearse": args.rehearse,
            // What an earlier migration was told is not meant for this one.
            "downtime-limit": ms(args.downtime.map_or(known.downtime_limit, |time| time.0)),
            "max-bandwidth": args.bandwidth.map_or(known.max_bandwidth, |rate| rate.0),
            "x-timeout": 0,
            "x-on-timeout": "cancel",
    });
    ask(&args.vm, question, uri, args.json)
}

/// `mini-vmm migrate --rehearse`: what a migration with these parameters would come to.
pub(super) fn rehearse(
    vm: &VmArg,
    mut parameters: Value,
    uri: &MigrationUri,
    json: bool,
) -> Result<(), CliError> {
    let uri = uri.to_string();
    parameters["uri"] = uri.clone().into();
    parameters["rehearse"] = true.into();
    ask(vm, parameters, uri, json)
}

fn ask(vm: &VmArg, question: Value, uri: String, json: bool) -> Result<(), CliError> {
    let mut client = vm.connect()?;
    let answer = client.execute("x-mini-vmm-preflight", question);
    let answer = answer.map_err(|error| not_asked(error, json))?;
    let shown = answer.clone();
    let answer: Preflight = serde_json::from_value(answer).map_err(CliError::Answer)?;
    if json {
        print_json(&shown);
    } else {
        print!("{}", table(&answer));
    }
    if answer.would_move { Ok(()) } else { Err(CliError::WouldNotMove(uri)) }
}

/// Nobody could be asked. A program that reads JSON gets some all the same.
fn not_asked(error: ClientError, json: bool) -> CliError {
    let error = match error {
        ClientError::Refused { class, .. } if class == "CommandNotFound" => CliError::CannotAsk,
        error => error.into(),
    };
    if json {
        print_json(&json!({ "would-move": null, "error": crate::error_chain(&error) }));
    }
    error
}

fn print_json(answer: &Value) {
    println!("{answer:#}");
}

/// The answer for people.
fn table(answer: &Preflight) -> String {
    let mut text = String::new();
    let width = answer.problems.iter().map(|p| p.code.len()).max().unwrap_or(0);
    for problem in &answer.problems {
        text += &row(problem, width);
    }
    if answer.left_out > 0 {
        text += &format!("… and {} more than the destination could list\n", answer.left_out);
    }
    let fatal = answer.problems.iter().filter(|p| p.fatal).count();
    let warnings = answer.problems.len() - fatal;
    text += &match (answer.would_move, warnings) {
        (true, 0) => format!("the VM would move: {} has nothing against it\n", answer.destination),
        (true, n) => format!("the VM would move to {}, with {n} warning(s)\n", answer.destination),
        (false, _) => format!(
            "the VM would not move to {}: {fatal} problem(s), {warnings} warning(s)\n",
            answer.destination
        ),
    };
    if let Some(forecast) = &answer.forecast {
        text += &told(forecast);
    }
    if let Some(rehearsal) = &answer.rehearsal {
        text += &rehearsed(rehearsal);
    }
    text
}

fn row(problem: &Problem, width: usize) -> String {
    let Problem { code, what, expected, found, hint, known_as, .. } = problem;
    let mark = if problem.fatal { "FATAL  " } else { "warning" };
    let indent = " ".repeat(width + 10);
    let mut text = format!("{mark} {code:width$}  {what}\n");
    text += &format!("{indent}destination: {expected}\n{indent}source:      {found}\n");
    if !hint.is_empty() {
        text += &format!("{indent}what to do:  {hint}\n");
    }
    if !known_as.is_empty() {
        text += &format!("{indent}known as:    {known_as}\n");
    }
    text
}

fn rehearsed(r: &Rehearsal) -> String {
    let ms = |us: u64| format!("{:.2} ms", us as f64 / 1e3);
    let loaded = match r.loaded {
        true => format!(
            "loaded there and thrown away again; {} are the same there",
            r.compared_sections
        ),
        false => "not loaded there".into(),
    };
    format!(
        "rehearsal: the guest stood still for {}; {} sections with {} were {loaded}, in {}\n",
        ms(r.pause_us),
        r.sections,
        HumanBytes(r.bytes),
        ms(r.load_us),
    )
}

fn told(f: &Forecast) -> String {
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1e3);
    let mut text = format!(
        "connection: {}/s, {:.2} ms for an answer; memory: {}, of which about {} to send;\n\
         the guest wrote {} in {} ms\n",
        HumanBytes(f.bandwidth),
        f.round_trip_us as f64 / 1e3,
        HumanBytes(f.ram_bytes),
        HumanBytes(f.data_bytes),
        HumanBytes(f.dirtied_bytes),
        f.sample_ms,
    );
    if f.converges {
        text += &format!(
            "forecast: about {} in {} pass(es), the guest stands still for about {} ms\n",
            seconds(f.total_ms),
            f.passes,
            f.downtime_ms
        );
    } else {
        text += &format!(
            "forecast: it does not converge with {}/s and {} ms of downtime\n",
            HumanBytes(f.used_bandwidth),
            f.downtime_limit_ms
        );
        if let Some(ms) = f.needed_downtime_ms {
            text += &format!("  --downtime {ms}ms would do\n");
        }
        if let Some(rate) = f.needed_bandwidth {
            text += &format!("  {}/s would do\n", HumanBytes(rate));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use migration::problem::kind;

    use super::*;

    #[test]
    fn people_see_every_problem_with_what_to_do() {
        let problem = Problem::new(kind::RAM_SIZE, "RAM block pc.ram", "1", "2", "use --memory 2");
        let answer = Preflight {
            would_move: false,
            destination: "mini-vmm 9".into(),
            problems: vec![problem, Problem::new(kind::TRIAL, "a spare vCPU", "a", "b", "")],
            left_out: 3,
            forecast: None,
            rehearsal: None,
        };
        let text = table(&answer);
        for words in [
            "FATAL   ram-size  RAM block pc.ram",
            "what to do:  use --memory 2",
            "known as:    Length mismatch",
            "warning trial",
            "and 3 more",
            "would not move to mini-vmm 9: 1 problem(s), 1 warning(s)",
        ] {
            assert!(text.contains(words), "'{words}' is not in\n{text}");
        }
    }
}
