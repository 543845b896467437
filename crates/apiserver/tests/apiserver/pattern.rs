//! Patterns: what an answer must hold, whatever else it holds.
//!
//! - An object pattern names the fields that matter; `null` says that a field is absent (or null).
//! - A list pattern has one pattern per item; with `"..."` in front, each pattern must match some item.
//! - `"*"` matches anything that is there; `"~text"` a string that holds `text`.
//! - `"$name"` takes the value under that name; where the name has a value already, it must be the same.

use serde_json::Value;
use std::collections::BTreeMap;

pub type Names = BTreeMap<String, Value>;

/// The first place where `found` does not match, as a sentence.
pub fn mismatch(at: &str, pattern: &Value, found: Option<&Value>, names: &mut Names) -> Option<String> {
    let differs = || {
        let shown = found.map_or("nothing".to_string(), Value::to_string);
        Some(format!("{}: wanted {pattern}, found {shown}", if at.is_empty() { "/" } else { at }))
    };
    if pattern.is_null() {
        return if found.is_none_or(Value::is_null) { None } else { differs() };
    }
    let Some(value) = found else { return differs() };
    match (pattern, value) {
        (Value::String(text), _) if text == "*" => None,
        (Value::String(text), _) if text.starts_with('$') => {
            let name = &text[1..];
            match names.get(name) {
                Some(known) if known == value => None,
                Some(_) => differs(),
                None => {
                    names.insert(name.to_string(), value.clone());
                    None
                }
            }
        }
        (Value::String(text), Value::String(value)) if text.starts_with('~') => {
            if value.contains(&text[1..]) {
                None
            } else {
                differs()
            }
        }
        (Value::Object(wanted), Value::Object(map)) => {
            wanted.iter().find_map(|(key, inner)| mismatch(&format!("{at}/{key}"), inner, map.get(key), names))
        }
        (Value::Array(wanted), Value::Array(items)) => match wanted.split_first() {
            Some((Value::String(first), rest)) if first == "..." => rest.iter().find_map(|inner| {
                let matched = items.iter().any(|item| {
                    let mut trial = names.clone();
                    let good = mismatch(at, inner, Some(item), &mut trial).is_none();
                    if good {
                        *names = trial;
                    }
                    good
                });
                if matched { None } else { Some(format!("{at}: no item matches {inner} in {value}")) }
            }),
            _ if wanted.len() == items.len() => wanted
                .iter()
                .zip(items)
                .enumerate()
                .find_map(|(i, (inner, item))| mismatch(&format!("{at}/{i}"), inner, Some(item), names)),
            _ => differs(),
        },
        _ if pattern == value => None,
        _ => differs(),
    }
}

/// Puts the values of `${name}` into a text.
pub fn fill(text: &str, names: &Names) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let (name, tail) = after.split_once('}').ok_or_else(|| format!("${{ without }} in {text:?}"))?;
        out.push_str(before);
        match names.get(name) {
            Some(Value::String(value)) => out.push_str(value),
            Some(other) => out.push_str(&other.to_string()),
            None => return Err(format!("nothing has been taken as ${name} yet")),
        }
        rest = tail;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn patterns_match_what_they_say() {
        let found = json!({"a": 1, "b": [{"x": "one"}, {"x": "two"}], "c": null});
        for (pattern, good) in [
            (json!({}), true),
            (json!({"a": 1, "c": null, "d": null}), true),
            (json!({"a": "*", "d": "*"}), false),
            (json!({"b": [{"x": "one"}]}), false),
            (json!({"b": ["...", {"x": "two"}]}), true),
            (json!({"b": ["...", {"x": "three"}]}), false),
            (json!({"b": [{"x": "~n"}, {"x": "$n"}]}), true),
            (json!({"b": [{"x": "$n"}, {"x": "$n"}]}), false),
        ] {
            let got = mismatch("", &pattern, Some(&found), &mut Names::new());
            assert_eq!(got.is_none(), good, "{pattern}: {got:?}");
        }
    }

    #[test]
    fn taken_values_fill_later_texts() {
        let mut names = Names::new();
        assert_eq!(mismatch("", &json!({"n": "$n"}), Some(&json!({"n": "x"})), &mut names), None);
        assert_eq!(fill("/a/${n}/${n}", &names).as_deref(), Ok("/a/x/x"));
        assert!(fill("${m}", &names).is_err());
    }
}
