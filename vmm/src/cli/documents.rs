//! Shell completions and the manual page, from the same source as `--help`.

use clap_complete::Shell;

use super::CliError;

pub(super) fn completions(shell: Shell, command: &mut clap::Command) {
    clap_complete::generate(shell, command, "mini-vmm", &mut std::io::stdout());
}

/// The page of the program, followed by one section for each command.
pub(super) fn man(command: clap::Command) -> Result<(), CliError> {
    let mut out = std::io::stdout();
    let error = || CliError::io("cannot write the manual page");
    clap_mangen::Man::new(command.clone()).render(&mut out).map_err(error())?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let name = format!("mini-vmm {}", sub.get_name());
        let man = clap_mangen::Man::new(sub.clone().bin_name(name));
        man.render_synopsis_section(&mut out).map_err(error())?;
        man.render_description_section(&mut out).map_err(error())?;
        man.render_options_section(&mut out).map_err(error())?;
    }
    Ok(())
}
