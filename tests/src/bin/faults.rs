//! `cargo xtask faults`: migrations that are attacked, by the hundreds.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use system_tests::faults::campaign::Campaign;

/// Attack migrations, each in a way that follows from a seed and a number
#[derive(Parser)]
struct Args {
    /// Decides all that is done
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many cases
    #[arg(long, default_value_t = 100)]
    cases: u64,
    /// The first case's number
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// This case alone
    #[arg(long, conflicts_with_all = ["cases", "first"])]
    case: Option<u64>,
    /// How many at a time
    #[arg(long, default_value_t = 3)]
    jobs: usize,
    /// Begin no case after so many seconds
    #[arg(long)]
    seconds: Option<u64>,
    /// Say something about each
    #[arg(long, short)]
    verbose: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let cases = match args.case {
        Some(number) => number..number.saturating_add(1),
        None => args.first..args.first.saturating_add(args.cases),
    };
    let campaign = Campaign {
        seed: args.seed,
        cases,
        jobs: args.jobs,
        budget: args.seconds.map(Duration::from_secs),
        verbose: args.verbose || args.case.is_some(),
    };
    match campaign.run() {
        Ok(table) => {
            println!("{}", table.markdown());
            println!("{} cases, {} wrong", table.cases(), table.failures.len());
            for (case, why) in &table.failures {
                println!(
                    "wrong: case {}: {case}: {}",
                    case.number,
                    why.lines().next().unwrap_or("")
                );
            }
            if table.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(why) => {
            println!("not even a migration without faults succeeds: {why}");
            ExitCode::FAILURE
        }
    }
}
