//! `mini-vmm recover`: what is known of a hand-over that was cut, and the operator's decision.

use clap::Args;
use serde_json::json;

use super::{CliError, VmArg};

#[derive(Debug, Args)]
pub(super) struct RecoverArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Let the guest go on here
    #[arg(long, conflicts_with = "discard")]
    resume: bool,
    /// End this copy: the guest goes on at the destination
    #[arg(long)]
    discard: bool,
    /// With --resume: you have looked, and the destination does not run the guest and never will
    #[arg(long, requires = "resume", conflicts_with = "discard")]
    i_know_the_destination_does_not_run: bool,
    /// With --resume: the guest shall go on although its disks have been written to since
    #[arg(long, requires = "resume", conflicts_with = "discard")]
    even_though_the_disks_have_changed: bool,
    /// With --discard: you have looked, and the destination runs the guest
    #[arg(long, requires = "discard", conflicts_with = "resume")]
    i_know_the_destination_runs: bool,
    /// What is known as JSON
    #[arg(long, conflicts_with_all = ["resume", "discard"])]
    json: bool,
}

pub(super) fn recover(args: &RecoverArgs) -> Result<(), CliError> {
    let mut client = args.vm.connect()?;
    if args.resume {
        let words = json!({
            "action": "resume",
            "destination-does-not-run": args.i_know_the_destination_does_not_run,
            "disks-may-have-changed": args.even_though_the_disks_have_changed,
        });
        client.execute("x-recover", words)?;
        println!("the guest goes on here");
    } else if args.discard {
        let words = json!({
            "action": "discard",
            "destination-runs": args.i_know_the_destination_runs,
        });
        client.execute("x-recover", words)?;
        println!("this copy ends; the guest goes on at the destination");
    } else {
        let known = client.execute("x-recover", json!({}))?;
        if args.json {
            println!("{known:#}");
            return Ok(());
        }
        let text = |name: &str| known[name].as_str().unwrap_or("-").to_string();
        let seconds = known["for-seconds"].as_u64().unwrap_or_default();
        println!("It is not known whether the destination runs the guest. It stands still here.");
        println!("since     {seconds} s ago");
        println!("because   {}", text("reason"));
        println!("disks     {}", text("disks"));
        if let Some(asked) = known["asked"].as_str() {
            println!("asked     {asked}");
        }
        println!("so        {}", text("advice"));
    }
    Ok(())
}
