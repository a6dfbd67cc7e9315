//! Keys and words: which exist, and which was probably meant.

use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;

use super::ConfigError;

/// The known word nearest to `found`, if one is near enough to be a slip of the finger.
pub(crate) fn nearest<'a>(
    found: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let found = found.to_ascii_lowercase();
    let distance = |word: &str| {
        let word = word.to_ascii_lowercase();
        if found.len() >= 2 && (word.starts_with(&found) || found.starts_with(&word)) {
            return 1;
        }
        strsim::osa_distance(&found, &word)
    };
    known
        .into_iter()
        .map(|word| (distance(word), word))
        .filter(|(steps, word)| *steps <= found.len().min(word.len()).div_ceil(3))
        .min_by_key(|(steps, _)| *steps)
        .map(|(_, word)| word)
}

/// The names of a struct's fields, as its `Deserialize` declares them: no second list to keep.
pub(super) fn fields_of<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Ask<'a>(&'a mut &'static [&'static str]);
    impl<'de> Deserializer<'de> for Ask<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(Self::Error::custom("only asked for the fields"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            Err(Self::Error::custom("only asked for the fields"))
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }
    let mut fields: &'static [&'static str] = &[];
    let _ = T::deserialize(Ask(&mut fields));
    fields
}

/// Refuses the first key that `T` doesn't have.
pub(super) fn check_keys<'a, T: DeserializeOwned>(
    place: &str,
    found: impl IntoIterator<Item = &'a str>,
) -> Result<(), ConfigError> {
    let known = fields_of::<T>();
    for key in found {
        if !known.contains(&key) {
            return Err(ConfigError::UnknownKey {
                place: place.to_string(),
                found: key.to_string(),
                nearest: nearest(key, known.iter().copied()).map(str::to_string),
                known: known.to_vec(),
            });
        }
    }
    Ok(())
}

/// Splits `a=1,b=2,c` as QEMU writes options: a doubled comma is a comma in a value, a key without
/// `=` means `on`. With `first`, a first part without `=` is the value of that key.
pub(crate) fn split(text: &str, first: Option<&str>) -> Vec<(String, String)> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.peek() != Some(&',') {
            parts.push(String::new());
            continue;
        }
        if c == ',' {
            chars.next();
        }
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
        .into_iter()
        .enumerate()
        .filter(|(_, part)| !part.is_empty())
        .map(|(n, part)| match (part.split_once('='), first) {
            (None, Some(key)) if n == 0 => (key.to_string(), part),
            (None, _) => (part, "on".to_string()),
            (Some((key, value)), _) => (key.to_string(), value.to_string()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubled_commas_are_commas() {
        let got = split("path=/a,,b.img,readonly,id=x=y", None);
        let want = [("path", "/a,b.img"), ("readonly", "on"), ("id", "x=y")];
        assert_eq!(got, want.map(|(k, v)| (k.to_string(), v.to_string())));
        assert_eq!(split("pty,addr=5", Some("backend"))[0], ("backend".into(), "pty".into()));
    }

    #[test]
    fn slips_of_the_finger_are_recognised() {
        let known = ["path", "readonly", "cache"];
        assert_eq!(nearest("pth", known), Some("path"));
        assert_eq!(nearest("read-only", known), Some("readonly"));
        assert_eq!(nearest("zzz", known), None);
    }
}
