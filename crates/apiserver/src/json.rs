//! JSON in one pass, with the paths of fields that are given twice, which a plain parser takes for one.

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;

/// The value (of a repeated field the last one counts) and the paths of repeated fields.
///
/// # Errors
/// The text is not JSON.
pub fn parse(text: &[u8]) -> Result<(Value, Vec<String>), serde_json::Error> {
    let (mut path, mut repeated) = (String::new(), Vec::new());
    let mut input = serde_json::Deserializer::from_slice(text);
    let value = Tree { path: &mut path, repeated: &mut repeated }.deserialize(&mut input)?;
    input.end()?;
    Ok((value, repeated))
}

struct Tree<'a> {
    path: &'a mut String,
    repeated: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Value, D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_string()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        let end = self.path.len();
        loop {
            self.path.push_str(&format!("[{}]", list.len()));
            let item = items.next_element_seed(Tree { path: self.path, repeated: self.repeated })?;
            self.path.truncate(end);
            match item {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        let end = self.path.len();
        while let Some(key) = fields.next_key::<String>()? {
            if end > 0 {
                self.path.push('.');
            }
            self.path.push_str(&key);
            if map.contains_key(&key) && !self.repeated.contains(self.path) {
                self.repeated.push(self.path.clone());
            }
            let value = fields.next_value_seed(Tree { path: self.path, repeated: self.repeated })?;
            self.path.truncate(end);
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_twice_is_named_and_all_else_is_as_ever() {
        let text = r#"{"a":{"k":1,"k":-2,"k":2.5},"l":[{"x":"\u00e9"},{"x":null,"y":true,"x":[]}],"a":{}}"#;
        let (value, repeated) = parse(text.as_bytes()).expect("it is JSON");
        assert_eq!(value, serde_json::from_str::<Value>(text).expect("it is JSON"));
        assert_eq!(repeated, ["a.k", "l[1].x", "a"]);
        for wrong in ["", "{", "[1,]", "{} {}", "nul", &"[".repeat(1000)] {
            let (ours, theirs) = (parse(wrong.as_bytes()), serde_json::from_str::<Value>(wrong));
            assert_eq!(ours.map_err(|e| e.is_eof()).err(), theirs.map_err(|e| e.is_eof()).err(), "{wrong}");
        }
    }
}
