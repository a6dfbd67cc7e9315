//! Running other programs and keeping what they said.

use std::process::{Command, Stdio};

use crate::error::{Error, Result};

/// Lines of a failed program's output that an error quotes.
const QUOTED_LINES: usize = 30;

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// `Start` when it can't be started, `Failed` (quoting the end of its output) when it fails.
pub fn output(command: &mut Command) -> Result<String> {
    let done =
        command.stdin(Stdio::null()).output().map_err(|source| start_error(command, source))?;
    let stdout = String::from_utf8_lossy(&done.stdout).into_owned();
    if done.status.success() {
        return Ok(stdout);
    }
    let said = stdout + &String::from_utf8_lossy(&done.stderr);
    Err(Error::Failed { command: line(command), status: done.status, output: tail(&said) })
}

/// Runs a command that talks to the terminal itself.
///
/// # Errors
/// `Start` when it can't be started, `Failed` when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|source| start_error(command, source))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Failed { command: line(command), status, output: String::new() })
}

/// Runs a command whose standard output is wanted and which says on the terminal how it fares.
///
/// # Errors
/// `Start` when it can't be started, `Failed` when it fails.
pub fn output_told(command: &mut Command) -> Result<String> {
    let done = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let done = done.map_err(|source| start_error(command, source))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    Err(Error::Failed { command: line(command), status: done.status, output: String::new() })
}

/// The error for a command that could not be started.
pub fn start_error(command: &Command, source: std::io::Error) -> Error {
    Error::Start { program: command.get_program().to_string_lossy().into_owned(), source }
}

/// The last lines of a text.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n")
}

/// A command as a person would type it, for messages.
pub fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Quotes a word for a POSIX shell.
pub fn shell_quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_a_real_shell() {
        let odd = "it's $HOME \"and\" `more` \\ \n end";
        let script = format!("printf %s {}", shell_quote(odd));
        assert_eq!(output(Command::new("/bin/sh").args(["-c", &script])).unwrap(), odd);
    }

    #[test]
    fn a_failure_quotes_both_streams() {
        let error = output(Command::new("/bin/sh").args(["-c", "echo out; echo err >&2; exit 3"]))
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("| out") && text.contains("| err") && text.contains("exit status: 3"),
            "{text}"
        );
    }
}
