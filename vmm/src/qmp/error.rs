//! What a client hears when it can't have what it asked for.

use serde_json::{Value, json};
use thiserror::Error;

use crate::control::ControlError;

/// Why a command was not carried out. The texts are QEMU's where a client may look at them.
#[derive(Debug, Error)]
pub enum QmpError {
    /// No such command.
    #[error("The command {0} has not been found")]
    CommandNotFound(String),
    /// A command before `qmp_capabilities`.
    #[error("Expecting capabilities negotiation with 'qmp_capabilities'")]
    NotNegotiated,
    /// A second `qmp_capabilities`.
    #[error("Capabilities negotiation is already complete, command ignored")]
    AlreadyNegotiated,
    /// Not JSON.
    #[error("JSON parse error, {0}")]
    Syntax(String),
    /// JSON, but no object.
    #[error("QMP input must be a JSON object")]
    NotAnObject,
    /// No `execute`.
    #[error("QMP input lacks member 'execute'")]
    NoExecute,
    /// A member of the request that doesn't exist.
    #[error("QMP input member '{0}' is unexpected")]
    UnexpectedMember(String),
    /// A member of the request with a wrong type.
    #[error("QMP input member '{0}' must be {1}")]
    MemberType(&'static str, &'static str),
    /// An argument is missing.
    #[error("Parameter '{0}' is missing")]
    Missing(String),
    /// An argument that doesn't exist.
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(String),
    /// An argument of the wrong type.
    #[error("Invalid parameter type for '{0}', expected: {1}")]
    Type(String, &'static str),
    /// A word that an enumeration doesn't have.
    #[error("Parameter '{0}' does not accept value '{1}'")]
    Value(String, String),
    /// A number out of range.
    #[error("Parameter '{0}' expects {1}")]
    Expects(&'static str, &'static str),
    /// A value that can't be used; the text says what would be right.
    #[error("{0}")]
    Config(#[from] crate::config::ConfigError),
    /// An argument that QEMU has and we don't.
    #[error("Parameter '{0}' is not supported by mini-vmm: {1}")]
    Unsupported(&'static str, &'static str),
    /// `getfd` without a descriptor.
    #[error("No file descriptor supplied via SCM_RIGHTS")]
    NoDescriptor,
    /// A name that could be taken for a number.
    #[error("Parameter '{0}' expects a name not starting with a digit")]
    Digit(&'static str),
    /// `closefd` of nothing.
    #[error("File descriptor named '{0}' not found")]
    NotKept(String),
    /// The VM refused.
    #[error("{}", .0.chain())]
    Refused(#[from] ControlError),
    /// The command's thread ended without an answer.
    #[error("The command failed inside the VMM; see its log")]
    Lost,
}

impl QmpError {
    /// QMP's class of the error.
    #[must_use]
    pub fn class(&self) -> &'static str {
        match self {
            Self::CommandNotFound(_) | Self::NotNegotiated | Self::AlreadyNegotiated => {
                "CommandNotFound"
            }
            Self::Refused(ControlError::NoBalloon) => "DeviceNotActive",
            _ => "GenericError",
        }
    }

    /// The `error` member of a reply.
    pub(super) fn to_json(&self) -> Value {
        json!({ "class": self.class(), "desc": self.to_string() })
    }
}
