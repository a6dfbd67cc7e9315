//! One request: `{"execute": NAME, "arguments": {…}, "id": ANYTHING}`.

use serde_json::{Map, Value};

use super::QmpError;

/// A request that is well-formed; whether the command exists is not known yet.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: String,
    pub(super) arguments: Map<String, Value>,
}

/// Reads a request. The id comes back even if the rest is wrong, so that the reply can carry it.
pub(super) fn parse(text: &[u8]) -> (Option<Value>, Result<Request, QmpError>) {
    match serde_json::from_slice::<Value>(text) {
        Err(error) => (None, Err(QmpError::Syntax(error.to_string()))),
        Ok(Value::Object(mut members)) => {
            let id = members.remove("id");
            (id, members_of(members))
        }
        Ok(_) => (None, Err(QmpError::NotAnObject)),
    }
}

fn members_of(mut members: Map<String, Value>) -> Result<Request, QmpError> {
    let command = match members.remove("execute") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(QmpError::MemberType("execute", "a string")),
        None if members.is_empty() => return Err(QmpError::NoExecute),
        None => {
            return Err(members.into_iter().next().map_or(
                QmpError::NoExecute,
                |(key, _)| match key.as_str() {
                    "arguments" => QmpError::NoExecute,
                    _ => QmpError::UnexpectedMember(key),
                },
            ));
        }
    };
    let arguments = match members.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(QmpError::MemberType("arguments", "an object")),
        None => Map::new(),
    };
    match members.into_iter().next() {
        Some((key, _)) => Err(QmpError::UnexpectedMember(key)),
        None => Ok(Request { command, arguments }),
    }
}
