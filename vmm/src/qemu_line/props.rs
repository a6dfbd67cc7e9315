//! The properties of one option: `a=1,b=2` with doubled commas, or a JSON object.

use std::collections::BTreeMap;

use serde_json::Value;

use super::findings::Findings;
use crate::config::{nearest, split};

/// What becomes of a property that nothing was made of.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// It is the host's business: told, and left out.
    Host,
    /// It must have one of these values, which is how mini-vmm has it.
    Only(&'static [&'static str]),
}

/// Key and rule.
pub(super) type Rules = &'static [(&'static str, Rule)];

/// The properties that have not been looked at yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Props(Vec<(String, String)>);

impl Props {
    /// Reads an option's value; `implied` is the key of a first word without one.
    ///
    /// # Errors
    /// If it begins like JSON and is none. The reason says what is wrong with it.
    pub(super) fn parse(text: &str, implied: &str) -> Result<Self, String> {
        if !text.trim_start().starts_with('{') {
            return Ok(Self(split(text, Some(implied))));
        }
        // Nesting is bounded by the parser.
        let value = serde_json::from_str(text).map_err(|e| format!("this is no JSON: {e}"))?;
        let mut pairs = Vec::new();
        flatten("", &value, &mut pairs)?;
        Ok(Self(pairs))
    }

    /// Of pairs that have been split already.
    pub(super) fn of(pairs: Vec<(String, String)>) -> Self {
        Self(pairs)
    }

    /// Says all that `later` says over again, as an option that is given twice.
    pub(super) fn merge(&mut self, later: Self) {
        self.0.extend(later.0);
    }

    /// The value of a key, which is said and done with then. Said twice, the last one counts.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let (found, rest) = std::mem::take(&mut self.0).into_iter().partition(|(k, _)| k == key);
        self.0 = rest;
        let found: Vec<(String, String)> = found;
        found.into_iter().next_back().map(|(_, value)| value)
    }

    /// A switch; also the old way of `server,nowait`. What is neither on nor off stays.
    pub(super) fn take_switch(&mut self, key: &str) -> Option<bool> {
        let old = format!("no{key}");
        let (said_as, value) = self.0.iter().rev().find(|(k, _)| *k == key || *k == old)?;
        let said = match (switch(value)?, *said_as == old) {
            (true, true) => false,
            (false, true) => return None,
            (on, false) => on,
        };
        self.0.retain(|(k, _)| k != key && *k != old);
        Some(said)
    }

    /// Those whose key begins with `prefix`, without it.
    pub(super) fn take_below(&mut self, prefix: &str) -> Self {
        let (below, rest) =
            std::mem::take(&mut self.0).into_iter().partition(|(k, _)| k.starts_with(prefix));
        self.0 = rest;
        let below: Vec<(String, String)> = below;
        let cut =
            |(k, v): (String, String)| (k.strip_prefix(prefix).map(str::to_string).unwrap_or(k), v);
        Self(below.into_iter().map(cut).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sorts what is left by the rules of its option. What no rule names, matters.
    pub(super) fn settle(self, option: &str, rules: &[Rules], found: &mut Findings) {
        let mut host = Vec::new();
        // Said twice, the last one counts.
        let last: BTreeMap<_, _> = self.0.into_iter().collect();
        for (key, value) in last {
            let known = || rules.iter().flat_map(|rules| rules.iter());
            match known().find(|(name, _)| *name == key).map(|(_, rule)| *rule) {
                Some(Rule::Host) => host.push(key),
                Some(Rule::Only(values)) if values.iter().any(|v| same(v, &value)) => {}
                Some(Rule::Only(values)) => found.matters(
                    option,
                    format!(
                        "mini-vmm does not have {key}={value}; start the guest in QEMU with {key}={}",
                        values.join(" or ")
                    ),
                ),
                None => {
                    let near = nearest(&key, known().map(|(name, _)| *name));
                    let near = near.map(|near| format!(" (did you mean '{near}'?)"));
                    found.matters(
                        option,
                        format!(
                            "the property '{key}' is not known to mini-vmm{}; start the guest in \
                             QEMU without it",
                            near.unwrap_or_default()
                        ),
                    );
                }
            }
        }
        if !host.is_empty() {
            found.note(option, &format!("the guest does not see {}; left out", host.join(", ")));
        }
    }
}

/// Reads a switch as QEMU does.
fn switch(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

fn same(expected: &str, found: &str) -> bool {
    expected == found || switch(expected).is_some_and(|on| switch(found) == Some(on))
}

fn flatten(key: &str, value: &Value, pairs: &mut Vec<(String, String)>) -> Result<(), String> {
    let text = match value {
        Value::Object(table) => {
            for (name, value) in table {
                let name = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                flatten(&name, value, pairs)?;
            }
            return Ok(());
        }
        Value::Array(_) | Value::Null => {
            return Err(format!("the JSON value of '{key}' is neither text, number nor switch"));
        }
        Value::Bool(on) => if *on { "on" } else { "off" }.to_string(),
        // As a number it is slot and function in one; as text it is written in hexadecimal.
        Value::Number(devfn) if key == "addr" => match devfn.as_u64() {
            Some(devfn) if devfn < 256 => format!("{:x}.{:x}", devfn >> 3, devfn & 7),
            _ => return Err(format!("addr is {devfn}, which is no PCI slot and function")),
        },
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
    };
    pairs.push((key.to_string(), text));
    Ok(())
}
