//! Arguments of a command, taken out one by one; what is left over is unexpected.

use serde_json::{Map, Value};

use super::QmpError;

/// The arguments of one command, or of an object inside them.
pub(super) struct Args {
    members: Map<String, Value>,
    /// Path of this object, for errors: "capabilities[0].".
    prefix: String,
}

impl Args {
    pub(super) fn new(members: Map<String, Value>) -> Self {
        Self { members, prefix: String::new() }
    }

    /// The argument's name as errors show it.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn take<T>(
        &mut self,
        name: &str,
        expected: &'static str,
        convert: impl FnOnce(Value) -> Option<T>,
    ) -> Result<Option<T>, QmpError> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(value) => match convert(value) {
                Some(value) => Ok(Some(value)),
                None => Err(QmpError::Type(self.path(name), expected)),
            },
        }
    }

    fn required<T>(&self, name: &str, value: Option<T>) -> Result<T, QmpError> {
        value.ok_or_else(|| QmpError::Missing(self.path(name)))
    }

    pub(super) fn optional_string(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        self.take(name, "string", |value| match value {
            Value::String(text) => Some(text),
            _ => None,
        })
    }

    pub(super) fn string(&mut self, name: &str) -> Result<String, QmpError> {
        let value = self.optional_string(name)?;
        self.required(name, value)
    }

    pub(super) fn int(&mut self, name: &str) -> Result<i64, QmpError> {
        let value = self.take(name, "integer", |value| value.as_i64())?;
        self.required(name, value)
    }

    pub(super) fn optional_bool(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        self.take(name, "boolean", |value| value.as_bool())
    }

    pub(super) fn bool(&mut self, name: &str) -> Result<bool, QmpError> {
        let value = self.optional_bool(name)?;
        self.required(name, value)
    }

    /// A list of objects.
    pub(super) fn objects(&mut self, name: &str) -> Result<Vec<Self>, QmpError> {
        let list = self.take(name, "array", |value| match value {
            Value::Array(list) => Some(list),
            _ => None,
        })?;
        let list = self.required(name, list)?;
        let path = self.path(name);
        list.into_iter()
            .enumerate()
            .map(|(n, value)| match value {
                Value::Object(members) => Ok(Self { members, prefix: format!("{path}[{n}].") }),
                _ => Err(QmpError::Type(format!("{path}[{n}]"), "object")),
            })
            .collect()
    }

    /// A list of strings, if it is there.
    pub(super) fn optional_strings(&mut self, name: &str) -> Result<Vec<String>, QmpError> {
        let list = self.take(name, "array", |value| match value {
            Value::Array(list) => Some(list),
            _ => None,
        })?;
        let path = self.path(name);
        let strings =
            list.unwrap_or_default().into_iter().enumerate().map(|(n, value)| match value {
                Value::String(text) => Ok(text),
                _ => Err(QmpError::Type(format!("{path}[{n}]"), "string")),
            });
        strings.collect()
    }

    /// All that is left, for commands whose arguments are not of this crate.
    pub(super) fn rest(self) -> Map<String, Value> {
        self.members
    }

    /// Everything has been taken: the rest is unexpected.
    pub(super) fn finish(self) -> Result<(), QmpError> {
        match self.members.keys().next() {
            Some(name) => Err(QmpError::Unexpected(self.path(name))),
            None => Ok(()),
        }
    }
}
