//! QEMU's words in a description, where a declaration has others.
//!
//! What a declaration calls its fields is part of the layout's digest, which releases of mini-vmm compare
//! with each other: it stays as it was. Names of structures are not, and are declared as QEMU's
//! (`#[serde(rename = "PCIDevice@2")]`). The rest is said here, beside the section's version. Facts were taken
//! from the streams of a QEMU 7.2.

use serde_json::{Map, Value, json};

/// How a section's description differs from its declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Words {
    /// What stands in front of the names of the section's own fields, and of its own subsections' fields.
    pub prefix: &'static str,
    /// The fields that are called or shown otherwise. One that has a [`Word`] has no prefix.
    pub fields: &'static [&'static [Word]],
}

/// A field that QEMU calls or shows otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// The structure or subsection that it is in, by its name in the description.
    pub within: &'static str,
    /// Its declared name.
    pub field: &'static str,
    /// QEMU's.
    pub name: &'static str,
    /// What QEMU shows of it.
    pub form: Form,
}

/// What QEMU shows of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The type that is declared.
    Declared,
    /// Another type of the same size, for each element of an array.
    Type(&'static str),
    /// All elements of an array as one value of this type.
    Whole(&'static str),
    /// A buffer as an array of bytes.
    Bytes,
    /// Equal elements of an array one by one, as QEMU does with those that may have subsections.
    Each,
    /// A structure of this name.
    Struct(&'static str),
}

impl Word {
    /// A field that is called otherwise.
    pub const fn new(within: &'static str, field: &'static str, name: &'static str) -> Self {
        Self { within, field, name, form: Form::Declared }
    }

    /// A field that is shown otherwise.
    pub const fn shown(within: &'static str, field: &'static str, form: Form) -> Self {
        Self { within, field, name: field, form }
    }

    /// The same word, for a field that is shown otherwise too.
    #[must_use]
    pub const fn as_form(self, form: Form) -> Self {
        Self { form, ..self }
    }
}

impl Words {
    /// The declaration's own.
    pub const DECLARED: Self = Self { prefix: "", fields: &[] };

    /// Puts a section's description into these words.
    pub(super) fn put(&self, description: &mut Value) {
        if let Value::Object(section) = description {
            let root = text(section, "vmsd_name");
            self.structure(section, &root);
        }
    }

    fn structure(&self, structure: &mut Map<String, Value>, root: &str) {
        let within = text(structure, "vmsd_name");
        let own =
            within.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let prefix = if own { self.prefix } else { "" };
        if let Some(Value::Array(fields)) = structure.get_mut("fields") {
            for field in std::mem::take(fields) {
                match field {
                    Value::Object(field) => self.field(field, &within, prefix, root, fields),
                    other => fields.push(other),
                }
            }
        }
        if let Some(Value::Array(subsections)) = structure.get_mut("subsections") {
            for subsection in subsections.iter_mut().filter_map(Value::as_object_mut) {
                self.structure(subsection, root);
            }
        }
    }

    fn field(
        &self,
        mut field: Map<String, Value>,
        within: &str,
        prefix: &str,
        root: &str,
        out: &mut Vec<Value>,
    ) {
        let declared = text(&field, "name");
        let mut words = self.fields.iter().copied().flatten();
        let word = words.find(|word| word.within == within && word.field == declared);
        let name = word.map_or_else(|| format!("{prefix}{declared}"), |word| word.name.to_owned());
        field.insert("name".into(), name.into());
        let form = word.map_or(Form::Declared, |word| word.form);
        if let Some(Value::Object(inner)) = field.get_mut("struct") {
            if let Form::Struct(name) = form {
                inner.insert("vmsd_name".into(), name.into());
            }
            self.structure(inner, root);
        }
        let size = field.get("size").and_then(Value::as_u64).unwrap_or(0);
        let elements = field.get("array_len").and_then(Value::as_u64);
        match (form, elements) {
            (Form::Declared | Form::Struct(_), _) | (Form::Each, None) => {}
            (Form::Type(name), _) => {
                field.insert("type".into(), name.into());
            }
            (Form::Whole(name), _) => {
                field.remove("array_len");
                field.insert("type".into(), name.into());
                field.insert("size".into(), json!(size.saturating_mul(elements.unwrap_or(1))));
            }
            (Form::Bytes, _) => {
                field.insert("type".into(), "uint8".into());
                field.insert("size".into(), json!(1));
                field.insert("array_len".into(), json!(size));
            }
            (Form::Each, Some(elements)) => {
                field.remove("array_len");
                out.extend((0..elements).map(|index| {
                    let mut one = field.clone();
                    one.insert("index".into(), json!(index));
                    Value::Object(one)
                }));
                return;
            }
        }
        out.push(Value::Object(field));
    }
}

fn text(object: &Map<String, Value>, member: &str) -> String {
    object.get(member).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: Words = Words {
        prefix: "env.",
        fields: &[
            &[Word::new("cpu", "a", "b[0]"), Word::shown("cpu", "whole", Form::Whole("state"))],
            &[
                Word::shown("cpu", "bytes", Form::Bytes),
                Word::shown("part", "each", Form::Each),
                Word::new("cpu", "inner", "inner").as_form(Form::Struct("part")),
                Word::new("part", "x", "y").as_form(Form::Type("uint32 equal")),
            ],
        ],
    };

    #[test]
    fn fields_are_called_and_shown_as_it_is_said() {
        let field = |name: &str, size: u32| json!({ "name": name, "type": "uint32", "size": size });
        let array =
            |name: &str| json!({ "name": name, "type": "uint32", "size": 4, "array_len": 2 });
        let inner = json!({
            "vmsd_name": "Inner", "version": 1, "fields": [field("x", 4), array("each"), field("a", 4)]
        });
        let mut description = json!({
            "name": "cpu", "vmsd_name": "cpu", "version": 1,
            "fields": [
                field("a", 4), field("other", 4), array("whole"), field("bytes", 7),
                { "name": "inner", "type": "struct", "size": 16, "struct": inner },
            ],
            "subsections": [
                { "vmsd_name": "cpu/sub", "version": 1, "fields": [field("a", 4)] },
                { "vmsd_name": "mini-vmm/sub", "version": 1, "fields": [field("a", 4)] },
            ],
        });
        WORDS.put(&mut description);
        let one =
            |index: u32| json!({ "name": "each", "type": "uint32", "size": 4, "index": index });
        let expected = json!({
            "name": "cpu", "vmsd_name": "cpu", "version": 1,
            "fields": [
                field("b[0]", 4),
                field("env.other", 4),
                { "name": "whole", "type": "state", "size": 8 },
                { "name": "bytes", "type": "uint8", "size": 1, "array_len": 7 },
                { "name": "inner", "type": "struct", "size": 16, "struct": {
                    "vmsd_name": "part", "version": 1,
                    "fields": [
                        { "name": "y", "type": "uint32 equal", "size": 4 }, one(0), one(1), field("a", 4)
                    ],
                } },
            ],
            "subsections": [
                { "vmsd_name": "cpu/sub", "version": 1, "fields": [field("env.a", 4)] },
                { "vmsd_name": "mini-vmm/sub", "version": 1, "fields": [field("a", 4)] },
            ],
        });
        assert_eq!(description, expected);
    }
}
